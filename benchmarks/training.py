"""How fast and how large a training step is, beside that of a Hugging Face Trainer: the same windows, in one run.

    python benchmarks/training.py runs/SmolLM2-135M-Instruct.gguf --target 32768
    python benchmarks/training.py builtin:tiny --full 256 4096
    python benchmarks/training.py runs/SmolLM2-135M-Instruct.gguf --growth

Every measurement runs in a process of its own. Prints ratios and writes them, with all times, to benchmarks/results/.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from skipwise.data.builtin import python_documents
from skipwise.lengths import Lengths
from skipwise.models.config import ModelConfig
from skipwise.models.load import load_config, load_model, load_tokenizer
from skipwise.planning.machine import matmul_rate
from skipwise.positions import PoSE
from skipwise.positions.window import Document, example_rng
from skipwise.runs.environment import describe_environment
from skipwise.training.activation_checkpointing import checkpoint_activations
from skipwise.training.config import TrainConfig
from skipwise.training.trainer import train, training_arguments
from skipwise.utils.files import write_json

SIDES = ("stock autocast", "Hugging Face bfloat16", "ours")
# With activations computed again, each beside its own kind.
RECOMPUTED = ("Hugging Face bfloat16, recomputed", "ours, selective", "ours, all recomputed")
CHECKPOINTING: dict[str, Literal["all", "selective"]] = {"ours, selective": "selective", "ours, all recomputed": "all"}
# (tokens of a window, windows of a step).
SIZES = ((2048, 1), (512, 4), (1024, 4))
RECOMPUTED_SIZES = ((2048, 1), (1024, 4))
GROWTH = (512, 1024, 2048, 4096)
STEPS = 5
# Steps of the embedded model are short and vary more.
SHORT_STEPS = 24
LONG_STEPS = 8
TURNS = 3


class Windows(Dataset[dict[str, torch.Tensor]]):
    """The same PoSE windows for every side, or whole ones where train and target length are the same."""

    def __init__(self, ids: NDArray[np.int64], lengths: Lengths) -> None:
        self.ids, self.lengths = ids, lengths

    def __len__(self) -> int:
        return len(self.ids) // self.lengths.train

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        train = self.lengths.train
        window = PoSE().sample(Document(train), self.lengths, example_rng(0, 0, index))
        ids = torch.from_numpy(self.ids[index * train :][window.token_index])
        return {
            "input_ids": ids,
            "labels": ids.clone(),
            "position_ids": torch.from_numpy(window.position_ids),
            "attention_mask": torch.ones_like(ids),
        }


class Clock(TrainerCallback):
    """When every step ended, and its loss."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Note the loss."""
        self.losses += [logs["loss"]] if "loss" in logs else []


def measure(path: str, side: str, train_length: int, target: int, batch: int, steps: int) -> dict[str, Any]:
    """One training, in this process. The first two steps, in which memory is claimed, do not count."""
    device = torch.device("cpu")
    config = ModelConfig(path=path)
    text = "\n\n".join(text for _, text in python_documents())[: 8 * train_length * batch * steps]
    ids = np.array(load_tokenizer(config)(text, verbose=False)["input_ids"])
    windows = Windows(ids, Lengths(original=train_length, train=train_length, target=target))
    before = status("VmRSS")
    weights = torch.bfloat16 if side.startswith("Hugging Face bfloat16") else torch.float32
    hf = config.model_copy(update={"attn_implementation": "sdpa"})
    own = side.startswith("ours")
    model = load_model(config if own else hf, device, weights)
    if side in CHECKPOINTING:
        checkpoint_activations(model, CHECKPOINTING[side])
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        if own:
            ours = TrainConfig(
                max_steps=steps, per_device_train_batch_size=batch, logging_steps=1, save_steps=steps + 1
            )
            arguments = training_arguments(ours, Path(directory), 0, torch.bfloat16, device)
            train(
                model=model, arguments=arguments, dataset=windows, collator=default_data_collator, eval_dataset=None,
                callbacks=[clock], teacher=None, dtype=torch.bfloat16, lean=CHECKPOINTING.get(side) == "all",
            )  # fmt: skip
        else:
            train_as_usual(model, side, directory, windows, batch, steps, clock)
    seconds = np.diff(clock.ends)[1:]
    return {
        "side": side,
        "train_length": train_length,
        "target_length": target,
        "batch": batch,
        "seconds": [float(one) for one in seconds],
        "tokens_per_second": batch * train_length / float(np.median(seconds)),
        "peak_megabytes": (status("VmHWM") - before) / 1024,
        "losses": clock.losses,
    }


def train_as_usual(
    model: PreTrainedModel, side: str, directory: str, windows: Windows, batch: int, steps: int, clock: Clock
) -> None:
    """The Hugging Face Trainer, with the optimizer settings of ours."""
    arguments = TrainingArguments(
        output_dir=directory, max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-5,
        lr_scheduler_type="constant_with_warmup", warmup_steps=10, weight_decay=0.0, bf16=side == "stock autocast",
        use_cpu=True, report_to="none", disable_tqdm=True, remove_unused_columns=False, save_strategy="no",
        logging_steps=1, logging_first_step=True, train_sampling_strategy="sequential",
        activation_checkpointing=side.endswith("recomputed"),
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=windows, callbacks=[clock]).train()


def status(field: str) -> int:
    """A line of /proc/self/status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def measured(path: str, side: str, train_length: int, target: int, batch: int, steps: int = STEPS) -> dict[str, Any]:
    """`measure` in a process of its own."""
    only = ["--only", side, str(train_length), str(target), str(batch), str(steps)]
    output = subprocess.run([sys.executable, __file__, path, *only], capture_output=True, text=True, check=True).stdout
    row: dict[str, Any] = json.loads(output.splitlines()[-1])
    print(f"{side}: {batch} x {train_length:,} to {target:,}: {row['tokens_per_second']:.0f} tokens/s, "
          f"{row['peak_megabytes']:,.0f} MB", flush=True)  # fmt: skip
    return row


def pooled(rows: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One row of several of the same step."""
    seconds = [second for row in rows for second in row["seconds"]]
    median = statistics.median
    return rows[0] | {
        "seconds": seconds,
        "tokens_per_second": rows[0]["batch"] * rows[0]["train_length"] / median(seconds),
        "peak_megabytes": median(row["peak_megabytes"] for row in rows),
    }


def product_rates(path: str) -> dict[str, float]:
    """FLOP/s of the model's widest product, by dtype: the floor of any step."""
    config = load_config(ModelConfig(path=path))
    shape = (2048, config.hidden_size, config.intermediate_size)
    return {dtype: matmul_rate(dtype, shape) for dtype in ("bfloat16", "float32")}


def main() -> None:
    """All sizes and sides, or a single measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--target", type=int, default=32768)
    parser.add_argument("--full", type=int, nargs=2, metavar=("WINDOW", "LONGEST"), help="also at full length, to it")
    parser.add_argument("--growth", action="store_true", help="by window, one at a time, and not beside anything")
    parser.add_argument("--only", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        side, *numbers = arguments.only
        print(json.dumps(measure(arguments.model, side, *map(int, numbers))))
        return
    rows = []
    if arguments.full:  # Figure 3 of the paper: cost by target length
        window, longest = arguments.full
        targets = [factor * window for factor in (2, 4, 8, 16, 32, 64)]
        # By turns: what the machine does meanwhile falls on all of them.
        steps = [(window, target) for target in targets] + [(target, target) for target in targets if target <= longest]
        turns = [
            [
                measured(arguments.model, "ours", *step, 4, SHORT_STEPS if step[0] == window else LONG_STEPS)
                for step in steps
            ]
            for _ in range(TURNS)
        ]
        rows += [pooled(own) for own in zip(*turns, strict=True)]
    elif arguments.growth:
        for train_length in GROWTH:
            rows.append(measured(arguments.model, "ours", train_length, arguments.target, 1))
        rows.append(measured("builtin:tiny", "ours", GROWTH[0], arguments.target, 1, SHORT_STEPS) | {"model": "tiny"})
    else:
        for train_length, batch in SIZES:
            sides = (*SIDES, *(RECOMPUTED if (train_length, batch) in RECOMPUTED_SIZES else ()))
            rows += [measured(arguments.model, side, train_length, arguments.target, batch) for side in sides]
    name = Path(arguments.model.rpartition(":")[2]).name.removesuffix(".gguf")
    kind = "lengths" if arguments.full else "growth" if arguments.growth else "training"
    output = Path(__file__).parent / "results" / f"{kind}-{name}.json"
    rates = product_rates(arguments.model)
    write_json(output, {"environment": describe_environment(), "flops_per_second": rates, "rows": rows})
    print(f"written: benchmarks/results/{output.name}")


if __name__ == "__main__":
    main()
