"""RoPE scalings: frequencies, and how each is written to a Hugging Face config. Pure numpy.

To add a scaling, write a class with the methods of `RopeScaling` and add it to `Scaling`.
"""

from typing import get_args

from skipwise.rope.mixed import Mixed
from skipwise.rope.scaling import RopeScaling, base_frequencies
from skipwise.rope.simple import NTK, AdjustedBase, Linear, NoScaling
from skipwise.rope.yarn import YaRN, YaRNRevised

Scaling = YaRN | Linear | NTK | YaRNRevised | AdjustedBase | NoScaling | Mixed
ROPE_SCALINGS: tuple[type[Scaling], ...] = get_args(Scaling)

__all__ = [
    "NTK",
    "ROPE_SCALINGS",
    "AdjustedBase",
    "Linear",
    "Mixed",
    "NoScaling",
    "RopeScaling",
    "Scaling",
    "YaRN",
    "YaRNRevised",
    "base_frequencies",
]
