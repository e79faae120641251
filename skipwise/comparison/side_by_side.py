"""What an evaluation directory holds, ready to be shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from skipwise.comparison.ledger import FigureKey
from skipwise.evaluation.figures import Example, Figure, difference
from skipwise.evaluation.specs import EvalResult
from skipwise.runs import RunDir, figure_of, read_json


@dataclass(frozen=True)
class SideBySide:
    """Everything in an evaluation directory, ready to be shown.

    Attributes:
        columns: rows by model.
        first: the model that others are compared with.
        differences: of each other model, by evaluation (or `suite/task`) and context length.
    """

    columns: dict[str, list[EvalResult]]
    first: str
    differences: dict[str, dict[FigureKey, Figure]]


def side_by_side(output: Path, models: Sequence[str] | None = None, asked: set[FigureKey] | None = None) -> SideBySide:
    """What a directory holds.

    Args:
        output: an evaluation directory.
        models: only these, in this order; None for all.
        asked: only these figures; None for all.
    """
    run = RunDir(output)
    known = read_json(run.models)
    shorts = {name: known[name]["short"] for name in (known if models is None else models)}
    rows = [row for row in run.read_results() if asked is None or figure_of(row) in asked]
    columns = {short: [row for row in rows if row.model == name] for name, short in shorts.items()}
    suites = dict.fromkeys(row.evaluation.partition("/")[0] for row in rows)
    shown = {(row.evaluation, row.context_length) for row in rows}
    examples = {
        short: {suite: _grouped(suite, run.examples(short).read(suite)) for suite in suites}
        for short in shorts.values()
    }
    first, *others = shorts.values()
    differences: dict[str, dict[FigureKey, Figure]] = {}
    for short in others:
        for suite in suites:
            for key, own in examples[short][suite].items():
                figure = difference(examples[first][suite].get(key, []), own)
                if figure is not None and key in shown:
                    differences.setdefault(short, {})[key] = figure
    return SideBySide(columns, first, differences)


def _grouped(suite: str, examples: list[Example]) -> dict[FigureKey, list[Example]]:
    """Examples by evaluation and length; of a suite by task, and where its tasks share one score, all together."""
    groups: dict[FigureKey, list[Example]] = {}
    for example in examples:
        if "score" not in example and "nll" not in example:
            continue
        names = [suite] if suite != "harness" else []
        if "task" in example:
            names.append(f"{suite}/{example['task']}")
        for name in names:
            groups.setdefault((name, example["context_length"]), []).append(example)
    return groups
