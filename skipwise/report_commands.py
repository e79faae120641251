"""The commands that show what is there: report."""

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
        raise UserError("The report of several runs belongs to none of them. Say where it goes: --output FILE.html.")
    page = output or RunDir(runs[0]).report
    with console.status("drawing"):
        charts = write_report(runs, page)
        if figures is not None:
            write_figures(charts, figures)
    console.print(f"Report: {page}")
