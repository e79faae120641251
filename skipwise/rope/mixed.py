"""Two sets of frequencies: those of pretraining inside the original window, rescaled ones beyond (LongRoPE2)."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.rope.scaling import Frequencies, base_frequencies, longrope_parameters
from skipwise.rope.yarn import check_betas, interpolated_share
from skipwise.utils.sections import section


@section
class Mixed:
    """Mixed windows (LongRoPE2, arXiv 2502.20082, Section 3.3), written as `longrope` with two lists of factors.

    An input that fits into Lc is computed with the frequencies of pretraining, so that the model stays what it was
    there; a longer one with theta_j divided by a factor per dimension. Training does the same: a batch takes the list
    that its largest position selects, so untouched windows and windows with skips come in batches of their own.

    One attention factor serves both lists in transformers. It is 1, or the original window would not stay as it was.

    Attributes:
        beta_fast: dimensions that turn more often than this within Lc are kept in the long list, too.
        beta_slow: dimensions that turn less often are interpolated by alpha; between is YaRN's ramp.
        long_factors: in place of YaRN's ramp and its betas, e.g. found by a search: one for each pair of dimensions,
            fastest first.
    """

    two_tables: ClassVar[bool] = True
    name: Literal["mixed"] = "mixed"
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    long_factors: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_betas(self.beta_fast, self.beta_slow)
        if self.long_factors is not None and not all(factor > 0 for factor in self.long_factors):
            raise UserError(
                f"rope.long_factors must be above 0, not {min(self.long_factors)}. 1 keeps a frequency.",
                code="factor_not_positive",
            )

    def frequencies(self, rotary_dim: int, theta: float, lengths: Lengths) -> Frequencies:
        """Those of the target: theta_j over the factor of its dimension, and 1."""
        return base_frequencies(rotary_dim, theta) / self.factors(rotary_dim, theta, lengths), 1.0

    def short_frequencies(self, rotary_dim: int, theta: float, lengths: Lengths) -> Frequencies:
        """Those of inputs that fit into the original window: theta_j and 1."""
        return base_frequencies(rotary_dim, theta), 1.0

    def hf_parameters(self, rotary_dim: int, theta: float, lengths: Lengths) -> dict[str, Any]:
        """The longrope type, with an attention factor that its own default is not."""
        frequencies = self.frequencies(rotary_dim, theta, lengths)
        return longrope_parameters(frequencies, rotary_dim, theta, lengths, short=[1.0] * (rotary_dim // 2))

    def factors(self, rotary_dim: int, theta: float, lengths: Lengths) -> NDArray[np.float64]:
        """float64[d/2]: of each dimension, the frequency of pretraining over that at the target."""
        if self.long_factors is None:
            ramp = interpolated_share(rotary_dim, theta, lengths.original, self.beta_fast, self.beta_slow)
            return 1 / (ramp / lengths.factor + (1 - ramp))
        if len(self.long_factors) != rotary_dim // 2:
            raise UserError(
                f"rope.long_factors needs one factor for each of the {rotary_dim // 2} pairs of dimensions, but has "
                f"{len(self.long_factors)}. Search them for this model (skipwise search), or leave them out.",
                code="wrong_number_of_factors",
            )
        return np.array(self.long_factors, dtype=np.float64)
