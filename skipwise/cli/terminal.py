"""What all commands print to, and how their help is made."""

import logging
import tempfile
import traceback
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from skipwise.utils.distributed import is_first


class ErrorConsole(Console):
    """Where errors go.

    Attributes:
        show_origin: whether an error is shown with the place that found it.
    """

    show_origin = False


OF_ALL = ("--quiet", "--debug")
# Names of models, documents and files are shown as they are: none of them is markup.
console = Console(quiet=not is_first(), markup=False, highlight=False)
errors = ErrorConsole(stderr=True, markup=False, highlight=False)


def unexpected(error: Exception) -> str:
    """What to say of an error that nobody expected. Its traceback, perhaps all there is of it, goes into a file."""
    with tempfile.NamedTemporaryFile("w", prefix="skipwise-", suffix=".txt", delete=False, encoding="utf-8") as file:
        traceback.print_exception(error, file=file)
    return (
        f"{type(error).__name__}: {error}. Skipwise did not expect this. Its traceback is in {file.name}; "
        "skipwise --debug prints it. What is finished is kept, and the same command goes on (extend and demo with "
        "--resume)."
    )


class OneLine(logging.Filter):
    """Of a hub that does not answer, one line in place of two for every try; what it does answer is left as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.said = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line of the hub's client is shown."""
        words = record.getMessage()
        if errors.show_origin or "HTTP Error" in words:
            return True
        if "Retrying in" in words:
            return not self.said
        if "thrown while requesting" not in words:
            return True
        self.said, before = True, self.said
        record.msg, record.args = f"The hub does not answer, and is asked again a few times: {words}", ()
        return not before


class Program(TyperGroup):
    """The commands. Options of all of them may be given after a command as well as before it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """With `--quiet` and `--debug` in front, if nothing says that options have ended."""
        end = args.index("--") if "--" in args else len(args)
        of_all = [argument for argument in args[:end] if argument in OF_ALL]
        others = [argument for argument in args[:end] if argument not in OF_ALL]
        return super().parse_args(ctx, of_all + others + args[end:])


class Command(TyperCommand):
    """A command whose help names what there is to choose from; the list of commands then need not import it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.epilog = f"Like every command, it also takes {' and '.join(OF_ALL)}."

    def get_params(self, ctx: Any) -> list[Any]:
        """With `{methods}` and the like filled in."""
        from skipwise.config.run import METHODS
        from skipwise.evaluation.specs import EVALUATIONS
        from skipwise.rope import ROPE_SCALINGS
        from skipwise.utils.sections import name_of

        names = {
            "{methods}": METHODS,
            "{scalings}": [name_of(cls) for cls in ROPE_SCALINGS],
            "{evaluations}": [name_of(cls) for cls in EVALUATIONS],
        }
        for parameter in self.params:
            for place, choices in names.items():
                if isinstance(parameter, typer.core.TyperOption) and parameter.help:
                    parameter.help = parameter.help.replace(place, ", ".join(choices))
        return super().get_params(ctx)
