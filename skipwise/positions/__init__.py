"""The core: which position ids (and which tokens) a training window gets. Pure numpy.

To add a sampler, write a class with the methods of `PositionSampler` and add it to `SAMPLERS`.
"""

from skipwise.positions.baselines import FullLength, Plain, RandPos
from skipwise.positions.echo import echo_mask
from skipwise.positions.pose import PoSE
from skipwise.positions.window import Document, PositionSampler, Window, example_rng

SAMPLERS = (PoSE, RandPos, FullLength, Plain)

__all__ = [
    "SAMPLERS",
    "Document",
    "FullLength",
    "Plain",
    "PoSE",
    "PositionSampler",
    "RandPos",
    "Window",
    "echo_mask",
    "example_rng",
]
