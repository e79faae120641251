"""Where the time of the demo goes: seconds and share of each operator, in training steps and in an evaluation.

    python benchmarks/profile_demo.py

Writes benchmarks/results/profile-demo.json. Run it with nothing beside it.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from skipwise.config.files import parse_config, read_yaml
from skipwise.export.inspection import inspect_run
from skipwise.runs.directory import RunDir
from skipwise.runs.environment import describe_environment
from skipwise.utils.files import write_json
from skipwise.workflows.context import RunContext, open_context
from skipwise.workflows.demo import DEMO
from skipwise.workflows.duration import measure_training
from skipwise.workflows.extend import measured_rows

# Operators that take the most time.
SHOWN = 12
STEPS = 5


def profiled(run: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of a call without a profiler, and the share of each operator with one."""
    run()
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    shares = {event.key: round(event.self_cpu_time_total / total, 3) for event in events[:SHOWN]}
    return {"seconds": round(seconds, 3), "shares": shares}


def train(context: RunContext) -> None:
    """So many passes forward and backward as a run of the demo makes in a step."""
    config = context.run.train
    for _ in range(STEPS):
        measure_training(
            context.model,
            window=context.run.window_length,
            windows=config.per_device_train_batch_size,
            dtype=context.dtype,
            kl_weight=config.kl_weight or 0.0,
            skips=True,
            echoes=bool(config.echo_share),
        )


def evaluate_demo(context: RunContext) -> None:
    """One stage of the demo's evaluation."""
    with tempfile.TemporaryDirectory() as path:
        run = context.run
        for _ in measured_rows(RunDir(Path(path)), context, "original", run.current_length, run.evaluate):
            pass


def main() -> None:
    """Both, into one file."""
    config = parse_config(read_yaml(DEMO))
    _, run = inspect_run(config)
    context = open_context(run, Console(quiet=True))
    found = {
        # A measurement makes two passes.
        f"{2 * STEPS} training steps": profiled(lambda: train(context)),
        "one stage of the evaluation": profiled(lambda: evaluate_demo(context)),
    }
    Console().print(found)
    path = Path(__file__).parent / "results" / "profile-demo.json"
    command = "python benchmarks/profile_demo.py"
    write_json(path, {"command": command, **found, "environment": describe_environment()})


if __name__ == "__main__":
    main()
