"""One process of a training that `test_ranks.py` starts: writes which windows it drew, and weights at the end.

torchrun --nproc_per_node N tests/training/ranks_worker.py OUTPUT BATCH [STOP]
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from skipwise import PoSE, WindowCollator
from skipwise.config import TrainConfig
from skipwise.ranks import join_processes, leave_processes, rank
from skipwise.training.callbacks import StopOnSignal, TrainLog
from skipwise.training.trainer import train, training_arguments
from tests.conftest import pico_llama
from tests.training.test_trainer import CPU, LENGTHS, examples

STEPS, WINDOWS = 6, 4


class SignalOne(TrainerCallback):
    """After a step the last process, and only it, is told to stop."""

    def __init__(self, stop: StopOnSignal, step: int) -> None:
        self.stop, self.step = stop, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = rank() == int(os.environ.get("WORLD_SIZE", "1")) - 1
        self.stop.stopped |= last and state.global_step == self.step


def main() -> None:
    """Train."""
    output, batch, *stop = sys.argv[1:]
    out = Path(output)
    join_processes(CPU)
    config = TrainConfig(
        max_steps=STEPS, learning_rate=1e-3, per_device_train_batch_size=int(batch), save_steps=2, logging_steps=1
    )
    collator, drawn = WindowCollator(PoSE(), LENGTHS, mark_text=True), list[list[list[int]]]()

    def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        drawn.append([list(feature["visit"]) for feature in features])
        return collator(features)

    model = pico_llama()
    signals = StopOnSignal()
    callbacks = [TrainLog(out / "train.jsonl"), *([SignalOne(signals, int(stop[0]))] if stop else []), signals]
    finished = train(
        model=model,
        arguments=training_arguments(config, out / "checkpoints", seed=0, dtype=torch.float32, device=CPU),
        dataset=examples(STEPS * WINDOWS),
        collator=collate,
        eval_dataset=None,
        callbacks=callbacks,
        teacher=None,
    )
    (out / f"drawn-{rank()}.json").write_text(json.dumps({"drawn": drawn, "finished": finished}))
    if rank() == 0:
        torch.save(model.state_dict(), out / "weights.pt")
    leave_processes()


if __name__ == "__main__":
    main()
