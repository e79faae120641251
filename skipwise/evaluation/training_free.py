"""Ways to read beyond the window that cost no training, to compare extended models with. No torch.

`MODEL+NAME` or `MODEL+NAME:NUMBER` is a model that reads so, in `skipwise evaluate`; in a study it is `untouched+NAME`.
"""

from dataclasses import dataclass
from pathlib import Path

from skipwise.errors import UserError, nearest

# What the number of each is, and where it is from.
TRAINING_FREE = {
    "dynamic-ntk": "NTK scaling by the length of the text itself; takes no number",
    "self-extend": "far positions in groups of so many tokens (arXiv 2401.01325), 8 unless said",
    "sinks": "the first tokens and the last N alone, the former as if N away (arXiv 2308.16137, 2309.17453)",
    "memory": "as sinks, with those N blocks of 64 tokens between that are like the query (arXiv 2402.04617)",
}
MOST = 1_000_000


@dataclass(frozen=True)
class TrainingFree:
    """One of `AIDS`, with its number; None for its default."""

    name: str
    number: int | None = None


def split_training_free(model: str) -> tuple[str, TrainingFree | None]:
    """`"path+self-extend:16"` as path and training-free method.

    Raises:
        UserError: for a training-free method or number that does not exist.

    >>> split_training_free("org/model+sinks:1024")
    ('org/model', TrainingFree(name='sinks', number=1024))
    >>> split_training_free("org/c++")
    ('org/c++', None)
    """
    path, plus, named = model.rpartition("+")
    if not plus or not path or path.endswith("+") or "/" in named or Path(model).expanduser().exists():
        return model, None
    name, colon, number = named.partition(":")
    if name not in TRAINING_FREE:
        if nearest(name, TRAINING_FREE).startswith(" Known"):  # part of a name, more likely
            return model, None
        raise UserError(
            f"There is no training-free method {name!r} (of {model}).{nearest(name, TRAINING_FREE)}",
            code="unknown_training_free_method",
        )
    if colon and (not number.isdecimal() or not 1 <= int(number) <= MOST or name == "dynamic-ntk"):
        raise UserError(
            f"{model}: behind + stands NAME or NAME:NUMBER, the number from 1 to {MOST:,}. {name}: "
            f"{TRAINING_FREE[name]}.",
            code="malformed_training_free_method",
        )
    return path, TrainingFree(name, int(number) if number else None)
