"""Two chunks whose cut and skip are drawn so that training meets distances as inference at the target does."""

from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.positions.distances import pairs_across, two_chunk_distances
from skipwise.positions.window import Distances, Document, Window
from skipwise.utils.sections import section

Floats = NDArray[np.float64]
# The likelihood grows by less than a hundred-thousandth per step long before.
STEPS = 200


@section
class Matched:
    """PoSE with two chunks and the distribution of cut and skip that fits what is still to be learned.

    PoSE draws skips uniformly, so all distances from Lw to Lt - Lw are met alike. A model that reads Lt tokens meets
    distance d in Lt - d of Lt places, and in pretraining it met it in Lc - d of Lc. What is left to learn is

        q(d)  proportional to  (1 - d / Lt) - max(0, 1 - d / Lc),

    and the policy maximises the expected log-likelihood of a distance drawn from q under the distances of a window
    (`matched_policy`). Its windows are as close to pretraining as PoSE's: two chunks, text that runs on.

    Attributes:
        cut: `matched`: the cut is optimised as well; `any`: uniform, as in the paper, and only the skip is.
    """

    has_skips: ClassVar[bool] = True
    needs_sentences: ClassVar[bool] = False
    name: Literal["matched"] = "matched"
    cut: Literal["matched", "any"] = "matched"

    def check(self, lengths: Lengths) -> None:
        """Raise `UserError` when there is nothing to cut."""
        if lengths.train < 2:
            raise UserError(
                f"Two chunks need a train length of at least 2 tokens, not {lengths.train}. Raise it.",
                code="train_length_too_short",
            )

    def window_length(self, lengths: Lengths) -> int:
        """Lw."""
        return lengths.train

    def tokens_needed(self, lengths: Lengths) -> int:
        """Lw: the text runs on."""
        return lengths.train

    def tokens_used(self, lengths: Lengths) -> int:
        """Lw."""
        return lengths.train

    def sample(self, document: Document, lengths: Lengths, rng: np.random.Generator) -> Window:
        """Draw cut and skip from the policy."""
        cut_sums, skip_sums = _sums(lengths, self.cut == "matched")
        first = 1 + int(np.searchsorted(cut_sums, rng.random(), side="right"))
        skip = int(np.searchsorted(skip_sums, rng.random(), side="right"))
        ids = np.arange(lengths.train, dtype=np.int64)
        return Window(token_index=ids, position_ids=ids + np.repeat([0, skip], [first, lengths.train - first]))

    def contiguous(self) -> "Matched":
        """Itself: the text runs on."""
        return self

    def distances(self, lengths: Lengths) -> Distances:
        """Those of two chunks."""
        return two_chunk_distances(*self.policy(lengths))

    def policy(self, lengths: Lengths) -> tuple[Floats, Floats]:
        """Probabilities of the cuts 1, ..., Lw - 1 and of the skips 0, ..., Lt - Lw."""
        return matched_policy(lengths, self.cut == "matched")


def left_to_learn(lengths: Lengths) -> Floats:
    """float64[Lt]: q(d), what inference meets and pretraining has not shown, normalised; 0 at d = 0."""
    distance = np.arange(lengths.target)
    need = (1 - distance / lengths.target) - np.maximum(0, 1 - distance / lengths.original)
    need = np.maximum(0, need)
    return need / need.sum() if need.any() else need


@lru_cache(maxsize=64)
def matched_policy(lengths: Lengths, optimise_cut: bool = True) -> tuple[Floats, Floats]:
    """Cut and skip distributions under which the distances of a window fit `left_to_learn` best.

    Every window has Lw (Lw - 1) / 2 pairs of tokens, so the distances of a policy are a mixture: with probability
    pi(c) pi(u) those of cut c and skip u. Expectation maximisation (Dempster et al. 1977) raises the likelihood of q
    under it at each step: a weight grows by the mean of q / p over the distances of its windows. Cut and skip stay
    independent; all sums over skips are convolutions, by FFT.

    Args:
        optimise_cut: else the cut stays uniform.

    Returns:
        float64[Lw - 1] for cuts 1, ..., Lw - 1 and float64[Lt - Lw + 1] for skips 0, ..., Lt - Lw; each sums to 1.
    """
    train, skips = lengths.train, lengths.target - lengths.train + 1
    wanted = left_to_learn(lengths)[1:]
    delta = np.arange(1, train)
    cut, skip = np.full(train - 1, 1 / (train - 1)), np.full(skips, 1 / skips)
    for _ in range(STEPS if wanted.any() else 0):
        between = pairs_across(cut)
        within = train - delta - between
        met = _convolve(between, skip)
        met[: train - 1] += within
        ratio = wanted / np.maximum(met, 1e-300)  # of what is wanted to what is met, but for a constant
        near = ratio[: train - 1]
        if optimise_cut:
            # What a pair is worth across the skip beyond what it is worth inside, by its distance in the window.
            cut = cut * (pairs_across(_correlate(ratio, skip) - near) + (train - delta) @ near)
        skip = skip * (_correlate(ratio, between) + within @ near)
        cut, skip = cut / cut.sum(), skip / skip.sum()
    cut.setflags(write=False)
    skip.setflags(write=False)
    return cut, skip


@lru_cache(maxsize=64)
def _sums(lengths: Lengths, optimise_cut: bool) -> tuple[Floats, Floats]:
    """Cumulated, without the last, so that any number below 1 finds its place."""
    cut, skip = matched_policy(lengths, optimise_cut)
    return cut.cumsum()[:-1], skip.cumsum()[:-1]


def _convolve(one: Floats, other: Floats) -> Floats:
    """sum over j of one[i - j] other[j], never below 0."""
    length = len(one) + len(other) - 1
    size = 1 << (length - 1).bit_length()
    return np.maximum(0.0, np.fft.irfft(np.fft.rfft(one, size) * np.fft.rfft(other, size), size)[:length])


def _correlate(one: Floats, other: Floats) -> Floats:
    """sum over j of one[i + j] other[j], for i = 0, ..., len(one) - len(other), never below 0."""
    return _convolve(one, other[::-1])[len(other) - 1 : len(one)]
