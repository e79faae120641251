"""YaRN: fast dimensions kept, slow ones interpolated, a ramp between (arXiv 2309.00071)."""

import math
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.rope.scaling import Frequencies, base_frequencies, longrope_parameters
from skipwise.utils.sections import section


def correction_dim(rotations: float, rotary_dim: int, theta: float, original: int) -> float:
    """The (fractional) pair index j whose wavelength fits `rotations` times into the original window.

    Solves `original * theta^(-2j/d) / (2 pi) = rotations` for j (arXiv 2309.00071, Eq. 17-18).
    """
    return rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))


def interpolated_share(
    rotary_dim: int, theta: float, original: int, beta_fast: float, beta_slow: float, whole: bool = True
) -> NDArray[np.float64]:
    """float64[d/2]: the ramp, 0 where a dimension is kept and 1 where it is interpolated.

    Its ends are rounded outwards to `whole` dimensions, as the YaRN authors and transformers do.
    """
    low, high = (correction_dim(turns, rotary_dim, theta, original) for turns in (beta_fast, beta_slow))
    if whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = max(high - low, 0.001)  # transformers' guard against a ramp of no width
    return np.clip((np.arange(rotary_dim // 2, dtype=np.float64) - low) / width, 0.0, 1.0)


def yarn_attention_factor(alpha: float) -> float:
    """`0.1 ln(alpha) + 1` (arXiv 2309.00071, Eq. 22): applied to cosines and sines, so to logits twice."""
    return 0.1 * math.log(alpha) + 1.0 if alpha > 1 else 1.0


def check_betas(beta_fast: float, beta_slow: float) -> None:
    """Raise `UserError` for a ramp that does not run from fast to slow."""
    if not 1e6 >= beta_fast > beta_slow >= 1e-6:
        raise UserError(
            f"YaRN needs 1,000,000 >= beta_fast > beta_slow >= 0.000001, but they are {beta_fast} and {beta_slow}. The "
            "paper uses 32 and 1.",
            code="betas_out_of_order",
        )


@section
class YaRN:
    """YaRN as in the paper and in transformers: `theta_j ((1 - m) / alpha + m)`, m = 1 - ramp.

    Attributes:
        beta_fast: dimensions that turn more often than this within Lc are kept.
        beta_slow: dimensions that turn less often are interpolated by alpha.
        attention_factor: on cosines and sines, so squared on the logits; None for `0.1 ln(alpha) + 1`.
    """

    two_tables: ClassVar[bool] = False
    name: Literal["yarn"] = "yarn"
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        check_betas(self.beta_fast, self.beta_slow)
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise UserError(
                f"YaRN's attention_factor must be above 0, not {self.attention_factor}. Leave it out for the paper's.",
                code="factor_not_positive",
            )

    def _attention_factor(self, lengths: Lengths) -> float:
        return yarn_attention_factor(lengths.factor) if self.attention_factor is None else self.attention_factor

    def frequencies(self, rotary_dim: int, theta: float, lengths: Lengths) -> Frequencies:
        """A mean of kept and interpolated frequencies, weighted by the ramp."""
        ramp = interpolated_share(rotary_dim, theta, lengths.original, self.beta_fast, self.beta_slow)
        scale = ramp / lengths.factor + (1 - ramp)
        return base_frequencies(rotary_dim, theta) * scale, self._attention_factor(lengths)

    def short_frequencies(self, rotary_dim: int, theta: float, lengths: Lengths) -> Frequencies:
        """The same as beyond the original window."""
        return self.frequencies(rotary_dim, theta, lengths)

    def hf_parameters(self, rotary_dim: int, theta: float, lengths: Lengths) -> dict[str, Any]:
        """The yarn type, with nothing left to a reader's defaults."""
        return {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": lengths.factor,
            "original_max_position_embeddings": lengths.original,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "attention_factor": self._attention_factor(lengths),
        }


@section
class YaRNRevised:
    """The PoSE authors' YaRN: `theta_j / ((1 - m) alpha + m)`, a harmonic mean inside the ramp.

    It equals YaRN outside the ramp only, so it is exported as explicit factors per dimension
    (`longrope` with equal short and long lists), never under YaRN's name.

    Attributes:
        beta_fast: dimensions that turn more often than this within Lc are kept.
        beta_slow: dimensions that turn less often are interpolated by alpha.
    """

    two_tables: ClassVar[bool] = False
    name: Literal["yarn-revised"] = "yarn-revised"
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        check_betas(self.beta_fast, self.beta_slow)

    def frequencies(self, rotary_dim: int, theta: float, lengths: Lengths) -> Frequencies:
        """theta_j divided by the factor of its dimension."""
        factors = self._factors(rotary_dim, theta, lengths)
        return base_frequencies(rotary_dim, theta) / factors, yarn_attention_factor(lengths.factor)

    def short_frequencies(self, rotary_dim: int, theta: float, lengths: Lengths) -> Frequencies:
        """The same as beyond the original window."""
        return self.frequencies(rotary_dim, theta, lengths)

    def hf_parameters(self, rotary_dim: int, theta: float, lengths: Lengths) -> dict[str, Any]:
        """The longrope type; its own default attention factor differs, so ours is written out."""
        return longrope_parameters(self.frequencies(rotary_dim, theta, lengths), rotary_dim, theta, lengths)

    def _factors(self, rotary_dim: int, theta: float, lengths: Lengths) -> NDArray[np.float64]:
        ramp = interpolated_share(rotary_dim, theta, lengths.original, self.beta_fast, self.beta_slow)
        return ramp * lengths.factor + (1 - ramp)
