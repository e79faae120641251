"""The commands that show what is there, or would be: report, explore."""

from pathlib import Path
from typing import Annotated

import typer

from skipwise.cli.terminal import console
from skipwise.errors import UserError


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories of skipwise extend.")],
    output: Annotated[
        Path | None, typer.Option(help="Write the page to this file.  \\[default: report.html of a single run]")
    ] = None,
    charts: Annotated[
        Path | None, typer.Option("--figures", help="Also write every chart as SVG, PNG and CSV to this directory.")
    ] = None,
) -> None:
    """Write one HTML page about one run or several: charts, tables, cost. It opens offline."""
    from skipwise.report.page import write_charts, write_report
    from skipwise.runs.directory import RunDir

    if output is None and len(runs) > 1:
        raise UserError(
            "The report of several runs belongs to none of them. Say where it goes: --output FILE.html.",
            code="output_required",
        )
    page = output or RunDir(runs[0]).report
    with console.status("drawing"):
        written = write_report(runs, page)
        if charts is not None:
            write_charts(written, charts)
    console.print(f"Report: {page}")


def explore(
    run: Annotated[Path | None, typer.Argument(help="Run of skipwise extend whose models answer prompts.")] = None,
    host: Annotated[str, typer.Option(help="Listen at this address; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Listen at this port.  \\[default: the first free one from 7860]")
    ] = None,
) -> None:
    """Serve a local page to try settings of an extension on, and to ask a model before and after."""
    try:
        from skipwise.report.explore import serve
    except ImportError as error:
        raise UserError(
            "explore needs Gradio, which is not installed. Install it with: pip install 'skipwise[explore]'",
            code="package_not_installed",
        ) from error
    serve(run, host, port, console.print)


def list_(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """What can be chosen by name."""
    import json
    from typing import get_args

    from skipwise.config.run import METHODS
    from skipwise.data.builtin import PYTHON
    from skipwise.data.config import PREFIX, PRESETS
    from skipwise.evaluation.specs import EVALUATIONS
    from skipwise.evaluation.training_free import TRAINING_FREE
    from skipwise.models.locate import TINY
    from skipwise.positions import SAMPLERS
    from skipwise.report.tables import pairs_table
    from skipwise.rope import ROPE_SCALINGS
    from skipwise.training.config import Tracker
    from skipwise.utils.sections import name_of

    classes = {"positions": SAMPLERS, "rope": ROPE_SCALINGS, "evaluate": EVALUATIONS}
    described = {
        title: {name_of(cls): (cls.__doc__ or "").strip().splitlines()[0] for cls in own}
        for title, own in classes.items()
    } | {"training_free": dict(TRAINING_FREE)}
    named = {
        "models": [TINY, "hub ids, directories, .gguf files"],
        "methods": list(METHODS),
        "data": [PYTHON, *(PREFIX + name for name in PRESETS), "files, directories, hub datasets"],
        "trackers": list(get_args(Tracker)),
        "engines": ["train.fsdp", "train.deepspeed"],
        "conversions": ["gptj", "baichuan"],
    }
    if as_json:
        print(json.dumps({**described, **named}))
        return
    for title, own in described.items():
        heading = "training-free methods, for evaluate MODEL+NAME" if title == "training_free" else title
        console.print(pairs_table(heading, list(own.items())))
        console.print()
    console.print(pairs_table("by name alone", [(title, ", ".join(names)) for title, names in named.items()]))
