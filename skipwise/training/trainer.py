"""The Hugging Face Trainer, with our windows and our loss."""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import rotate_checkpoints

from skipwise.errors import UserError
from skipwise.models.attention import attention_in_float32
from skipwise.models.forward import autocast, last_hidden_states, logits_rule, loss_for_logits
from skipwise.models.load import vocabulary_size
from skipwise.models.memory import freed_memory_kept, large_blocks_given_back
from skipwise.models.windowed import masks_for
from skipwise.training.adapters import write_rope
from skipwise.training.checkpoints import UNFINISHED, newest_checkpoint, publish
from skipwise.training.config import TrainConfig
from skipwise.training.engines import (
    deepspeed_settings,
    engine_line,
    weights_only_checkpoints,
    whole_weights,
)
from skipwise.training.kernels import compiled_layers
from skipwise.training.loss import chunked_cross_entropy, window_weights
from skipwise.training.trackers import PROJECT, tracker_places
from skipwise.utils.distributed import TIMEOUT, from_first, is_first, lost_process, wait_for_all
from skipwise.utils.files import format_bytes

# Checkpoints of one file, which can be read without running what is in it. Weights are gathered in any case in the end.
FSDP = {"version": 2, "reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT"}
# Share by which our loss may differ from that of the model's own logits.
LOSS_TOLERANCE = 0.02
# A loss of more than so many times that of guessing every token with the same probability is no training any more.
EXPLODED = 3.0


@dataclass(frozen=True)
class Teacher:
    """The frozen untouched model, which reads the tokens of a window at ordinary positions.

    Attributes:
        model: it.
        kl_weight: weight of the Kullback-Leibler term between it and the trained model, above 0. The term ends
            where the text of a window has a gap, since the teacher would read far pieces as neighbours.
    """

    model: PreTrainedModel
    kl_weight: float


@dataclass(frozen=True)
class Trained:
    """What came of a training.

    Attributes:
        finished: whether it came to its end (and was not stopped by a signal).
        weights: of a model that an engine keeps in parts, in the first process; None where it is whole.
    """

    finished: bool
    weights: dict[str, torch.Tensor] | None


class LogEngine(TrainerCallback):
    """Says what the training really runs on."""

    def __init__(self, trainer: Trainer, log: Callable[[str], None]) -> None:
        self.trainer, self.log = trainer, log

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """By then the model is wrapped."""
        line = engine_line(self.trainer.model_wrapped, args)
        if line:
            self.log(f"training on {args.device.type}: {line}")


class OnFirstStep(TrainerCallback):
    """Calls a function after the first step of a training, in every process: not when it goes on from a checkpoint.

    Args:
        trainer: of the training.
        call: with the weights of a model that processes share, gathered; None where each process has them all.
    """

    def __init__(self, trainer: Trainer, call: Callable[[dict[str, torch.Tensor] | None], None]) -> None:
        self.trainer, self.call = trainer, call

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After the weights have changed."""
        if state.global_step != 1:
            return
        self.call(whole_weights(self.trainer))
        if args.deepspeed:  # the training goes on in shards
            set_hf_deepspeed_config(args.hf_deepspeed_config)


class WindowTrainer(Trainer):
    """Trains on windows of `WindowCollator`: chunked loss, every window weighted equally.

    Args:
        teacher: for the KL term; None for no such term.
        dtype: compute dtype. Trainer and engines have ways of their own to set it (`bf16`), some of which round
            weights, hidden states or the loss; autocast around the loss does not.
        keywords: as for `Trainer`.
    """

    def __init__(self, *, teacher: Teacher | None = None, dtype: torch.dtype = torch.float32, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.teacher, self.dtype = teacher, dtype
        # Ours is a mean over windows, so Trainer must divide by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self._aside: str | None = None
        self._visits: list[list[int]] = []
        chance = math.log(vocabulary_size(self.accelerator.unwrap_model(self.model)))
        self._largest_loss = EXPLODED * chance * (1 + (teacher.kl_weight if teacher else 0))

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        """In order: the data set is shuffled already, and the same for any number of ranks."""
        return SequentialSampler(train_dataset or self.train_dataset)  # type: ignore[arg-type]

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints go; while one is written, aside."""
        return self._aside or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint is whole or it is not there, and older ones go only when it is."""
        checkpoints = Path(str(self.args.output_dir))
        aside, name = checkpoints / UNFINISHED, f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        wait_for_all()
        self._aside = str(aside)
        try:
            super()._save_checkpoint(model, trial)
            wait_for_all()
            if self.state.best_global_step:  # looked for aside
                self.state.best_model_checkpoint = str(checkpoints / f"checkpoint-{self.state.best_global_step}")
            if self.args.should_save:
                (aside / name / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that nothing reads
                self.state.save_to_json(str(aside / name / TRAINER_STATE_NAME))
                write_rope(aside / name, self.accelerator.unwrap_model(self.model))
                publish(aside / name, checkpoints / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            if lost_process(error):
                raise
            shutil.rmtree(aside, ignore_errors=True)
            free = shutil.disk_usage(checkpoints).free
            raise UserError(
                f"{name} cannot be written to {checkpoints} ({format_bytes(free)} free): {error}. Earlier ones are as "
                "they were. Make room, and the same command with --resume goes on.",
                code="checkpoint_not_written",
            ) from error
        finally:
            self._aside = None
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
            rotate_checkpoints(
                str(checkpoints), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=False
            )
        wait_for_all()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Before the optimizer uses them, gradients must be numbers."""
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        if not math.isfinite(float(norm)):
            raise self._diverged(f"the norm of the gradients is {float(norm)}")
        return norm

    def _check_loss(self, loss: torch.Tensor, visits: torch.Tensor | None) -> None:
        """A model that has lost its mind must not be trained on, nor written."""
        self._visits = [] if visits is None else visits.tolist()
        if not float(loss) <= self._largest_loss:  # nor where it is not a number
            raise self._diverged(f"the loss is {float(loss):.4g}")

    def _diverged(self, what: str) -> UserError:
        windows = ", ".join(f"piece {piece} of source {source}" for _, piece, source in self._visits)
        return UserError(
            f"In step {self.state.global_step + 1} {what}; nothing of it is saved. "
            f"The windows were {windows or 'not numbered'}. Start again with a lower train.learning_rate or more "
            "train.warmup_steps, or leave these documents out.",
            code="training_diverged",
        )

    def compute_loss_context_manager(self) -> "ExitStack[bool | None]":
        """Autocast around the whole loss."""
        contexts = super().compute_loss_context_manager()
        contexts.enter_context(autocast(self.args.device, self.dtype))
        return contexts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Mean over windows of the mean loss of their labelled tokens, in nats."""
        loss = window_loss(model, self.accelerator.unwrap_model(model), inputs, self.teacher)
        self._check_loss(loss.detach(), inputs.get("visit"))
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> tuple[Any, None, None]:
        """Held-out windows: only the loss, without the teacher's term, and never logits."""
        inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}  # nor echoes
        with torch.no_grad(), self.compute_loss_context_manager():
            unwrapped = self.accelerator.unwrap_model(model)
            return window_loss(model, unwrapped, self._prepare_inputs(inputs)).detach(), None, None


def window_loss(
    model: nn.Module,
    unwrapped: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    teacher: Teacher | None = None,
) -> torch.Tensor:
    """The training loss of one batch.

    Args:
        model: the model as wrapped for data parallelism, which must see the forward pass.
        unwrapped: the model itself.
        inputs: a batch of `WindowCollator`; not changed. Without `text_runs_on` the text has no gaps.
        teacher: for the KL term.
    """
    inputs = dict(inputs)
    inputs.pop("visit", None)  # says which windows these are
    labels = inputs.pop("labels")[:, 1:]
    text_runs_on = inputs.pop("text_runs_on", torch.ones_like(inputs["input_ids"]))
    weights = window_weights(labels)
    labelled = labels != -100
    given = {**inputs, "attention_mask": masks_for(unwrapped, inputs)}
    ids, targets, weights = inputs["input_ids"], labels[labelled], weights[labelled]
    rule = logits_rule(unwrapped.config)
    taught: dict[str, torch.Tensor] = {}
    if teacher is not None:
        ordinary = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            taught["teacher_hidden"] = last_hidden_states(teacher.model, ordinary)[:, :-1][labelled]
        head = teacher.model.get_output_embeddings()
        taught["teacher_weight"], bias = head.weight, getattr(head, "bias", None)
        if bias is not None:
            taught["teacher_bias"] = bias
        taught["kl_weights"] = teacher.kl_weight * text_runs_on[:, :-1][labelled]

    def loss(hidden: torch.Tensor, head: nn.Module) -> torch.Tensor:
        rows, bias = hidden[:, :-1][labelled], getattr(head, "bias", None)
        return chunked_cross_entropy(rows, head.weight, targets, weights, bias=bias, rule=rule, **taught)  # type: ignore[arg-type]

    return loss_for_logits(model, unwrapped, given, loss)


@torch.no_grad()
def check_loss(model: PreTrainedModel) -> None:
    """Raise `UserError` when the model does more between hidden states and logits than a linear layer and `LogitsRule`.

    The chunked loss would train it towards something else.
    """
    vocabulary = vocabulary_size(model)
    ids = torch.randint(vocabulary, (1, 16), generator=torch.Generator().manual_seed(0)).to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with attention_in_float32(model):
        ours = window_loss(model, model, {**inputs, "labels": ids})
        logits = model(**inputs, use_cache=False).logits[0, :-1].float()
    hf = nn.functional.cross_entropy(logits, ids[0, 1:])
    if abs(float(ours) - float(hf)) > LOSS_TOLERANCE * float(hf):
        raise UserError(
            f"The output layer must be one linear layer, but {model.config.model_type!r} makes something else of it "
            f"(loss {float(hf):.4f} by its logits, {float(ours):.4f} by its output layer). Choose another model.",
            code="output_layer_not_linear",
        )


def training_arguments(
    config: TrainConfig, checkpoints: Path, seed: int, dtype: torch.dtype, device: torch.device
) -> TrainingArguments:
    """`TrainingArguments` for a section of ours, but for what is done to the model itself before (see `models/`).

    Raises:
        UserError: for a DeepSpeed configuration that it does not take.
    """
    evaluated = config.eval_steps is not None
    # What `accelerate launch` passes on would round weights in some engines; see `WindowTrainer`.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    try:
        return TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=config.max_steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=config.warmup_steps,
            per_device_train_batch_size=config.per_device_train_batch_size,
            per_device_eval_batch_size=config.per_device_train_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            weight_decay=config.weight_decay,
            adam_beta2=config.adam_beta2,
            max_grad_norm=config.max_grad_norm,
            dataloader_num_workers=config.dataloader_num_workers,
            logging_steps=config.logging_steps,
            logging_first_step=True,
            save_steps=config.save_steps,
            save_total_limit=config.save_total_limit,
            eval_strategy="steps" if evaluated else "no",
            eval_steps=config.eval_steps,
            load_best_model_at_end=config.load_best_model_at_end,
            metric_for_best_model="eval_loss" if config.load_best_model_at_end else None,
            use_cpu=device.type == "cpu",
            seed=seed,
            deepspeed=deepspeed_settings(Path(config.deepspeed), dtype) if config.deepspeed else None,
            fsdp=True if config.fsdp else None,  # type: ignore[arg-type]  # a bool, says its own code
            fsdp_config=FSDP if config.fsdp else None,
            ddp_timeout=int(TIMEOUT.total_seconds()),
            report_to=list(config.report_to) or "none",
            run_name=checkpoints.parent.name,
            project=PROJECT,
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
        )
    except ValueError as error:
        raise UserError(
            f"The engine does not take its configuration: {error}", code="engine_rejects_configuration"
        ) from error


@contextmanager
def use_cache_kept(config: PreTrainedConfig) -> Iterator[None]:
    """Leave `use_cache` as it is, and absent where it is, as in configs of several models.

    Trainer switches it off, and it would be saved so.
    """
    before = vars(config).get("use_cache")
    try:
        yield
    finally:
        vars(config).pop("use_cache", None)
        if before is not None:
            config.use_cache = before


def train(
    *,
    model: PreTrainedModel,
    arguments: TrainingArguments,
    dataset: Dataset[Any],
    collator: Callable[[list[Any]], dict[str, torch.Tensor]],
    eval_dataset: Dataset[Any] | None,
    callbacks: list[TrainerCallback],
    teacher: Teacher | None,
    dtype: torch.dtype = torch.float32,
    log: Callable[[str], None] = print,
    on_first_step: Callable[[dict[str, torch.Tensor] | None], None] | None = None,
    compiled: bool = False,
    lean: bool = False,
) -> Trained:
    """Train `model` in place, going on from the newest checkpoint in the output directory.

    Args:
        dtype: compute dtype.
        log: called with lines about the engine and damaged checkpoints.
        on_first_step: called after the first step (`OnFirstStep`).
        compiled: compile its layers.
        lean: on a CPU give freed memory back at once; a step then takes a tenth longer.

    Raises:
        UserError: when loss or gradients are no numbers any more, or a checkpoint cannot be written.
    """
    with ExitStack() as stack:
        stack.enter_context(use_cache_kept(model.config))
        stack.enter_context(tracker_places(Path(str(arguments.output_dir)).parent))
        trainer = WindowTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            data_collator=collator,
            callbacks=callbacks,
            teacher=teacher,
            dtype=dtype,
        )
        trainer.remove_callback(PrinterCallback)  # ours shows the progress
        trainer.add_callback(LogEngine(trainer, log))
        if on_first_step is not None:
            trainer.add_callback(OnFirstStep(trainer, on_first_step))
        if model.device.type == "cpu" and not lean:
            stack.enter_context(freed_memory_kept())
        elif model.device.type == "cpu":
            large_blocks_given_back()
        if compiled:
            stack.enter_context(compiled_layers(model))
        checkpoint = from_first(is_first() and newest_checkpoint(Path(str(arguments.output_dir)), log)) or None
        stack.enter_context(weights_only_checkpoints())
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    finished = trainer.state.global_step >= arguments.max_steps
    return Trained(finished, whole_weights(trainer) if finished else None)
