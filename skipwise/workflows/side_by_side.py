"""What an evaluation directory holds, ready to be shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from skipwise.evaluation.results import EvalResult, ResultKey, result_key
from skipwise.evaluation.statistics import Example, Result, difference
from skipwise.runs.directory import RunDir
from skipwise.utils.files import read_json


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
    differences: dict[str, dict[ResultKey, Result]]


def side_by_side(output: Path, models: Sequence[str] | None = None, asked: set[ResultKey] | None = None) -> SideBySide:
    """What a directory holds.

    Args:
        output: an evaluation directory.
        models: only these, in this order; None for all.
        asked: only these results; None for all.
    """
    run = RunDir(output)
    known = read_json(run.models)
    shorts = {name: known[name]["short"] for name in (known if models is None else models)}
    rows = [row for row in run.read_results() if asked is None or result_key(row) in asked]
    columns = {short: [row for row in rows if row.model == name] for name, short in shorts.items()}
    suites = dict.fromkeys(row.evaluation.partition("/")[0] for row in rows)
    shown = {(row.evaluation, row.context_length) for row in rows}
    examples = {
        short: {suite: _grouped(suite, run.examples(short).read(suite)) for suite in suites}
        for short in shorts.values()
    }
    first, *others = shorts.values()
    differences: dict[str, dict[ResultKey, Result]] = {}
    for short in others:
        for suite in suites:
            for key, own in examples[short][suite].items():
                result = difference(examples[first][suite].get(key, []), own)
                if result is not None and key in shown:
                    differences.setdefault(short, {})[key] = result
    return SideBySide(columns, first, differences)


def _grouped(suite: str, examples: list[Example]) -> dict[ResultKey, list[Example]]:
    """Examples by evaluation and length; of a suite by task, and where its tasks share one score, all together."""
    groups: dict[ResultKey, list[Example]] = {}
    for example in examples:
        if "score" not in example and "nll" not in example:
            continue
        names = [suite] if suite != "harness" else []
        if "task" in example:
            names.append(f"{suite}/{example['task']}")
        for name in names:
            groups.setdefault((name, example["context_length"]), []).append(example)
    return groups
