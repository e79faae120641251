"""The command line, run in this process."""

import contextlib
import io
import json
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from skipwise.cli import main as cli
from skipwise.cli.terminal import console, errors
from skipwise.evaluation.results import EvalResult


def skipwise(*arguments: object, code: int = 0) -> str:
    """Run `skipwise ARGUMENTS` and return all that it prints. Checks the exit code, and that there is no traceback."""
    printed = io.StringIO()
    quiet, origin, verbosity = console.quiet, errors.show_origin, transformers_logging.get_verbosity()
    random = torch.get_rng_state()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            found = cli.run(lambda: cli.app([str(argument) for argument in arguments]))
    finally:
        console.quiet, errors.show_origin = quiet, origin
        transformers_logging.set_verbosity(verbosity)
        torch.set_rng_state(random)
    output = printed.getvalue()
    assert found == code, output
    assert "--debug" in arguments or "Traceback" not in output
    return output


def error_code(output: str) -> str:
    """The code of the one error that a command printed."""
    assert output.count("Error:") == 1, output
    return output.rstrip().rpartition("[")[2].removesuffix("]")


def rows_of(run: Path) -> list[EvalResult]:
    """The results of a run or of an evaluation."""
    return [EvalResult(**json.loads(line)) for line in (run / "results.jsonl").read_text().splitlines()]
