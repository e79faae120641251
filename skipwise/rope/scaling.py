"""What a RoPE scaling is, and the frequencies all of them start from."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from skipwise.lengths import Lengths

Frequencies = tuple[NDArray[np.float64], float]
# vLLM reads these two keys of `longrope` in place of `attention_factor`. To transformers they are unknown.
VLLM_FACTORS = ("short_mscale", "long_mscale")


class RopeScaling(Protocol):
    """Maps (rotary dimension, theta, lengths) to inverse frequencies and an attention factor."""

    @property
    def name(self) -> str:
        """What it is called in a configuration."""
        ...

    @property
    def two_tables(self) -> bool:
        """Whether inputs that fit into the original window have frequencies of their own."""
        ...

    def frequencies(self, rotary_dim: int, theta: float, lengths: Lengths) -> Frequencies:
        """Inverse frequencies and attention factor at the target.

        Args:
            rotary_dim: d, how many dimensions of a head are rotated; even.
            theta: the base the model was pretrained with.
            lengths: original and target length; their ratio is alpha.

        Returns:
            `(inv_freq, attention_factor)`: float64[d/2] in radians per position, fastest first, and
            the factor that cosines and sines are multiplied by.
        """
        ...

    def short_frequencies(self, rotary_dim: int, theta: float, lengths: Lengths) -> Frequencies:
        """Inverse frequencies and attention factor of inputs that fit into the original window."""
        ...

    def hf_parameters(self, rotary_dim: int, theta: float, lengths: Lengths) -> dict[str, Any]:
        """The `rope_parameters` dictionary with which plain transformers computes the same frequencies."""
        ...


def base_frequencies(rotary_dim: int, theta: float) -> NDArray[np.float64]:
    """float64[d/2]: `theta^(-2j/d)`, the frequencies of plain RoPE (arXiv 2104.09864, Eq. 15).

    >>> base_frequencies(4, 10000.0).tolist()
    [1.0, 0.01]
    """
    return theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


def longrope_parameters(
    frequencies: Frequencies, rotary_dim: int, theta: float, lengths: Lengths, short: Sequence[float] | None = None
) -> dict[str, Any]:
    """Any frequencies as a `longrope` dictionary: a factor for each pair of dimensions, by which theta_j is divided.

    Args:
        frequencies: inverse frequencies and attention factor. The type's own default of the factor is another one, so
            it is written out.
        short: factors of inputs that fit into the original window; None for the same.
    """
    inv_freq, attention_factor = frequencies
    factors = (base_frequencies(rotary_dim, theta) / inv_freq).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "factor": lengths.factor,
        "original_max_position_embeddings": lengths.original,
        "short_factor": factors if short is None else list(short),
        "long_factor": factors,
        "attention_factor": attention_factor,
        **dict.fromkeys(VLLM_FACTORS, attention_factor),
    }
