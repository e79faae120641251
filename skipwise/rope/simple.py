"""Scalings that change every frequency by one rule: none, linear, NTK-aware, explicit theta."""

from typing import Any, ClassVar, Literal

from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.rope.scaling import Frequencies, base_frequencies
from skipwise.utils.sections import section


@section
class NoScaling:
    """The frequencies of pretraining, unchanged."""

    two_tables: ClassVar[bool] = False
    name: Literal["none"] = "none"

    def frequencies(self, rotary_dim: int, theta: float, lengths: Lengths) -> Frequencies:
        """theta_j and 1."""
        return base_frequencies(rotary_dim, theta), 1.0

    def short_frequencies(self, rotary_dim: int, theta: float, lengths: Lengths) -> Frequencies:
        """The same as beyond the original window."""
        return self.frequencies(rotary_dim, theta, lengths)

    def hf_parameters(self, rotary_dim: int, theta: float, lengths: Lengths) -> dict[str, Any]:
        """The default type."""
        return {"rope_type": "default", "rope_theta": theta}


@section
class Linear:
    """Linear position interpolation (arXiv 2306.15595, Eq. 3): positions divided by alpha."""

    two_tables: ClassVar[bool] = False
    name: Literal["linear"] = "linear"

    def frequencies(self, rotary_dim: int, theta: float, lengths: Lengths) -> Frequencies:
        """theta_j / alpha and 1."""
        return base_frequencies(rotary_dim, theta) / lengths.factor, 1.0

    def short_frequencies(self, rotary_dim: int, theta: float, lengths: Lengths) -> Frequencies:
        """The same as beyond the original window."""
        return self.frequencies(rotary_dim, theta, lengths)

    def hf_parameters(self, rotary_dim: int, theta: float, lengths: Lengths) -> dict[str, Any]:
        """The linear type with its factor."""
        return {"rope_type": "linear", "rope_theta": theta, "factor": lengths.factor}


@section
class NTK:
    """NTK-aware scaling (arXiv 2309.00071, Eq. 16): theta * alpha^(d / (d - 2)).

    The slowest dimension is interpolated by exactly alpha, the fastest not at all.
    """

    two_tables: ClassVar[bool] = False
    name: Literal["ntk"] = "ntk"

    def frequencies(self, rotary_dim: int, theta: float, lengths: Lengths) -> Frequencies:
        """Plain frequencies of the larger theta, and 1."""
        return base_frequencies(rotary_dim, self._theta(rotary_dim, theta, lengths)), 1.0

    def short_frequencies(self, rotary_dim: int, theta: float, lengths: Lengths) -> Frequencies:
        """The same as beyond the original window."""
        return self.frequencies(rotary_dim, theta, lengths)

    def hf_parameters(self, rotary_dim: int, theta: float, lengths: Lengths) -> dict[str, Any]:
        """The default type with the larger theta, which every reader understands."""
        return {"rope_type": "default", "rope_theta": self._theta(rotary_dim, theta, lengths)}

    @staticmethod
    def _theta(rotary_dim: int, theta: float, lengths: Lengths) -> float:
        if rotary_dim <= 2:
            raise UserError(
                f"NTK scaling needs a rotary dimension above 2, not {rotary_dim}. Use --rope linear.",
                code="rotary_dimension_too_small",
            )
        return float(theta * lengths.factor ** (rotary_dim / (rotary_dim - 2)))


@section
class AdjustedBase:
    """Adjusted base frequency (ABF, arXiv 2309.16039): a new theta, given explicitly.

    Attributes:
        theta: the new base, e.g. 500000.
    """

    two_tables: ClassVar[bool] = False
    name: Literal["abf"] = "abf"
    theta: float

    def __post_init__(self) -> None:
        if not self.theta > 1:
            raise UserError(
                f"rope.theta must be above 1, not {self.theta}. A common choice is 500000.", code="theta_too_small"
            )

    def frequencies(self, rotary_dim: int, theta: float, lengths: Lengths) -> Frequencies:
        """Plain frequencies of the given theta, and 1; the pretraining theta is ignored by design."""
        return base_frequencies(rotary_dim, self.theta), 1.0

    def short_frequencies(self, rotary_dim: int, theta: float, lengths: Lengths) -> Frequencies:
        """The same as beyond the original window."""
        return self.frequencies(rotary_dim, theta, lengths)

    def hf_parameters(self, rotary_dim: int, theta: float, lengths: Lengths) -> dict[str, Any]:
        """The default type with the given theta."""
        return {"rope_type": "default", "rope_theta": self.theta}
