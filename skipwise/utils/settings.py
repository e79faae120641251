"""Types of values that sections of the configuration share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from skipwise.lengths import parse_length


def expand_name(value: object) -> object:
    """`yarn` is short for `{name: yarn}`."""
    return {"name": value} if isinstance(value, str) else value


def _named(default: str) -> Callable[[object], object]:
    """`expand_name`, with a name for a section that only sets other keys."""

    def expand(value: object) -> object:
        value = expand_name(value)
        return {"name": default, **value} if isinstance(value, dict) else value

    return expand


ByName = Field(discriminator="name")


def _to_float(value: object) -> object:
    """YAML 1.1 reads `1e-5` as a string; people mean the number."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


Number = Annotated[float, BeforeValidator(_to_float, json_schema_input_type=float | str)]

Share = Annotated[Number, Field(ge=0.0, le=1.0)]

# What numpy takes.
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """A part of the configuration: frozen, and strict about keys and types."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


Length = Annotated[int, BeforeValidator(parse_length, json_schema_input_type=int | str), Field(ge=1)]
