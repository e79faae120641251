"""What all commands print to, and how their help is made."""

from typing import Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from skipwise.ranks import is_first


class ErrorConsole(Console):
    """Where errors go.

    Attributes:
        show_origin: whether a user's mistake is shown with the place that found it.
    """

    show_origin = False


# Names of models, documents and files are shown as they are: none of them is markup.
console = Console(quiet=not is_first(), markup=False, highlight=False)
errors = ErrorConsole(stderr=True, markup=False, highlight=False)


class Command(TyperCommand):
    """A command whose help names what there is to choose from; the list of commands then need not import it."""

    def get_params(self, ctx: Any) -> list[Any]:
        """With `{methods}` and the like filled in."""
        from skipwise.config import METHODS
        from skipwise.evaluation.specs import EVALUATIONS
        from skipwise.rope import ROPE_SCALINGS
        from skipwise.sections import name_of

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
