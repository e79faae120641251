"""A report as one HTML file that needs nothing else, and its charts as pictures and CSV."""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from skipwise import __version__
from skipwise.config.files import to_yaml
from skipwise.evaluation.results import retrieval_warnings
from skipwise.export.card import shown_name
from skipwise.report.charts import charts_of
from skipwise.report.vega import Chart
from skipwise.runs.directory import RunDir
from skipwise.runs.record import Run, read_run, to_do, verdict
from skipwise.utils.files import write_text

# Draws what is in #specs, in the colours that the reader prefers, again when these change.
SCRIPT = """
const specs = JSON.parse(document.getElementById("specs").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const config = () => {
  const text = dark.matches ? "#d5d9df" : "#2b2f36", line = dark.matches ? "#353a42" : "#e3e6ea";
  const axis = {labelColor: text, titleColor: text, domainColor: line, tickColor: line, gridColor: line};
  return {background: "transparent", axis, view: {stroke: line},
    legend: {labelColor: text, titleColor: text, orient: "bottom", labelLimit: 400},
    header: {labelColor: text, labelLimit: 400}};
};
const options = {renderer: "svg", actions: {export: true, source: false, compiled: false, editor: false}};
const draw = () => Promise.all(Object.entries(specs).map(
  ([key, spec]) => vegaEmbed("#chart-" + key, spec, {...options, config: config()})));
await draw();
document.body.dataset.drawn = "yes";
dark.addEventListener("change", draw);
"""


@dataclass(frozen=True)
class Card:
    """The summary of a run, for the page."""

    name: str
    verdict: str
    warnings: Sequence[str]
    facts: Sequence[tuple[str, str]]
    command: str
    config: str
    environment: str


def write_report(directories: Sequence[Path], output: Path) -> list[Chart]:
    """Write the page of one run or of several side by side.

    Args:
        directories: of runs.
        output: the HTML file.

    Returns:
        Its charts.

    Raises:
        UserError: for a directory that is no run.
    """
    names = [path.name or str(path) for path in directories]
    names = [name if names.count(name) == 1 else str(path) for name, path in zip(names, directories, strict=True)]
    runs = [read_run(RunDir(path), name) for path, name in zip(directories, names, strict=True)]
    charts = charts_of(runs)
    write_text(output, render(" and ".join(names), [_card(run) for run in runs], charts))
    return charts


def render(title: str, cards: Sequence[Card], charts: Sequence[Chart]) -> str:
    """The page. All text is escaped; what is drawn is JSON in which no tag can end."""
    environment = Environment(loader=PackageLoader("skipwise", "report"), autoescape=True, undefined=StrictUndefined)
    specs = json.dumps({chart.key: chart.spec for chart in charts if chart.spec})
    shown = []
    for chart in charts:
        # Words are on the left of their column, numbers on its right.
        columns = {key: any(isinstance(row.get(key), str) for row in chart.rows) for key in _columns(chart)}
        table = [[(_cell(row.get(key)), words) for key, words in columns.items()] for row in chart.rows]
        shown.append({**vars(chart), "columns": columns, "table": table})
    return environment.get_template("report.html.jinja").render(
        title=title,
        version=__version__,
        cards=cards,
        charts=shown,
        specs=Markup(specs.replace("<", "\\u003c")),
        script=Markup(vl_convert.javascript_bundle(SCRIPT)),
    )


def _card(run: Run) -> Card:
    plan, timings, environment = run.json("plan"), run.json("timings"), run.json("environment")
    train, lengths = run.config.train, run.lengths
    seconds, so_far = sum(timings.values()), " so far" if to_do(run) else ""
    training = "none: only the RoPE is rescaled"
    if run.config.trains:
        steps, tokens = f"{train.max_steps:,} steps", plan.get("train_tokens") or 0
        if not run.trained and run.steps < train.max_steps:
            steps, tokens = f"{run.steps:,} of {steps}", tokens * run.steps // train.max_steps
        training = f"{steps} at {train.learning_rate:g}, {tokens:,} tokens"
    facts = [
        ("model", shown_name(run.config.model.path)),
        ("method, RoPE", f"{run.config.method}, {run.config.rope.name}"),
        ("window", f"{lengths.original:,} to {lengths.target:,} tokens, trained on windows of {lengths.train:,}"),
        ("text", ", ".join(shown_name(source.source) for source in run.config.data.sources)),
        ("training", training),
        (
            "time",
            f"{_duration(seconds)}{so_far} on {environment.get('processor') or 'an unknown machine'}, "
            "evaluation included",
        ),
    ]
    return Card(
        name=run.name,
        verdict=verdict(run),
        warnings=retrieval_warnings(list(run.results), run.lengths.original),
        facts=facts,
        command=f"skipwise {str(environment.get('command', '')).partition(' ')[2]}",
        config=to_yaml(run.config),
        environment=json.dumps(environment, indent=2),
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.1f} minutes"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _columns(chart: Chart) -> list[str]:
    return list(dict.fromkeys(key for row in chart.rows for key in row))


def write_charts(charts: Sequence[Chart], directory: Path) -> None:
    """Every chart as SVG, PNG and CSV."""
    for chart in charts:
        columns = _columns(chart)
        text = StringIO()
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(chart.rows)
        write_text(directory / f"{chart.key}.csv", text.getvalue())
        if chart.spec is not None:
            spec = _of_its_own(chart.spec)
            write_picture(chart, directory / f"{chart.key}.svg")
            (directory / f"{chart.key}.png").write_bytes(vl_convert.vegalite_to_png(spec, scale=2))


def write_picture(chart: Chart, path: Path) -> None:
    """A chart as an SVG file, which is the same for the same chart."""
    assert chart.spec is not None, "a table is no picture"
    svg = vl_convert.vegalite_to_svg(_of_its_own(chart.spec))
    # Identifiers are counted over all pictures of a process.
    names = dict.fromkeys(re.findall(r'id="([^"]+)"', svg))
    numbers = {name: f"id{number}" for number, name in enumerate(names)}
    write_text(path, re.sub(r'(id="|url\(#)([^")]+)', lambda found: found[1] + numbers.get(found[2], found[2]), svg))


def _of_its_own(spec: dict[str, Any]) -> dict[str, Any]:
    """A chart that is as wide as its page, without one."""
    return {**spec, "width": 640} if spec.get("width") == "container" else spec
