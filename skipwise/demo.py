"""The demo: the embedded model extended by PoSE, beside what one would get without it."""

from pathlib import Path

import yaml
from rich.console import Console

from skipwise.config_files import merge, parse_config, read_yaml
from skipwise.evaluation.specs import EvalResult
from skipwise.extension import extend
from skipwise.report.table import comparison_markdown, comparison_table, stage_columns
from skipwise.runs import RunDir, write_text

DEMO = Path(__file__).with_name("demo.yaml")
# Trained like the demo but for the skips; measured after training only, since before it is the same model.
CONTROL = {"positions": {"name": "plain"}, "train": {"echo_share": 0.0}, "stages": ["extended"]}


def run_demo(output: Path, console: Console, resume: bool) -> list[EvalResult]:
    """Run `demo.yaml` in `output` and its control in `output/plain`, and print one table.

    Returns:
        The rows of the main run.
    """
    values = read_yaml(DEMO)
    control = merge(values, CONTROL)
    console.print(
        "The demo trains the embedded model twice, with skips and as a control without, and measures both: about ten "
        "minutes on two cores."
    )
    rows = extend(
        parse_config(values), output, given=DEMO.read_text(), console=console, resume=resume and _begun(output)
    )
    console.rule("control: the same training without skips")
    plain = extend(
        parse_config(control),
        output / "plain",
        given=yaml.safe_dump(control, sort_keys=False),
        console=console,
        resume=resume and _begun(output / "plain"),
    )
    stages = stage_columns(rows, trained="pose")
    columns = {
        "original": stages["original"],
        "interpolate": stages["interpolated"],
        "plain": plain,
        "pose": stages["pose"],
    }
    config = parse_config(values)
    console.print(comparison_table(f"Embedded model, 256 -> {config.lengths.target:,} tokens", columns))
    write_text(output / "table.md", comparison_markdown(columns))
    return rows


def _begun(output: Path) -> bool:
    """Whether there is a run to resume; where there is none, a demo simply begins."""
    return RunDir(output).resolved.exists()
