"""What it takes until a model is good at its target length: PoSE by train length and chunks, beside full length.

    python benchmarks/time_to_quality.py                      # all recipes; those that have rows are left out
    python benchmarks/time_to_quality.py pose-64-2-300-0.001   # some of them, as in another process
    python benchmarks/time_to_quality.py --seconds            # what a step of each takes, on a free machine

The embedded model from 256 to 4,096 tokens. Perplexity and passkey are measured ten times over a training; the
trainings may share the machine, since time is steps times what a step takes alone, which `--seconds` measures.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from skipwise.config.files import merge, parse_config, read_yaml
from skipwise.config.resolve import resolve
from skipwise.config.run import RunConfig
from skipwise.evaluation.passkey import Passkey
from skipwise.evaluation.perplexity import Perplexity
from skipwise.evaluation.specs import EvaluationSpec
from skipwise.runs.directory import RunDir
from skipwise.runs.environment import describe_environment
from skipwise.utils.files import write_json
from skipwise.workflows.context import RunContext, open_context
from skipwise.workflows.demo import DEMO
from skipwise.workflows.extend import measured_rows
from skipwise.workflows.train import train_model

ORIGINAL, TARGET = 256, 4096
# The best of each method lies within its rates.
RATES = {"full": (5e-4, 1e-3, 2e-3), "pose": (2.5e-4, 5e-4, 1e-3)}
# Every PoSE step has as many tokens, whatever its windows.
TOKENS_PER_STEP = 4096
TIMED_STEPS = 10
SPECS: tuple[EvaluationSpec, ...] = (
    Perplexity(context_lengths=(ORIGINAL, TARGET), stride=512, documents=8, final_tokens=512),
    Passkey(context_lengths=(ORIGINAL, TARGET), trials=40),
)
RESULTS = Path(__file__).parent / "results"
ROWS = RESULTS / "quality"
SECONDS = RESULTS / "quality-seconds.json"


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Attributes:
        method: `pose` or `full`.
        train_length: tokens of a window.
        batch: windows of a step.
        chunks: of PoSE.
        teacher: whether PoSE is held to what the untouched model says of the same windows.
        content: where PoSE takes the text behind a skip from.
    """

    method: str
    train_length: int
    batch: int
    steps: int
    learning_rate: float
    chunks: int = 2
    teacher: bool = True
    content: str = "contiguous"

    @property
    def name(self) -> str:
        """`"pose-256-2-300-0.001"`."""
        free = "free" if self.method == "pose" and not self.teacher else ""
        content = "" if self.content == "contiguous" else self.content
        parts = (self.method, self.train_length, self.chunks, content, free, self.steps, self.learning_rate)
        return "-".join(str(part) for part in parts if part)

    @property
    def step(self) -> str:
        """What decides how long a step takes."""
        parts = (self.method, self.train_length, self.chunks, self.content, "teacher" if self.teacher else "free")
        return "-".join(map(str, parts))

    def config(self) -> RunConfig:
        """The demo's, but for what the recipe says."""
        pose = self.method == "pose"
        positions = {"name": "pose", "chunks": self.chunks, "content": self.content} if pose else {"name": "full"}
        train = {
            "max_steps": self.steps,
            "learning_rate": self.learning_rate,
            "per_device_train_batch_size": self.batch,
            "warmup_steps": self.steps // 15,
            "save_steps": self.steps + 1,
            **({} if pose else {"echo_share": 0.0, "untouched_share": 0.0}),
        }
        lengths = {"original": ORIGINAL, "target": TARGET, **({"train": self.train_length} if pose else {})}
        return parse_config(merge(read_yaml(DEMO), {"positions": positions, "train": train, "lengths": lengths}))


def pose(train_length: int, chunks: int, steps: int, learning_rate: float, **more: Any) -> Recipe:
    """PoSE with as many tokens per step as any other."""
    return Recipe("pose", train_length, TOKENS_PER_STEP // train_length, steps, learning_rate, chunks, **more)


# Full length has four windows a step: four times the tokens.
FULL = [Recipe("full", TARGET, 4, 150, rate, chunks=0, teacher=False) for rate in RATES["full"]]
# Rates at the original window and two chunks, then train lengths, chunks and more at one of them.
POSE = [
    *(pose(256, 2, 300, rate) for rate in RATES["pose"]),
    *(pose(train_length, 2, 300, 1e-3) for train_length in (128, 64, 32)),
    *(pose(256, chunks, 300, 1e-3) for chunks in (3, 4)),
    *(pose(256, 2, 300, 1e-3, teacher=False, content=content) for content in ("contiguous", "aligned")),
    *(pose(128, 2, 100, rate) for rate in (5e-4, 1e-3)),
]
RECIPES = {recipe.name: recipe for recipe in [*FULL, *POSE]}


class Watch(TrainerCallback):
    """Measures the model ten times over a training."""

    def __init__(self, context: RunContext, recipe: Recipe, console: Console) -> None:
        self.context, self.recipe, self.console = context, recipe, console
        self.rows: list[dict[str, Any]] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A tenth of the steps more: measure."""
        if state.global_step % (self.recipe.steps // 10):
            return
        row: dict[str, Any] = {
            "step": state.global_step,
            "tokens": state.global_step * self.recipe.batch * self.recipe.train_length,
        }
        with tempfile.TemporaryDirectory() as directory:
            for rows in measured_rows(RunDir(Path(directory)), self.context, "extended", TARGET, SPECS):
                for result in rows:
                    if result.depth is None and result.metric in ("perplexity", "accuracy"):
                        row[f"{result.evaluation}_{result.context_length}"] = result.value
        self.rows.append(row)
        self.console.print(f"{self.recipe.name}: {row}")


class Ends(TrainerCallback):
    """When every step ended."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note the time; stop when there are enough."""
        self.seconds.append(time.perf_counter())
        if len(self.seconds) > TIMED_STEPS:
            control.should_training_stop = True


def opened(recipe: Recipe, console: Console) -> RunContext:
    """Model and data of a recipe, with the new RoPE."""
    config = recipe.config()
    weighed = config.train.model_copy(update={"kl_weight": float(recipe.teacher)})
    run = resolve(config.model_copy(update={"train": weighed}), ORIGINAL, ORIGINAL)
    context = open_context(run, console)
    context.interpolate()
    return context


def trained(recipe: Recipe, console: Console, make: Any) -> Any:
    """The callback that `make` gives for the opened context, after a training with it; a signal ends it all."""
    context = opened(recipe, console)
    callback = make(context)
    with tempfile.TemporaryDirectory() as directory:
        finished = train_model(context, RunDir(Path(directory)), callback)
    if not finished and isinstance(callback, Watch):
        raise SystemExit(f"{recipe.name} was stopped; nothing is written.")
    return callback


def measure_quality(recipe: Recipe, console: Console) -> None:
    """Train one recipe and write its rows, at the end."""
    watch = trained(recipe, console, lambda context: Watch(context, recipe, console))
    ROWS.mkdir(parents=True, exist_ok=True)
    content = {"recipe": asdict(recipe), "environment": describe_environment(), "rows": watch.rows}
    write_json(ROWS / f"{recipe.name}.json", content)


def measure_seconds(names: list[str]) -> None:
    """What a step takes, every recipe in a process of its own; learning rates take the same."""
    steps = {RECIPES[name].step: name for name in names}
    seconds = {}
    for step, name in steps.items():
        command = [sys.executable, __file__, "--only", name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds[step] = float(output.split()[-1])
        print(f"{step}: {seconds[step]:.3f} s a step", flush=True)
    write_json(SECONDS, {"environment": describe_environment(), "seconds": seconds})


def main() -> None:
    """All recipes, some, or their seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=", ".join(RECIPES))
    parser.add_argument("--seconds", action="store_true", help="time a step of each")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.recipes) - set(RECIPES)
    if unknown:
        parser.error(f"no recipe is called {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    console = Console()
    if arguments.only:
        ends = trained(RECIPES[arguments.only], Console(stderr=True), lambda _: Ends())
        print(statistics.median(later - earlier for earlier, later in itertools.pairwise(ends.seconds)))
        return
    if arguments.seconds:
        measure_seconds(list(RECIPES))
        return
    for name in arguments.recipes or RECIPES:
        if (ROWS / f"{name}.json").exists():
            print(f"{name}: measured already")
        else:
            measure_quality(RECIPES[name], console)


if __name__ == "__main__":
    main()
