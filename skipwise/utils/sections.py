"""How a frozen dataclass becomes a section of the YAML configuration."""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

# Read by pydantic wherever the class is used as a field. (Its strict mode would refuse a mapping.)
SECTION_CONFIG = {"extra": "forbid", "allow_inf_nan": False}

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def section(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass whose unknown keys pydantic refuses.

    A class that can be chosen by name declares `name: Literal["x"] = "x"`, which is the tag of the
    union it belongs to.
    """
    cls.__pydantic_config__ = SECTION_CONFIG  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def name_of(cls: type[Any]) -> str:
    """The name a section is chosen by, e.g. `"pose"`."""
    return str(next(f.default for f in dataclasses.fields(cls) if f.name == "name"))
