"""Sliding windows over a document: arithmetic only. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SlidingWindow:
    """One window of a document: its tokens are [begin, end), those from `score_from` on are scored."""

    begin: int
    end: int
    score_from: int


def sliding_windows(
    num_tokens: int, context_length: int, stride: int, final_tokens: int | None = None
) -> list[SlidingWindow]:
    """Windows in which every scored token is predicted exactly once, with as much context as fits.

    The first token of a document is context only: nothing stands before it.

    >>> [(w.begin, w.end, w.score_from) for w in sliding_windows(10, context_length=4, stride=3)]
    [(0, 4, 1), (3, 7, 4), (6, 10, 7)]
    """
    stride = min(stride, context_length - 1)
    scored = 1 if final_tokens is None else max(1, num_tokens - final_tokens)
    windows = []
    while scored < num_tokens:
        end = min(num_tokens, max(scored + stride, context_length))
        windows.append(SlidingWindow(begin=max(0, end - context_length), end=end, score_from=scored))
        scored = end
    return windows
