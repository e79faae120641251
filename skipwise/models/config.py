"""Settings of the model."""

from __future__ import annotations

from typing import Literal

from skipwise.utils.settings import Section


class ModelConfig(Section):
    """Which model, and how it is computed.

    Attributes:
        path: directory, hub id, `.gguf` file, or `builtin:tiny`.
        dtype: compute dtype. Weights are kept in float32 while training (small updates vanish in
            bfloat16). `auto` takes bfloat16 where the hardware multiplies it natively.
        attn_implementation: as in transformers; None leaves the choice to it.
        trust_remote_code: run code that comes with the model. Off unless asked for.
        revision: of a hub model.
    """

    path: str
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None
