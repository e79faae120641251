"""PoSE: chunks of a short window, each shifted by a random skip (arXiv 2309.10400, Section 3)."""

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.positions.distances import run_distances, sequential_pairs, two_chunk_distances
from skipwise.positions.window import Distances, Document, Window
from skipwise.utils.sections import section

CONTENT_MODES = ("contiguous", "uniform", "aligned")
FIRST_CHUNKS = ("any", "half")
SKIPS = ("sequential", "sorted")


@section
class PoSE:
    """Positional skip-wise training.

    The window of Lw tokens is cut into N chunks of lengths l_0 .. l_{N-1}; with st_i the start of
    chunk i, its position ids are `u_i + st_i, ..., u_i + st_i + l_i - 1` (Eq. 3-4) and its text is
    `x[v_i + st_i : v_i + st_i + l_i]` (Eq. 5). In the paper the skips are drawn one after the other,
    `u_i ~ U{u_{i-1}, ..., Lt - Lw}`, from `u_0 = 0`; see `skips` for other ways.

    Worked example: Lw = 8, Lt = 32, cut at 3, u_1 = 20 gives position ids
    `0 1 2 | 23 24 25 26 27`.

    Attributes:
        chunks: N, at least 1 and at most Lw.
        content: where the text of chunk i comes from. `contiguous`: v_i = 0, the text runs on across
            the skip. `uniform`: `v_i ~ U{v_{i-1}, ..., Lx - Lw}`, a skip in the text as well.
            `aligned`: v_i = u_i, each token sits at its true position; needs documents of Lt tokens.
        first_chunk: `any`: N - 1 distinct cuts uniform in 1 .. Lw - 1, as in the paper. `half`: the
            first chunk has `U{1, ..., (Lw + 1) // 2}` tokens, as in the authors' released code; two
            chunks only.
        skips: `sequential`: one after the other as above; with many chunks the later skips crowd at the largest.
            `sorted`: N - 1 independent uniform skips in order, so that all are spread evenly (the same for two
            chunks).
    """

    needs_sentences: ClassVar[bool] = False
    name: Literal["pose"] = "pose"
    chunks: int = 2
    content: Literal["contiguous", "uniform", "aligned"] = "contiguous"
    first_chunk: Literal["any", "half"] = "any"
    skips: Literal["sequential", "sorted"] = "sequential"

    def __post_init__(self) -> None:
        if self.chunks < 1:
            raise UserError(
                f"PoSE needs at least one chunk, not {self.chunks}. Set positions.chunks to 2.", code="count_below_one"
            )
        for key, known in (("content", CONTENT_MODES), ("first_chunk", FIRST_CHUNKS), ("skips", SKIPS)):
            if getattr(self, key) not in known:
                raise UserError(
                    f"PoSE's {key} is one of {', '.join(known)}, not {getattr(self, key)!r}.", code="unknown_choice"
                )
        if self.first_chunk == "half" and self.chunks != 2:
            raise UserError(
                f"first_chunk 'half' is defined for two chunks, not {self.chunks}. Set positions.chunks to 2 or "
                "positions.first_chunk to 'any'.",
                code="two_chunks_needed",
            )

    @property
    def has_skips(self) -> bool:
        """With more than one chunk."""
        return self.chunks > 1

    def check(self, lengths: Lengths) -> None:
        """Raise `UserError` when the window is too short to be cut into that many chunks."""
        if lengths.train < self.chunks:
            raise UserError(
                f"A window must hold at least one token per chunk, but the train length is {lengths.train} for "
                f"{self.chunks} chunks. Raise the train length (--train-length) or lower positions.chunks.",
                code="train_length_too_short",
            )

    def window_length(self, lengths: Lengths) -> int:
        """Lw."""
        return lengths.train

    def tokens_needed(self, lengths: Lengths) -> int:
        """Lt for aligned content, else Lw."""
        return lengths.target if self.content == "aligned" else lengths.train

    def tokens_used(self, lengths: Lengths) -> int:
        """Lw for contiguous content; up to Lt where the text may skip too."""
        return lengths.train if self.content == "contiguous" else lengths.target

    def sample(self, document: Document, lengths: Lengths, rng: np.random.Generator) -> Window:
        """Draw cuts, skips and content, and lay them out (Eq. 3-5)."""
        sizes = self._chunk_sizes(lengths.train, rng)
        u = self._skips(lengths.target - lengths.train, rng)
        token = np.arange(lengths.train, dtype=np.int64)
        if self.content == "aligned":
            v = u
        elif self.content == "uniform":
            v = sequential_uniform(self.chunks, document.num_tokens - lengths.train, rng)
        else:
            return Window(token_index=token, position_ids=token + u.repeat(sizes))
        return Window(token_index=token + v.repeat(sizes), position_ids=token + u.repeat(sizes))

    def contiguous(self) -> "PoSE":
        """With the text of one chunk running on in the next."""
        return replace(self, content="contiguous")

    def distances(self, lengths: Lengths) -> Distances:
        """By formulas for one or two chunks; for more the expected pairs, where skips are drawn one after the other."""
        train, target = lengths.train, lengths.target
        if self.chunks == 1:
            return run_distances(train, target)
        if self.chunks == 2:
            last = self._last_cut(train)
            cuts = np.where(np.arange(1, train) <= last, 1 / last, 0.0)
            return two_chunk_distances(cuts, np.full(target - train + 1, 1 / (target - train + 1)))
        return Distances(pairs=sequential_pairs(self.chunks, lengths) if self.skips == "sequential" else None)

    def _skips(self, maximum: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """int64[chunks], non-decreasing from 0: the skip of each chunk."""
        draw = sequential_uniform if self.skips == "sequential" else sorted_uniform
        return draw(self.chunks, maximum, rng)

    def _last_cut(self, train: int) -> int:
        """The largest first of two chunks, in tokens."""
        return (train + 1) // 2 if self.first_chunk == "half" else train - 1

    def _chunk_sizes(self, train: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """int64[chunks]: the tokens of each chunk."""
        if self.chunks == 2:  # a single cut needs no choice without replacement, which takes as long as all the rest
            first = rng.integers(1, self._last_cut(train), endpoint=True)
            return np.array([first, train - first])
        cuts = 1 + np.sort(rng.choice(train - 1, size=self.chunks - 1, replace=False))
        edges = np.concatenate(([0], cuts, [train]))
        return edges[1:] - edges[:-1]


def sequential_uniform(count: int, maximum: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """int64[count], non-decreasing: first 0, then each uniform on {previous, ..., maximum} (Eq. 4)."""
    values = np.zeros(count, dtype=np.int64)
    for i in range(1, count):
        values[i] = rng.integers(values[i - 1], maximum, endpoint=True)
    return values


def sorted_uniform(count: int, maximum: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """int64[count], non-decreasing: first 0, the others independent and uniform on {0, ..., maximum}, in order."""
    drawn = np.sort(rng.integers(maximum, size=count - 1, endpoint=True))
    return np.concatenate(([0], drawn))
