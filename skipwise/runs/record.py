"""What a report is made from: a run directory, read, and what came of it in one sentence. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from skipwise.config.files import parse_written, read_yaml
from skipwise.config.run import RunConfig
from skipwise.errors import UserError
from skipwise.evaluation.results import EvalResult
from skipwise.lengths import Lengths
from skipwise.runs.directory import RunDir
from skipwise.utils.files import read_json, read_lines

Row = dict[str, Any]
# Words for the stages of a run.
STAGES = {"original": "untouched", "interpolated": "new RoPE alone", "extended": "extended"}
# The same, in a sentence.
SUBJECTS = {"original": "the untouched model", "interpolated": "the new RoPE alone", "extended": "the extended model"}


@dataclass(frozen=True)
class Run:
    """What a run directory holds.

    Attributes:
        name: for headings and legends.
        directory: its files.
        config: resolved.
        lengths: the three of them.
        results: rows of its evaluations.
        log: of the training.
    """

    name: str
    directory: RunDir
    config: RunConfig
    lengths: Lengths
    results: Sequence[EvalResult]
    log: Sequence[Row]

    def json(self, what: str) -> dict[str, Any]:
        """`plan`, `environment`, `parts`, `rope` or `timings`; {} where it is not there."""
        file = getattr(self.directory, what)
        return read_json(file) if file.is_file() else {}

    @property
    def trained(self) -> bool:
        """Whether its model is written."""
        return (self.directory.model / "config.json").is_file()

    @property
    def steps(self) -> int:
        """Of the training, up to the last that was logged."""
        return max((int(line["step"]) for line in self.log), default=0)


def read_run(directory: RunDir, name: str) -> Run:
    """A run of `skipwise extend`, finished or not.

    Raises:
        UserError: for a directory that is none.
    """
    if directory.models.is_file():
        raise UserError(
            f"A report is of runs of skipwise extend, but {directory.path} is of skipwise evaluate. Its table is "
            f"in {directory.table}.",
            code="evaluation_not_run",
        )
    if not directory.path.is_dir():
        raise UserError(
            f"There is no run {directory.path}. Name the directory that was the --output of skipwise extend.",
            code="run_not_found",
        )
    if not directory.resolved.is_file():
        raise UserError(
            f"{directory.path} is no run of skipwise extend: it has no {directory.resolved.name}. Name the directory "
            "that was its --output.",
            code="not_a_run",
        )
    config = parse_written(read_yaml(directory.resolved))
    original, train = config.lengths.original, config.lengths.train
    assert original is not None and train is not None, "a resolved configuration has all lengths"
    lengths = Lengths(original=original, train=train, target=config.lengths.target)
    return Run(name, directory, config, lengths, directory.read_results(), read_lines(directory.train_log))


def to_do(run: Run) -> list[str]:
    """What a run that is not finished lacks, in words; nothing for one that is."""
    missing = []
    for name, done in run.json("parts").items():
        stage = name.removeprefix("evaluate ")
        if done:
            continue
        if stage in SUBJECTS:
            begun = any(row.stage == stage for row in run.results)
            missing.append(f"{SUBJECTS[stage]} {'measured in part' if begun else 'not measured yet'}")
        elif name == "train" and run.steps < run.config.train.max_steps:
            missing.append(f"{run.steps:,} of {run.config.train.max_steps:,} steps trained")
        else:
            missing.append("the model not written")
    return missing


def verdict(run: Run) -> str:
    """What came of a run, in one sentence."""
    target, original = run.lengths.target, run.lengths.original
    lengths = f"{original:,} to {target:,} tokens"
    if missing := to_do(run):
        return f"{lengths}, not finished: {', '.join(missing)}. The same command with --resume goes on."
    values: dict[tuple[str, str, int | None], float] = {
        (row.stage, row.evaluation, row.context_length): row.value
        for row in run.results
        if row.depth is None and row.metric in ("perplexity", "accuracy") and row.value is not None
    }
    last = "extended" if any(stage == "extended" for stage, _, _ in values) else "interpolated"
    parts = []
    for name, text in (("perplexity", "perplexity {:.4g} (untouched {})"), ("passkey", "{:.0%} of passkeys ({})")):
        after, before = values.get((last, name, target)), values.get(("original", name, target))
        if after is not None:
            form = "{:.0%}" if name == "passkey" else "{:.4g}"
            parts.append(text.format(after, "not measured" if before is None else form.format(before)))
    inside = values.get((last, "perplexity", original)), values.get(("original", "perplexity", original))
    if inside[0] is not None and inside[1]:
        change = inside[0] / inside[1] - 1
        parts.append(f"inside the original window perplexity {'rose' if change > 0 else 'fell'} by {abs(change):.1%}")
    measured = "; ".join(parts) if parts else "nothing was measured at the target"
    return f"{lengths}: {measured}."
