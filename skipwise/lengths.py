"""The three lengths every part of Skipwise talks about."""

from dataclasses import dataclass

from skipwise.errors import UserError


@dataclass(frozen=True)
class Lengths:
    """Context lengths in tokens.

    Attributes:
        original: Lc, the window the model was first pretrained with.
        train: Lw, the number of tokens in one training window.
        target: Lt, the window wanted.
    """

    original: int
    train: int
    target: int

    def __post_init__(self) -> None:
        if min(self.original, self.train, self.target) < 1:
            raise UserError(
                f"Lengths must be at least 1 token, but are {self}. Use positive lengths.", code="length_below_one"
            )
        if self.train > self.target:
            raise UserError(
                f"The train length must not exceed the target length, but {self.train:,} > {self.target:,}. "
                "Lower the train length (--train-length) or raise the target (--target).",
                code="train_length_above_target",
            )

    @property
    def factor(self) -> float:
        """alpha = Lt / Lc, the extension factor."""
        return self.target / self.original


def parse_length(value: object) -> object:
    """`"32k"` -> 32768 (k means 1,024, m 1,048,576); anything that is not such a string is left alone.

    Raises:
        UserError: for a string that is no length.
    """
    if not isinstance(value, str):
        return value
    text = value.strip().lower().replace("_", "").replace(",", "")
    unit = {"k": 1024, "m": 1024**2}.get(text[-1:], 1)
    number = text[:-1] if unit > 1 else text
    try:
        tokens = float(number) * unit
    except ValueError:
        tokens = -1.0
    if tokens < 1 or tokens != int(tokens):
        raise UserError(
            f"A length is a whole number of tokens such as 32768 or 32k, not {value!r}.", code="malformed_length"
        )
    return int(tokens)


def format_length(tokens: int) -> str:
    """The short form used in tables: 32768 -> `32k`, 1048576 -> `1m`, 1000 -> `1000`; `parse_length` reads it back."""
    for unit, letter in ((1024**2, "m"), (1024, "k")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{letter}"
    return str(tokens)
