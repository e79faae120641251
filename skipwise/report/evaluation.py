"""The page of an evaluation: models side by side, by the same charts as a run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skipwise.evaluation.metrics import metric_of
from skipwise.export.card import shown_name
from skipwise.lengths import format_length
from skipwise.report.charts import difference_chart, result_charts
from skipwise.report.page import Card, render
from skipwise.report.tables import Columns, Differences
from skipwise.report.vega import Chart
from skipwise.utils.files import write_text


def write_evaluation_page(
    columns: Columns,
    first: str,
    differences: Differences,
    *,
    command: str,
    config: str,
    environment: Mapping[str, Any],
    output: Path,
) -> list[Chart]:
    """Write the page of an evaluation directory.

    Args:
        columns: rows by model.
        first: model that others are compared with.
        differences: of each other model, by evaluation and context length.
        command: command that repeats the evaluation.
        config: configuration, as YAML.
        environment: machine and packages.
        output: the HTML file.

    Returns:
        Its charts.
    """
    series = [(name, row) for name, rows in columns.items() for row in rows]
    charts = [*result_charts(series), *_differences(first, differences)]
    names = ", ".join(map(shown_name, columns))
    data = dict.fromkeys(row.data for _, row in series)
    failed = {f"{name}: {row.evaluation}: {row.reason}" for name, row in series if row.status == "failed"}
    card = Card(
        name=names,
        verdict=f"{len(columns)} {'model' if len(columns) == 1 else 'models'}, measured on the same prompts and texts.",
        warnings=sorted(failed),
        facts=[("models", names), ("measured on", "; ".join(data)), ("compared with", shown_name(first))],
        command=command,
        config=config,
        environment=json.dumps(environment, indent=2),
    )
    write_text(output, render(f"Evaluation of {names}", [card], charts))
    return charts


def _differences(first: str, differences: Differences) -> list[Chart]:
    """The chart of differences, one panel for each evaluation and context length; none for a single model."""
    rows = [
        {"figure": f"{name.replace('_', ' ')}{'' if length is None else f' at {format_length(length)}'}",
         "method": model, "difference": own["value"], "low": own["interval_low"], "high": own["interval_high"],
         "none": 0.0,
         "better": "higher" if metric_of(own["metric"]).higher_is_better else "lower"}
        for model, by_key in differences.items()
        for (name, length), own in sorted(by_key.items(), key=lambda item: (item[0][0], item[0][1] or 0))
    ]  # fmt: skip
    caption = "Of perplexities lower is better, of scores higher. Bars are 95 % intervals of paired differences."
    return [difference_chart(first, rows, caption)] if rows else []
