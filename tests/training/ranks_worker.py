"""One process of a training that `test_ranks.py` starts: writes which windows it drew, and weights at the end."""

import argparse
import atexit
import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from transformers import TrainerCallback

from skipwise import PoSE, WindowCollator
from skipwise.training.callbacks import StopOnSignal, TrainLog
from skipwise.training.config import TrainConfig
from skipwise.training.trainer import train, training_arguments
from skipwise.utils.distributed import join_processes, leave_processes, rank
from tests.picomodels import pico_llama
from tests.training.examples import CPU, LENGTHS, examples

STEPS, WINDOWS = 6, 4
ENGINES = Path(__file__).parents[2] / "configs" / "engines"


class SignalOne(TrainerCallback):
    """After a step the last process, and only it, is told to stop."""

    def __init__(self, stop: StopOnSignal, step: int) -> None:
        self.stop, self.step = stop, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = rank() == int(os.environ.get("WORLD_SIZE", "1")) - 1
        self.stop.stopped |= last and state.global_step == self.step


def run(arguments: list[str]) -> None:
    """Train: OUTPUT BATCH [--stop STEP] [--engine ENGINE] [--dtype DTYPE]."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("batch", type=int)
    parser.add_argument("--stop", type=int)
    parser.add_argument("--engine", default="ddp")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args(arguments)
    out: Path = given.output
    atexit.register((out / f"left-{rank()}").touch)  # as trackers do, to send what they still have
    dtype: torch.dtype = getattr(torch, given.dtype)
    zero = ENGINES / f"{given.engine}.json"
    config = TrainConfig(
        max_steps=STEPS,
        learning_rate=1e-3,
        per_device_train_batch_size=given.batch,
        save_steps=2,
        logging_steps=1,
        fsdp=given.engine.startswith("fsdp"),
        deepspeed=str(zero) if zero.exists() else None,
    )
    join_processes(CPU, deepspeed=bool(config.deepspeed))
    collator, drawn = WindowCollator(PoSE(), LENGTHS, mark_text=True), list[list[list[int]]]()

    def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        drawn.append([list(feature["visit"]) for feature in features])
        return collator(features)

    model = pico_llama()
    signals = StopOnSignal()
    callbacks = [TrainLog(out / "train.jsonl", 1), *([SignalOne(signals, given.stop)] if given.stop else []), signals]
    settings = training_arguments(config, out / "checkpoints", seed=0, dtype=dtype, device=CPU)
    if given.engine == "fsdp":
        # Accelerate shards on accelerators only; it must take this CPU for one.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    said: list[str] = []
    trained = train(
        model=model,
        arguments=settings,
        dataset=examples(STEPS * WINDOWS),
        collator=collate,
        eval_dataset=None,
        callbacks=callbacks,
        teacher=None,
        dtype=dtype,
        log=said.append,
    )
    report = {"drawn": drawn, "finished": trained.finished, "said": said}
    (out / f"drawn-{rank()}.json").write_text(json.dumps(report))
    if rank() == 0 and trained.finished:
        torch.save(trained.weights or model.state_dict(), out / "weights.pt")
    leave_processes(0)
