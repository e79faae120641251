"""What a user gets to see when the input is wrong: one message, exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input. The message says the rule, the value and the remedy.

    Attributes:
        code: a stable snake_case name of the rule that was broken, e.g. `target_not_above_window`. Messages may be
            reworded; codes stay.
    """

    # Every raise site gives a code. The default is for torch's DataLoader, which rebuilds an exception of a worker
    # process from its message alone.
    def __init__(self, message: str, *, code: str = "user_error") -> None:
        super().__init__(message)
        self.code = code


def nearest(name: str, options: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for a name that is close to one of `options`, else the whole list.

    >>> nearest("pos", ["pose", "randpos"])
    " Did you mean 'pose'?"
    """
    known = sorted(options)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."
