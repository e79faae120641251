"""Load what the steps of a run share: model, tokenizer and documents."""

import os
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from skipwise.config.resolve import ResolvedRun
from skipwise.data.held_out import choose_documents
from skipwise.data.mixture import Mixture, open_mixture
from skipwise.errors import UserError
from skipwise.evaluation.specs import on_documents
from skipwise.models.load import (
    check_vocabulary,
    default_device,
    load_model,
    load_tokenizer,
    usable_attention,
    usable_dtype,
)
from skipwise.models.probe import probe_score_mask
from skipwise.models.rope import live_rope, set_rope_scaling
from skipwise.training.adapters import check_adapters
from skipwise.training.builds import check_builds
from skipwise.training.config import TrainConfig
from skipwise.training.preparation import apply_settings, check_attention
from skipwise.training.trainer import check_loss
from skipwise.utils.distributed import join_processes, world_size


@dataclass
class RunContext:
    """What the steps of a run share. Steps change `model` and nothing else.

    Attributes:
        run: settings, without those that this machine or model cannot follow.
        console: console for progress.
        model: model in its state after the last step.
        tokenizer: tokenizer of the model.
        dtype: compute dtype.
        data: documents.
        frequencies_before: inverse frequencies of the model's RoPE before the run.
    """

    run: ResolvedRun
    console: Console
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    data: Mixture
    frequencies_before: list[float]

    def interpolate(self) -> None:
        """Give the model its new RoPE."""
        set_rope_scaling(self.model, self.run.rope, self.run.lengths)

    def check(self) -> None:
        """Check, before any time is spent, what evaluation and training rely on.

        Raises:
            UserError: when attention is cut at a skip, the loss cannot be computed in chunks, or no held-out document
                is long enough to watch the loss on.
        """
        run, train = self.run, self.run.train
        if run.trains and train.echo_share:
            probe_score_mask(self.model, self.dtype)  # first: other attention may be compiled when it is first used
        check_loss(self.model)
        self._print_unreached_lengths()
        if train.lora:
            check_adapters(self.model, train.lora)
        if train.eval_steps:
            self.data.watched_examples(run.seed)
        if run.trains:
            batches = [train.per_device_train_batch_size]
            for line in check_attention(self.model, run.positions, run.lengths.target, batches, self.dtype):
                self.console.print(line, highlight=False)

    def _print_unreached_lengths(self) -> None:
        """Print context lengths that are skipped, since no held-out document is that long."""
        for spec in self.run.evaluate if self.run.stages else ():
            documents = on_documents(spec)
            if documents is None or spec.traits.other_model is not None:  # whose tokens count there
                continue
            lengths, ids = documents.context_lengths, documents.document_ids
            least = documents.min_document_tokens if ids is None else None
            held_out = self.data.held_out.documents
            _, reached = choose_documents(held_out, lengths, documents.documents, 0, least, ids)
            if unreached := sorted(set(lengths) - set(reached)):
                self.console.print(
                    f"no {spec.name} at {', '.join(f'{length:,}' for length in unreached)} tokens: no held-out "
                    "document is that long. Give longer documents, raise data.held_out_share, or set "
                    "data.short_documents=join.",
                    highlight=False,
                )


def open_context(run: ResolvedRun, console: Console) -> RunContext:
    """Load the model and open the documents of a run.

    Raises:
        UserError: when they do not fit each other, or no document is long enough.
    """
    _check_processes(run.train)
    if run.train.deepspeed:
        check_builds(several_hosts=world_size() > int(os.environ.get("LOCAL_WORLD_SIZE", world_size())))
    join_processes(default_device(), deepspeed=bool(run.train.deepspeed))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tokenizer = load_tokenizer(run.model)
    data = open_mixture(run.data, run.positions, run.lengths, tokenizer, console, trains=run.trains)
    model_config, lines = usable_attention(run.model, default_device())
    run = replace(run, model=model_config)
    with console.status("loading the model"):
        model = load_model(run.model, default_device(), four_bits=run.four_bits)
    check_vocabulary(model, tokenizer, data.largest_id)
    dtype, more = usable_dtype(run.model, model, model.device)
    lines += more
    if run.trains:
        train_config, more = apply_settings(model, run.train)
        run = replace(run, train=train_config)
        lines += more
    for line in lines:
        console.print(line, highlight=False)
    return RunContext(run, console, model, tokenizer, dtype, data, live_rope(model, run.lengths)["long"])


def _check_processes(config: TrainConfig) -> None:
    """Refuse shards of one process, and several accelerators in one process, where the Trainer would put copies of the
    model into threads.
    """
    if config.fsdp and world_size() == 1:
        raise UserError(
            "train.fsdp shards a model among processes, but there is one. Start the same command as torchrun "
            "--nproc_per_node N -m skipwise, or leave train.fsdp out.",
            code="launcher_missing",
        )
    count = torch.accelerator.device_count()
    if world_size() == 1 and count > 1:
        raise UserError(
            f"A process takes one accelerator, but there are {count}. Start the same command as torchrun "
            f"--nproc_per_node {count} -m skipwise, or set CUDA_VISIBLE_DEVICES=0.",
            code="more_devices_than_processes",
        )
