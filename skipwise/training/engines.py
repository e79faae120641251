"""Engines: what Accelerate made of a training on several devices, and a plain model out of it again."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from skipwise.training.config import read_deepspeed
from skipwise.utils.distributed import is_first

ONE_PROCESS = "one process"
# PyTorch then reads nothing but tensors and what is declared safe, whoever asks it to read.
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def deepspeed_settings(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    """A DeepSpeed configuration, with autocast to `dtype`.

    It would switch off that around the whole loss, and otherwise send weights and gradients of linear layers rounded.
    """
    enabled = dtype == torch.bfloat16
    autocast = {"enabled": enabled, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return {**read_deepspeed(path), "torch_autocast": autocast}


def engine_of(wrapped: nn.Module) -> str:
    """What a model was wrapped in, in words: `"one process"`, `"DDP"`, `"FSDP2"`, `"DeepSpeed ZeRO-3"`."""
    deepspeed = sys.modules.get("deepspeed")  # takes long to import, and has wrapped nothing if nobody did
    if deepspeed is not None and isinstance(wrapped, deepspeed.DeepSpeedEngine):
        stage = wrapped.zero_optimization_stage()
        return f"DeepSpeed ZeRO-{stage}" if stage else "DeepSpeed"
    if isinstance(wrapped, FSDPModule):
        return "FSDP2"
    return "DDP" if isinstance(wrapped, DistributedDataParallel) else ONE_PROCESS


def engine_line(wrapped: nn.Module, arguments: TrainingArguments) -> str | None:
    """What runs, and aloud where that is not what was asked for; None for nothing but one process.

    Accelerate shards nothing on a CPU with FSDP; it copies the model to every process (DDP) and says nothing.
    """
    ran, count = engine_of(wrapped), arguments.world_size
    if ran == ONE_PROCESS:
        return None
    line = f"{ran} on {count} process{'es' if count > 1 else ''}"
    asked_fsdp = bool(arguments.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked_fsdp and ran != "FSDP2":
        line += " (FSDP was asked for, but there is none on this device: every process holds the whole model)"
    return line


def whole_weights(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """The float32 weights of a model that an engine keeps in parts, gathered on the CPU of the first process
    (nothing in the others); None where the model itself has them. All processes must take part.
    """
    engine = engine_of(trainer.model_wrapped)
    if engine.startswith("DeepSpeed"):
        weights = _deepspeed_weights(trainer.accelerator.unwrap_model(trainer.model_wrapped))
        # Otherwise the next model that one process loads would be sharded among all, which it would wait for.
        unset_hf_deepspeed_config()
        return weights
    if engine == "FSDP2":
        gathered: dict[str, torch.Tensor] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        return gathered
    return None


def _deepspeed_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """What its optimizer steps on, from the parts that processes have."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, weight in model.named_parameters():
        whole = safe_get_full_fp32_param(weight)
        if whole is None:  # it is not trained
            with GatheredParameters([weight]):
                whole = weight.detach().float().cpu().clone()
        if is_first():
            weights[name] = whole.detach().cpu()
    return weights


@contextmanager
def weights_only_checkpoints() -> Iterator[None]:
    """Let every engine read its checkpoints without running code that is in them; DeepSpeed would, by itself."""
    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(_deepspeed_classes()):
            yield
    finally:
        if before is None:
            del os.environ[WEIGHTS_ONLY]
        else:
            os.environ[WEIGHTS_ONLY] = before


def _deepspeed_classes() -> list[Any]:
    """What is in its checkpoints besides tensors, all of it plain data."""
    if "deepspeed" not in sys.modules:
        return []
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
