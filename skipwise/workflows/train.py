"""The training step of a run."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel, TrainerCallback

from skipwise.data.mixture import retrieval_documents
from skipwise.data.windows import TrainingExamples
from skipwise.models.load import default_device, load_model, vocabulary_size
from skipwise.models.rope import set_rope_scaling
from skipwise.runs.directory import RunDir
from skipwise.training.adapters import add_adapters, merged, trained_weights
from skipwise.training.callbacks import ProgressBar, StopOnSignal, TrainLog
from skipwise.training.preparation import window_collator
from skipwise.training.trainer import Teacher, train, training_arguments
from skipwise.utils.distributed import from_first, is_first
from skipwise.workflows.context import RunContext

Weights = dict[str, torch.Tensor]


def train_model(
    context: RunContext,
    directory: RunDir,
    *callbacks: TrainerCallback,
    on_first_step: Callable[[Weights | None], None] | None = None,
) -> bool:
    """Train to the end or to a signal. A model that was written before is loaded instead.

    Args:
        context: context of the run; its model is trained in place, or replaced by one without shards and adapters.
        directory: run directory, for checkpoints and the log.
        callbacks: callbacks besides those for progress, the log and signals.
        on_first_step: called after the first step; see `OnFirstStep`.

    Returns:
        Whether training came to its end.
    """
    run, config = context.run, context.run.train
    if from_first(is_first() and (directory.model / "config.json").is_file()):
        if is_first():
            load_trained(context, directory)
        return True
    teacher = _teacher(context)
    if config.lora:
        context.model = add_adapters(context.model, config.lora, run.seed)
    arguments = training_arguments(config, directory.checkpoints, run.seed, context.dtype, context.model.device)
    windows_per_step = arguments.train_batch_size * config.gradient_accumulation_steps * arguments.world_size
    tokens_per_step = windows_per_step * run.window_length
    trained = train(
        model=context.model,
        arguments=arguments,
        dataset=_examples(context, config.max_steps * windows_per_step),
        collator=window_collator(
            run.positions,
            run.rope,
            run.lengths,
            context.tokenizer,
            seed=run.seed,
            untouched_share=config.untouched_share,
            echo_share=config.echo_share,
            mark_text=True,
        ),
        eval_dataset=context.data.watched_examples(run.seed) if config.eval_steps else None,
        callbacks=[
            ProgressBar(context.console, tokens_per_step),
            TrainLog(directory.train_log, tokens_per_step),
            StopOnSignal(),
            *callbacks,
        ],
        teacher=teacher,
        dtype=context.dtype,
        log=lambda line: context.console.print(line, highlight=False),
        on_first_step=on_first_step,
        compiled=config.torch_compile,
        lean=config.gradient_checkpointing is True,
    )
    if trained.finished:
        _make_plain(context, trained.weights)
    context.model.eval()
    return trained.finished


def load_trained(context: RunContext, directory: RunDir) -> None:
    """Replace the model of a run by the one that was written."""
    written = context.run.model.model_copy(update={"path": str(directory.model), "revision": None})
    context.model = load_model(written, default_device(), four_bits=context.run.four_bits)


def plain_model(context: RunContext, weights: Weights) -> PreTrainedModel:
    """The model of a run with these trained weights, without shards, adapters or weights of 4 bits, on the CPU."""
    run, lora = context.run, context.run.train.lora
    model = load_model(run.model, torch.device("cpu"))
    set_rope_scaling(model, run.rope, run.lengths)
    if lora:
        model = add_adapters(model, lora.model_copy(update={"load_in_4bit": False}), run.seed)
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown, unknown
    return merged(model) if lora else model


def _make_plain(context: RunContext, gathered: Weights | None) -> None:
    """Replace a model that has shards, adapters or weights of 4 bits by one without."""
    if gathered is not None or context.run.four_bits:
        weights = trained_weights(context.model) if gathered is None else gathered
        if is_first():
            # An accelerator may have no room for it; it is read again from what is written.
            context.model = plain_model(context, weights)
    elif context.run.train.lora:
        context.model = merged(context.model)


def _teacher(context: RunContext) -> Teacher | None:
    """The untouched model beside the one that is trained, where the loss has a term to it."""
    weight = context.run.train.kl_weight
    if not weight:
        return None
    run = context.run
    return Teacher(load_model(run.model, context.model.device, context.dtype, four_bits=run.four_bits), weight)


def _examples(context: RunContext, count: int) -> TrainingExamples:
    run, data = context.run, context.data
    retrieval = retrieval_documents(context.tokenizer, vocabulary_size(context.model), data.sources)
    return data.training_examples(count, run.seed, retrieval, run.data.retrieval_share, run.window_length)
