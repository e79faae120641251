"""Long texts through a model in chunks over its KV cache: nothing but the cache grows with the length."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from skipwise.models.load import check_ids
from skipwise.models.rope import is_rotary_table, length_dependent, pin_table, text_config

# Tokens of a chunk: its activations are what a long text costs besides the cache.
CHUNK = 2048
# At most so many logits exist at once, however large the vocabulary: 256 MiB in float32.
MOST_LOGITS = 2**26
_REPORT: ContextVar[Callable[[int, int], None]] = ContextVar("tell", default=lambda read, tokens: None)


@dataclass(frozen=True)
class TokenScores:
    """How a model predicts some tokens of a text.

    Attributes:
        log_probs: float32[m], natural log-likelihood of each token.
        greedy: int64[m], what the model would have chosen instead.
    """

    log_probs: torch.Tensor
    greedy: torch.Tensor


@torch.no_grad()
def score_tokens(model: PreTrainedModel, input_ids: torch.Tensor, scored: torch.Tensor) -> TokenScores:
    """Log-likelihoods of some tokens of a batch, in one pass over it.

    Args:
        model: any causal language model.
        input_ids: int64[batch, n], without padding.
        scored: bool[batch, n], the m tokens to predict; the first of a row cannot be.

    Returns:
        Scores of the m tokens, row by row, on the CPU.
    """
    assert not scored[:, 0].any(), "nothing stands before the first token"
    length = input_ids.shape[1]
    with pinned_rope(model, length):
        chunks = _chunks(model, scored.any(dim=0), 0, length, input_ids.shape[0])
        cache = None if len(chunks) == 1 else _new_cache(model)
        log_probs = torch.zeros(scored.shape)
        greedy = torch.zeros(scored.shape, dtype=torch.int64)
        for begin, end in chunks:
            _score_chunk(model, input_ids, scored, cache, begin, end, log_probs, greedy)
    return TokenScores(log_probs[scored], greedy[scored])


@torch.no_grad()
def score_endings(
    model: PreTrainedModel, texts: Sequence[tuple[list[int], int]], wanted: Sequence[bool]
) -> Iterator[tuple[int, TokenScores]]:
    """Scores of the last tokens of texts which begin alike, each text read from where it differs from the last.

    Put texts with the longest common beginnings next to each other. What a text computes does not depend on
    which others are wanted, so leaving some out changes nothing.

    Args:
        texts: (ids, m) pairs: the last m tokens of the ids are to be scored.
        wanted: which of them.

    Yields:
        (index, scores of its m tokens) for each one wanted.
    """
    if not _croppable(model) or length_dependent(model.config) is not None:
        for index, (ids, ending) in enumerate(texts):
            if wanted[index]:
                scored = _last(len(ids), ending)
                yield index, score_tokens(model, torch.tensor([ids]), scored)
        return
    # Beyond this point of text i everything is its own; up to it text i + 1 goes on from it.
    shared = [_common(a[0], b[0], b[1]) for a, b in itertools.pairwise(texts)] + [0]
    cache, read = _new_cache(model), 0
    last = max((index for index, is_wanted in enumerate(wanted) if is_wanted), default=-1)
    for index, (ids, ending) in enumerate(texts[: last + 1]):
        tensor, scored = torch.tensor([ids]), _last(len(ids), ending)
        log_probs, greedy = torch.zeros(scored.shape), torch.zeros(scored.shape, dtype=torch.int64)
        _crop(cache, read)
        # Chunks end where the next text leaves this one, whether this one is wanted or not.
        parts = [(read, max(read, shared[index])), (max(read, shared[index]), len(ids))]
        for start, stop in parts if wanted[index] else parts[:1]:
            for begin, end in _chunks(model, scored[0], start, stop, 1):
                _score_chunk(model, tensor, scored, cache, begin, end, log_probs, greedy)
        read = shared[index]
        if wanted[index]:
            yield index, TokenScores(log_probs[scored], greedy[scored])


@torch.no_grad()
def continue_greedily(
    model: PreTrainedModel,
    prompt: list[int],
    max_new_tokens: int,
    is_over: Callable[[list[int]], bool] = lambda written: False,
) -> list[int]:
    """What the model writes after a prompt, always taking its first choice.

    Args:
        prompt: int[n].
        max_new_tokens: at most this many tokens are written.
        is_over: asked after every token; stops the writing.

    Returns:
        The tokens written, without an end-of-text token.
    """
    ends = _end_of_text(model)
    written: list[int] = []
    with pinned_rope(model, len(prompt) + max_new_tokens):
        cache = _new_cache(model) if _chunkable(model) else None
        ids = torch.tensor([prompt])
        nothing = torch.zeros(len(prompt), dtype=torch.bool)
        *earlier, last = _chunks(model, nothing, 0, len(prompt), 1)
        for begin, end in earlier:
            _logits(model, ids, cache, begin, end, None)
            _REPORT.get()(end, len(prompt))
        logits = _logits(model, ids, cache, *last, torch.tensor([last[1] - 1]))
        for _ in range(max_new_tokens):
            token = int(logits[0, -1].argmax())
            if token in ends:
                break
            written.append(token)
            if is_over(written) or len(written) == max_new_tokens:
                break
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
            end = ids.shape[1]
            begin = 0 if cache is None else end - 1
            logits = _logits(model, ids, cache, begin, end, torch.tensor([end - 1]))
    return written


@contextmanager
def reporting(report: Callable[[int, int], None]) -> Iterator[None]:
    """Within it `tell` gets, after every chunk, the number of tokens of a text that were read, and of all of them."""
    token = _REPORT.set(report)
    try:
        yield
    finally:
        _REPORT.reset(token)


@contextmanager
def pinned_rope(model: PreTrainedModel, length: int) -> Iterator[None]:
    """Frequencies of a text of `length` tokens throughout, for models whose frequencies depend on the length.

    Such a model would choose them by what it has been fed so far, and mix keys of two kinds in its cache.
    """
    undo: list[Callable[[], None]] = []
    try:
        if length_dependent(model.config) is not None:
            undo.extend(pin_table(module, length) for module in model.modules() if is_rotary_table(module))
        yield
    finally:
        for back in undo:
            back()


def _chunks(model: PreTrainedModel, scored: torch.Tensor, start: int, stop: int, batch: int) -> list[tuple[int, int]]:
    """Cut [start, stop) so that neither activations nor logits of a chunk grow with the length of the text."""
    if not _chunkable(model):
        return [(start, stop)]
    most_rows = max(1, MOST_LOGITS // (batch * text_config(model.config).vocab_size))
    # The token at i is predicted by the one before it.
    predicts = torch.cat([scored[1:], torch.zeros(1, dtype=torch.bool)]).int().cumsum(0)
    chunks = []
    while start < stop:
        end = min(stop, start + CHUNK)
        before = int(predicts[start - 1]) if start else 0
        if int(predicts[end - 1]) - before > most_rows:
            end = max(start + 1, int(torch.searchsorted(predicts, before + most_rows, right=True)))
        chunks.append((start, end))
        start = end
    return chunks


def _score_chunk(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    scored: torch.Tensor,
    cache: DynamicCache | None,
    begin: int,
    end: int,
    log_probs: torch.Tensor,
    greedy: torch.Tensor,
) -> None:
    """Read tokens [begin, end); put the scores of what they predict into float[batch, n] and int64[batch, n]."""
    targets = torch.nonzero(scored[:, begin + 1 : end + 1].any(dim=0))[:, 0] + begin + 1
    logits = _logits(model, input_ids, cache, begin, end, targets - 1 if len(targets) else None)
    if len(targets):
        rows = logits.float()
        picked = input_ids[:, targets].to(rows.device)[..., None]
        log_probs[:, targets] = (rows.gather(-1, picked)[..., 0] - rows.logsumexp(-1)).cpu()
        greedy[:, targets] = rows.argmax(-1).cpu()
    _REPORT.get()(end, input_ids.shape[1])


def _logits(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    cache: DynamicCache | None,
    begin: int,
    end: int,
    positions: torch.Tensor | None,
) -> torch.Tensor:
    """float[batch, k, vocabulary]: logits of the k positions, after reading tokens [begin, end).

    Raises:
        UserError: for an id that the model has no embedding for: a chat template or a record of a user may hold tokens
            that no document has.
    """
    check_ids(model, int(input_ids[:, begin:end].max()))
    kept: Any = 1 if positions is None else (positions - begin).to(model.device)
    output = model(
        input_ids=input_ids[:, begin:end].to(model.device),
        attention_mask=torch.ones(input_ids.shape[0], end, dtype=torch.int64, device=model.device),
        use_cache=cache is not None,
        logits_to_keep=kept,
        **{_cache_argument(type(model)): cache},
    )
    logits: torch.Tensor = output.logits
    if positions is not None and logits.shape[1] != len(positions):  # a model that does not know logits_to_keep
        logits = logits[:, kept]
    return logits


def _cache_argument(kind: type[PreTrainedModel]) -> str:
    """What a class calls its cache: transformers 5.24 gave it another name, and 5.40 will forget the old one."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def _new_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


def _chunkable(model: PreTrainedModel) -> bool:
    """Whether a text may come in pieces: every layer keeps keys and values, and the model does use them."""
    if model not in _CHUNKABLE:
        kinds = {type(layer) for layer in _new_cache(model).layers}
        _CHUNKABLE[model] = kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and _uses_cache(model)
    return _CHUNKABLE[model]


# What was found out about a model, as long as it lives.
_CHUNKABLE: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def _uses_cache(model: PreTrainedModel) -> bool:
    """Ask the model: some take a cache and ignore it, or keep another kind of state."""
    ids = torch.arange(6)[None] % text_config(model.config).vocab_size
    last = torch.tensor([5])
    cache = _new_cache(model)
    try:
        _logits(model, ids, cache, 0, 3, None)
        pieces = _logits(model, ids, cache, 3, 6, last)
        filled = cache.get_seq_length()
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    whole = _logits(model, ids, None, 0, 6, last)
    same = torch.allclose(pieces.float().softmax(-1), whole.float().softmax(-1), atol=0.02)
    return bool(filled == 6 and same)


def _croppable(model: PreTrainedModel) -> bool:
    """Whether every layer keeps all keys and values, so that the last ones may be taken back."""
    return _chunkable(model) and {type(layer) for layer in _new_cache(model).layers} <= {DynamicLayer}


def _crop(cache: DynamicCache, length: int) -> None:
    surplus = cache.get_seq_length() - length
    if surplus > 0:
        cache.crop(-surplus)


def _last(length: int, count: int) -> torch.Tensor:
    """bool[1, length]: the last `count`."""
    return torch.arange(length)[None] >= length - count


def _common(one: list[int], other: list[int], ending: int) -> int:
    """How many first tokens two texts share, leaving at least one token before the ending of the other."""
    shared = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return min(shared, len(other) - ending - 1, len(one))


def _end_of_text(model: PreTrainedModel) -> set[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
