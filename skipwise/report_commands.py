"""The commands that show what is there, or would be: report, explore."""

from pathlib import Path
from typing import Annotated

import typer

from skipwise.errors import UserError
from skipwise.terminal import console


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories of skipwise extend.")],
    output: Annotated[Path | None, typer.Option(help="The page; of a single run report.html in it.")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Also every chart as SVG, PNG and CSV, to this directory.")
    ] = None,
) -> None:
    """Write one page about a run, or about several side by side: charts, tables, cost. It opens offline."""
    from skipwise.report.page import write_figures, write_report
    from skipwise.runs import RunDir

    if output is None and len(runs) > 1:
        raise UserError(
            "The report of several runs belongs to none of them. Say where it goes: --output FILE.html.",
            code="output_required",
        )
    page = output or RunDir(runs[0]).report
    with console.status("drawing"):
        charts = write_report(runs, page)
        if figures is not None:
            write_figures(charts, figures)
    console.print(f"Report: {page}")


def explore(
    run: Annotated[Path | None, typer.Argument(help="A run of skipwise extend, whose model can be asked.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="\\[default: the first free one from 7860]")] = None,
) -> None:
    """Serve a local page: positions, distances, frequencies, cost and YAML of an extension, and a model to ask."""
    try:
        from skipwise.explore import serve
    except ImportError as error:
        raise UserError(
            "explore needs Gradio, which is not installed. Install it with: pip install 'skipwise[explore]'",
            code="package_not_installed",
        ) from error
    serve(run, host, port, console.print)
