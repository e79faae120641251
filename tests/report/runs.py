"""A run directory as `extend` leaves one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skipwise.config.files import parse_config, to_yaml
from skipwise.config.resolve import resolve
from skipwise.evaluation.results import EvalResult
from skipwise.lengths import Lengths
from skipwise.runs.directory import RunDir
from skipwise.utils.files import append_line, write_json, write_text

HACK = "document.body.dataset.hacked='yes'"

HOSTILE = f'</script><script>{HACK}</script><img src=x onerror="{HACK}">'

LENGTHS = Lengths(original=256, train=256, target=1024)


def row(stage: str, evaluation: str, length: int, value: float | None, depth: float | None = None) -> EvalResult:
    metric = "accuracy" if evaluation == "passkey" else "perplexity" if evaluation == "perplexity" else "score"
    near = None if value is None else value * 0.9
    far = None if value is None else value * 1.1
    return EvalResult(
        stage=stage, evaluation=evaluation, data=HOSTILE, context_length=length, depth=depth, metric=metric,  # type: ignore[arg-type]
        value=value, stderr=None, interval_low=near, interval_high=far, num_samples=10,
        status="ok" if value is not None else "failed", reason=None, model=HOSTILE,
    )  # fmt: skip


def made_run(path: Path, **train: Any) -> Path:
    """A run directory as `extend` leaves one, with results of every kind."""
    values = {
        "model": {"path": "builtin:tiny"},
        "lengths": {"target": 1024},
        "rope": {"name": "yarn", "beta_fast": 4},
        "data": {"source": HOSTILE},
        "train": {"max_steps": 20, **train},
    }
    run, config = RunDir(path), resolve(parse_config(values), 256, 256)
    write_text(run.resolved, to_yaml(config.as_config()))
    plan = {"steps": 5, "train_tokens": 5120, "train_flops": 4.8e11, "peak_memory": 8e8}
    write_json(run.plan, {**plan, "windows_per_step": 4, "window_tokens": 256})
    write_json(run.timings, {"evaluate original": 10.0, "train": 40.0})
    write_json(run.rope, {})
    write_text(run.model / "config.json", "{}")
    write_json(run.parts, dict.fromkeys(config.steps, True))
    write_json(run.environment, {"command": f"skipwise extend {HOSTILE}", "processor": HOSTILE})
    for step in range(1, 6):
        entry = {"step": step, "loss": 3.0 - step / 10, "learning_rate": 1e-4, "grad_norm": 1.0}
        peak = None if step == 1 else 10**9  # as on a device that does not say
        append_line(run.train_log, {**entry, "tokens_per_second": 500.0, "peak_memory": peak})
    rows = []
    for stage, shift in (("original", 0.0), ("interpolated", 1.0), ("extended", -1.0)):
        rows += [row(stage, "perplexity", length, 20.0 + shift) for length in (256, 512, 1024)]
        rows += [row(stage, "passkey", length, 0.5) for length in (256, 512, 1024)]
        rows += [row(stage, "passkey", length, 0.5, depth) for length in (256, 1024) for depth in (0.1, 0.5, 0.9)]
        rows += [row(stage, "ruler/vt", length, 0.3) for length in (256, 1024)]
    rows.append(row("extended", "perplexity", 2048, None))
    run.add_results(rows)
    return path
