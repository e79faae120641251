"""What a RoPE scaling is, and the frequencies all of them start from."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from skipwise.lengths import Lengths

Frequencies = tuple[NDArray[np.float64], float]


class RopeScaling(Protocol):
    """Maps (rotary dimension, theta, lengths) to inverse frequencies and an attention factor."""

    @property
    def name(self) -> str:
        """What it is called in a configuration."""
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

    def hf_parameters(self, rotary_dim: int, theta: float, lengths: Lengths) -> dict[str, Any]:
        """The `rope_parameters` dictionary with which stock transformers computes the same frequencies."""
        ...


def base_frequencies(rotary_dim: int, theta: float) -> NDArray[np.float64]:
    """float64[d/2]: `theta^(-2j/d)`, the frequencies of plain RoPE (arXiv 2104.09864, Eq. 15).

    >>> base_frequencies(4, 10000.0).tolist()
    [1.0, 0.01]
    """
    return theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


def vllm_attention_factors(factor: float) -> dict[str, float]:
    """What a `longrope` dictionary needs besides: vLLM reads no `attention_factor`, and has a default of its own.

    transformers notes the two keys as unknown, and ignores them.
    """
    return {"short_mscale": factor, "long_mscale": factor}
