"""The core: which position ids (and which tokens) a training window gets. Pure numpy.

To add a sampler, write a class with the methods of `PositionSampler` and add it to `Sampler`.
"""

from typing import get_args

from skipwise.positions.baselines import FullLength, Plain, RandPos
from skipwise.positions.cream import CREAM
from skipwise.positions.echo import echo_mask
from skipwise.positions.longrecipe import LongRecipe
from skipwise.positions.matched import Matched
from skipwise.positions.pose import PoSE
from skipwise.positions.window import Document, PositionSampler, Window, example_rng

Sampler = PoSE | RandPos | FullLength | Plain | CREAM | LongRecipe | Matched
SAMPLERS: tuple[type[Sampler], ...] = get_args(Sampler)

__all__ = [
    "CREAM",
    "SAMPLERS",
    "Document",
    "FullLength",
    "LongRecipe",
    "Matched",
    "Plain",
    "PoSE",
    "PositionSampler",
    "RandPos",
    "Sampler",
    "Window",
    "echo_mask",
    "example_rng",
]
