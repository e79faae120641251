"""Skipwise: extend the context window of a RoPE language model by training on short windows."""

from typing import TYPE_CHECKING, Any

from skipwise.errors import UserError

if TYPE_CHECKING:
    from skipwise.data.masked import MaskedWindowCollator
    from skipwise.data.sentences import sentences_of
    from skipwise.data.windows import WindowCollator
    from skipwise.export.adapter import load_adapter
    from skipwise.export.checkpoint import save
    from skipwise.lengths import Lengths
    from skipwise.models.probe import probe_attention
    from skipwise.models.rope import set_rope_scaling
    from skipwise.models.windowed import masks_for
    from skipwise.positions import (
        CREAM,
        Document,
        FullLength,
        LongRecipe,
        Matched,
        Plain,
        PoSE,
        PositionSampler,
        RandPos,
        Window,
    )
    from skipwise.rope import NTK, AdjustedBase, Linear, Mixed, NoScaling, RopeScaling, YaRN, YaRNRevised

__version__ = "0.1.0"

# Imported when first used: numpy takes a tenth of a second, torch seconds.
_MODULES = {
    "skipwise.data.masked": ("MaskedWindowCollator",),
    "skipwise.data.sentences": ("sentences_of",),
    "skipwise.data.windows": ("WindowCollator",),
    "skipwise.export.adapter": ("load_adapter",),
    "skipwise.export.checkpoint": ("save",),
    "skipwise.lengths": ("Lengths",),
    "skipwise.models.probe": ("probe_attention",),
    "skipwise.models.rope": ("set_rope_scaling",),
    "skipwise.models.windowed": ("masks_for",),
    "skipwise.positions": (
        *("CREAM", "Document", "FullLength", "LongRecipe", "Matched"),
        *("Plain", "PoSE", "PositionSampler", "RandPos", "Window"),
    ),
    "skipwise.rope": ("NTK", "AdjustedBase", "Linear", "Mixed", "NoScaling", "RopeScaling", "YaRN", "YaRNRevised"),
}

__all__ = [
    "CREAM",
    "NTK",
    "AdjustedBase",
    "Document",
    "FullLength",
    "Lengths",
    "Linear",
    "LongRecipe",
    "MaskedWindowCollator",
    "Matched",
    "Mixed",
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
    "load_adapter",
    "masks_for",
    "probe_attention",
    "save",
    "sentences_of",
    "set_rope_scaling",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for module, names in _MODULES.items():
        if name in names:
            globals()[name] = getattr(import_module(module), name)
            return globals()[name]
    if name in ("lengths", "positions", "rope"):
        return import_module(f"skipwise.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
