"""The command line."""

import logging
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any

import typer

from skipwise import __version__
from skipwise.cli import config_commands, model_commands, plan_commands, report_commands, run_commands
from skipwise.cli.terminal import Command, OneLine, Program, console, errors, unexpected
from skipwise.errors import UserError, of_machine
from skipwise.utils.distributed import is_first, joined, leave_processes, lost_process, rank

app = typer.Typer(
    cls=Program,
    help="Extend the context window of a language model by training on short windows.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
INTERRUPTED = 130  # what Typer makes of Ctrl-C
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: schedulers may try again


def _show_version(wanted: bool) -> None:
    if wanted:
        console.print(__version__)
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was found.")] = False,
) -> None:
    """Options of all commands."""
    console.quiet |= quiet
    errors.show_origin = debug


for command in (
    run_commands.extend,
    plan_commands.plan,
    plan_commands.coverage,
    run_commands.search,
    run_commands.evaluate,
    run_commands.study,
    report_commands.report,
    report_commands.explore,
    model_commands.doctor,
    model_commands.convert,
    model_commands.export,
    run_commands.demo,
):
    app.command(cls=Command)(command)
app.command("list", cls=Command)(report_commands.list_)
app.add_typer(config_commands.app, name="config")


def main() -> None:
    """Run a command; turn a user's mistake into one message and exit code 2."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says on every CPU that it could be faster
    logging.getLogger("huggingface_hub.utils._http").addFilter(OneLine())
    signal.signal(signal.SIGTERM, _stop)  # a training puts its own in this place, which saves first
    code = run(app)
    if code in (0, STOPPED):  # after an error others may still wait for this process; its launcher ends them
        leave_processes(code)
    sys.exit(code)


def _stop(number: int, frame: FrameType | None) -> None:
    """What is finished is written already, so the process can end where it is."""
    raise SystemExit(STOPPED)


def _refuse(error: UserError) -> int:
    """Print a mistake in the input, or a condition of the machine; the exit code."""
    if errors.show_origin:
        errors.print_exception()
    if is_first() or joined():  # before, every process finds the same
        errors.print("Error:", style="red", end=" ")
        of = "" if is_first() else f"process {rank()}: "
        errors.print(f"{of}{error} [{error.code}]", soft_wrap=True)
    return 2


def run(command: Callable[[], Any]) -> int:
    """The exit code: 0 done, 2 wrong input or a file that cannot be used, 75 stopped after saving, 1 unexpected."""
    try:
        command()
    except UserError as error:
        return _refuse(error)
    except SystemExit as ended:
        if ended.code in (INTERRUPTED, STOPPED):
            word = "Interrupted" if ended.code == INTERRUPTED else "Stopped"
            errors.print(f"{word}. The same command goes on (extend and demo with --resume).")
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except Exception as error:
        if type(error).__name__ == "PreemptedError":  # its module imports what most commands do not need
            if is_first():
                errors.print(str(error), soft_wrap=True)
            return STOPPED
        if lost_process(error):
            errors.print(
                f"Error: process {rank()}: another process of this run, or its host, is gone ({error}). Checkpoints "
                "are as they were; the same command on all hosts goes on with --resume.",
                soft_wrap=True,
            )
            return STOPPED
        condition = of_machine(error)
        if condition is not None:
            return _refuse(condition)
        if errors.show_origin:
            raise
        errors.print(f"Error: {unexpected(error)}", soft_wrap=True)
        return 1
    return 0
