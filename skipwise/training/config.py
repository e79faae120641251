"""Settings of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator

from skipwise.errors import UserError
from skipwise.utils.settings import Number, Section, Share

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]

# Far more than anyone trains, and little enough that the order of all windows can be drawn.
MOST_STEPS, MOST_WINDOWS = 1_000_000, 10_000


class LoRAConfig(Section):
    """Train low-rank adapters instead of all weights; in the end they are added to the weights. Names are peft's.

    Attributes:
        r: rank.
        lora_alpha: adapters count alpha / r.
        lora_dropout: on what goes into an adapter.
        target_modules: names of linear layers, or `all-linear` for all but the output layer.
        train_norms_and_embeddings: train these as a whole, too.
        load_in_4bit: keep the other weights in 4 bits while training (QLoRA); needs bitsandbytes. The adapters are
            added to the weights as they were before.
    """

    r: Annotated[int, Field(ge=1)] = 16
    lora_alpha: Annotated[int, Field(ge=1)] = 32
    lora_dropout: Annotated[Number, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: Annotated[tuple[str, ...], Strict(False), Field(min_length=1)] | Literal["all-linear"] = (
        "all-linear"
    )
    train_norms_and_embeddings: bool = False
    load_in_4bit: bool = False


class TrainConfig(Section):
    """Training; the names are those of `transformers.TrainingArguments` where it has them.

    Attributes:
        untouched_share: share of windows with ordinary positions, to protect the original range.
        echo_share: share of the windows with skips in which tokens weigh as if the skipped text repeated
            them, so that the model learns to choose among as many as it will meet. Needs sdpa or eager attention.
        kl_weight: weight of a Kullback-Leibler term to the untouched model, which reads the same
            tokens at ordinary positions under its own RoPE; only up to the first gap in the text
            of a window. 0 switches it off (and saves a forward pass and a copy of the
            weights). None is 1 where a training window fits into the original window, and 0
            where the untouched model could not read it.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them: `true` all but
            what goes into a layer; `selective` what is cheap, and keep matmuls and attention.
        torch_compile: compile the layers for training.
        use_liger_kernel: train with the fused GPU kernels of `liger-kernel`.
        lora: train low-rank adapters instead of all weights; `{}` for the defaults.
        fsdp: shard weights, gradients and moments over all processes (PyTorch's FSDP2).
        deepspeed: a DeepSpeed configuration (JSON), e.g. configs/engines/zero3.json.
        save_total_limit: checkpoints that are kept while training. With one only, nothing is left if it gets damaged.
        eval_steps: loss on held-out windows every so many steps; None for never.
        load_best_model_at_end: keep the checkpoint with the lowest such loss.
        report_to: trackers that training and results go to: `tensorboard`, `wandb`, `mlflow`, `trackio`.
    """

    max_steps: Annotated[int, Field(ge=0, le=MOST_STEPS)] = 200
    learning_rate: Annotated[Number, Field(gt=0.0)] = 1.0e-5
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    per_device_train_batch_size: Annotated[int, Field(ge=1, le=MOST_WINDOWS)] = 4
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=MOST_WINDOWS)] = 1
    weight_decay: Annotated[Number, Field(ge=0.0)] = 0.0
    adam_beta2: Annotated[Number, Field(gt=0.0, lt=1.0)] = 0.999
    max_grad_norm: Annotated[Number, Field(gt=0.0)] = 1.0
    gradient_checkpointing: Literal[False, True, "selective"] = False
    torch_compile: bool = False
    use_liger_kernel: bool = False
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 0
    logging_steps: Annotated[int, Field(ge=1)] = 5
    save_steps: Annotated[int, Field(ge=1)] = 50
    save_total_limit: Annotated[int, Field(ge=1)] = 2
    lora: LoRAConfig | None = None
    fsdp: bool = False
    deepspeed: str | None = None
    eval_steps: Annotated[int, Field(ge=1)] | None = None
    load_best_model_at_end: bool = False
    report_to: Annotated[tuple[Tracker, ...], Strict(False)] = ()
    untouched_share: Share = 0.25
    echo_share: Share = 0.0
    kl_weight: Annotated[Number, Field(ge=0.0)] | None = None

    @model_validator(mode="after")
    def _best_needs_evaluation(self) -> TrainConfig:
        if self.load_best_model_at_end and (self.eval_steps is None or self.save_steps % self.eval_steps):
            raise UserError(
                "load_best_model_at_end needs eval_steps, with save_steps a multiple of it, but they are "
                f"{self.eval_steps} and {self.save_steps}.",
                code="best_model_needs_evaluation",
            )
        return self

    @model_validator(mode="after")
    def _one_engine(self) -> TrainConfig:
        if self.fsdp and self.deepspeed:
            raise UserError(
                "train.fsdp and train.deepspeed both shard the model. Leave one of them out.",
                code="two_sharding_engines",
            )
        if self.lora and self.lora.load_in_4bit and (self.fsdp or self.deepspeed):
            raise UserError(
                "train.lora.load_in_4bit packs weights, which fsdp and deepspeed would shard. Leave one of them out.",
                code="four_bit_with_sharding",
            )
        return self

    @model_validator(mode="after")
    def _one_chooses_what_is_kept(self) -> TrainConfig:
        if self.torch_compile and self.gradient_checkpointing == "selective":
            raise UserError(
                "torch_compile decides itself what to compute again, so gradient_checkpointing cannot be 'selective' "
                "with it. Leave one of them out.",
                code="selective_checkpointing_with_compile",
            )
        return self


def read_deepspeed(path: Path) -> dict[str, Any]:
    """A DeepSpeed configuration.

    Raises:
        UserError: unless the file holds a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"train.deepspeed: {path} cannot be read as JSON: {error}", code="unreadable_json") from error
    if not isinstance(value, dict):
        raise UserError(
            f"train.deepspeed: {path} must hold an object, not {type(value).__name__}.", code="not_a_mapping"
        )
    zero = value.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") not in (0, 1, 2, 3):
        raise UserError(
            f"train.deepspeed: {path} must say zero_optimization.stage, 0 to 3, but zero_optimization is {zero!r}. "
            "Begin with one of configs/engines/zero*.json.",
            code="zero_stage_missing",
        )
    for key in ("bf16", "fp16", "torch_autocast"):
        if key in value:
            raise UserError(
                f"train.deepspeed: {path} must leave {key} to Skipwise, which sets the compute dtype (model.dtype) "
                "alike for every engine. Remove it.",
                code="dtype_set_by_deepspeed",
            )
    return value
