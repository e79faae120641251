"""RoPE scalings: frequencies, and how each is written to a Hugging Face config. Pure numpy.

To add a scaling, write a class with the methods of `RopeScaling` and add it to `ROPE_SCALINGS`.
"""

from skipwise.rope.scaling import RopeScaling, base_frequencies
from skipwise.rope.simple import NTK, AdjustedBase, Linear, NoScaling
from skipwise.rope.yarn import YaRN, YaRNRevised

ROPE_SCALINGS = (YaRN, Linear, NTK, YaRNRevised, AdjustedBase, NoScaling)

__all__ = [
    "NTK",
    "ROPE_SCALINGS",
    "AdjustedBase",
    "Linear",
    "NoScaling",
    "RopeScaling",
    "YaRN",
    "YaRNRevised",
    "base_frequencies",
]
