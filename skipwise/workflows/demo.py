"""The demo: the embedded model extended by PoSE, and the controls that show what each part of the method does."""

import shlex
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from skipwise.config.files import merge, parse_config, read_yaml
from skipwise.config.run import method_overrides
from skipwise.evaluation.results import EvalResult
from skipwise.report.tables import comparison_markdown, comparison_table, stage_columns
from skipwise.runs.directory import RunDir
from skipwise.utils.files import write_text
from skipwise.workflows.extend import extend

DEMO = Path(__file__).with_name("demo.yaml")
# What each control changes in `demo.yaml`. Each is evaluated once: the untouched model is that of the main run.
CONTROLS: dict[str, dict[str, Any]] = {
    "interpolate": {**method_overrides("interpolate"), "stages": ["interpolated"]},
    "plain": {**method_overrides("plain"), "train": {"echo_share": 0.0}, "stages": ["extended"]},
}


def run_demo(output: Path, console: Console, resume: bool = False, controls: bool = False) -> list[Path]:
    """Run `demo.yaml` in `output`, and its controls in directories below it; print one table.

    Args:
        output: the run directory.
        console: where progress and the table go.
        resume: go on with a demo that was begun.
        controls: run the controls as well.

    Returns:
        The run directories, that of the main run first.
    """
    values = read_yaml(DEMO)
    rows = _run(values, output, DEMO.read_text(encoding="utf-8"), console, resume)
    stages = stage_columns(rows, trained="pose")
    columns = {"original": stages["original"]}
    runs = [output]
    for name, changes in CONTROLS.items():
        control = merge(values, changes)
        if controls:
            console.rule(f"control: {name}")
            given = yaml.safe_dump(control, sort_keys=False)
            columns[name] = _run(control, output / name, given, console, resume)
        elif found := RunDir(output / name).read_results():  # of an earlier call
            columns[name] = found
        if name in columns:
            runs.append(output / name)
    columns["pose"] = stages["pose"]
    config = parse_config(values)
    console.print(comparison_table(f"Embedded model, 256 -> {config.lengths.target:,} tokens", columns))
    write_text(output / "table.md", comparison_markdown(columns))
    if len(runs) == 1:
        more = shlex.join(["skipwise", "demo", "--output", str(output), "--resume", "--controls"])
        console.print(f"To compare with the new RoPE alone and with training without skips: {more}", soft_wrap=True)
    return runs


def _run(values: dict[str, Any], output: Path, given: str, console: Console, resume: bool) -> list[EvalResult]:
    begun = RunDir(output).resolved.exists()  # where there is nothing to resume, a demo simply begins
    return extend(parse_config(values), output, given=given, console=console, resume=resume and begun)
