"""Skipwise: extend the context window of a RoPE language model by training on short windows."""

from typing import TYPE_CHECKING, Any

from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.positions import Document, FullLength, Plain, PoSE, PositionSampler, RandPos, Window
from skipwise.rope import NTK, AdjustedBase, Linear, NoScaling, RopeScaling, YaRN, YaRNRevised

if TYPE_CHECKING:
    from skipwise.data.windows import WindowCollator
    from skipwise.models.probe import probe_attention
    from skipwise.models.rope import set_rope_scaling

__version__ = "0.1.0"

__all__ = [
    "NTK",
    "AdjustedBase",
    "Document",
    "FullLength",
    "Lengths",
    "Linear",
    "NoScaling",
    "Plain",
    "PoSE",
    "PositionSampler",
    "RandPos",
    "RopeScaling",
    "UserError",
    "Window",
    "WindowCollator",
    "YaRN",
    "YaRNRevised",
    "probe_attention",
    "set_rope_scaling",
]

# These need torch, which takes seconds to import.
_LAZY = {
    "WindowCollator": "skipwise.data.windows",
    "probe_attention": "skipwise.models.probe",
    "set_rope_scaling": "skipwise.models.rope",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
