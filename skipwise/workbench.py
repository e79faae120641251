"""Model, tokenizer and data of one extension, and what is done with them. Everything here needs torch."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.status import Status
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging as transformers_logging

from skipwise.config import RunConfig, TrainConfig
from skipwise.data.chat import begin_of_text
from skipwise.data.held_out import HeldOut, choose_documents, held_out_documents
from skipwise.data.retrieval import RetrievalDocuments
from skipwise.data.sentences import sentences_of
from skipwise.data.store import Documents, TokenStore
from skipwise.data.tokenised import open_sources
from skipwise.data.windows import Source, TrainingExamples, WindowCollator, cut_spans, with_answers
from skipwise.duration import EVALUATION, measure_evaluation, measure_training
from skipwise.errors import UserError
from skipwise.evaluation.runner import evaluate
from skipwise.evaluation.specs import EvalResult, EvaluationSpec, Perplexity, Stage, TruncatedPerplexity
from skipwise.evaluation.unit import ConsoleSay, Setting, Subject
from skipwise.export.card import model_card
from skipwise.export.checkpoint import save_checkpoint
from skipwise.export.proof import proof_loss, prove, randomness_kept
from skipwise.lengths import Lengths
from skipwise.models.load import check_vocabulary, default_device, load_model, load_tokenizer, vocabulary_size
from skipwise.models.probe import probe_attention, probe_score_mask
from skipwise.models.recompute import recompute_activations
from skipwise.models.rope import live_rope, rotary_tables, set_rope_scaling
from skipwise.models.speedups import usable_attention, usable_dtype, usable_speedups, use_liger
from skipwise.models.windowed import check_windows
from skipwise.planning import window_tokens
from skipwise.positions import LongRecipe
from skipwise.ranks import from_first, is_first, join_processes, world_size
from skipwise.rope import Mixed
from skipwise.runs import RunDir, write_json
from skipwise.training.adapters import add_adapters, check_adapters, merged, trained_weights
from skipwise.training.batch import step_on, with_fitting_batch
from skipwise.training.builds import check_builds
from skipwise.training.callbacks import ProgressBar, StopOnSignal, TrainLog
from skipwise.training.trainer import Teacher, check_loss, train, training_arguments

# Windows on which the loss is watched during training.
EVAL_WINDOWS = 32
# Their order takes 16 bytes each.
MOST_EXAMPLES = 2**28
# Where a model is written once, for a moment, in the run directory.
PROOF = ".proof-"


@contextmanager
def _place_to_prove(run: RunDir) -> Iterator[Path]:
    """Where a model is written before it is proven, beside that of the run; gone in the end."""
    for leftover in run.path.glob(f"{PROOF}*"):  # of a run that was killed meanwhile
        shutil.rmtree(leftover, ignore_errors=True)
    with TemporaryDirectory(dir=run.path, prefix=PROOF) as directory:
        yield Path(directory) / "model"


@dataclass
class Workbench:
    """What `extend` works with; only `model` changes over a run."""

    config: RunConfig
    lengths: Lengths
    console: Console
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    frequencies_before: list[float]
    sources: list[Source]
    held_out_sources: list[Source]
    held_out: HeldOut
    data_summary: dict[str, Any]

    def interpolate(self) -> None:
        """Give the model its new RoPE."""
        set_rope_scaling(self.model, self.config.rope, self.lengths)

    def check(self) -> None:
        """Ask the model, before anything is spent on it, for what evaluation and training rely on.

        Raises:
            UserError: when attention is cut at a skip, its logits are not those of one linear layer, or there
                is nothing to watch the loss on.
        """
        if self.config.method != "interpolate" and self.config.train.echo_share:
            probe_score_mask(self.model, self.dtype)  # first: other attention may be compiled when it is first used
        check_loss(self.model)
        self._say_unreached()
        if self.config.train.lora:
            check_adapters(self.model, self.config.train.lora)
        if self.config.train.eval_steps:
            self._eval_examples()
        if self.config.method != "interpolate":
            training = self.config.train
            self.model.train()
            # Some backends take another path for a batch of one, which the batch may become.
            wanted = training.per_device_train_batch_size
            for batch in {wanted, 1} if training.auto_find_batch_size else {wanted}:
                probe_attention(self.model, self.lengths.target, batch, dtype=self.dtype)
            self.console.print("attention reaches across a skip, and sees how far it is: checked")
            layers = check_windows(self.model, self.lengths.target, self.dtype) if self._has_skips else None
            if layers is not None:
                self.console.print(layers.describe(), highlight=False)
            self.model.eval()

    def _say_unreached(self) -> None:
        """Before anything is spent: context lengths for which no held-out document is long enough."""
        of_text = [spec for spec in self.config.evaluate or () if isinstance(spec, Perplexity | TruncatedPerplexity)]
        for spec in of_text if self.config.stages else ():
            lengths, ids = spec.context_lengths, spec.document_ids
            least = spec.min_document_tokens if ids is None else None
            _, reached = choose_documents(self.held_out.documents, lengths, spec.documents, 0, least, ids)
            if unreached := sorted(set(lengths) - set(reached)):
                self.console.print(
                    f"no {spec.name} at {', '.join(f'{length:,}' for length in unreached)} tokens: no held-out "
                    "document is that long. Give longer documents, raise data.held_out_share, or set "
                    "data.short_documents=join.",
                    highlight=False,
                )

    def evaluate(
        self, run: RunDir, stage: Stage, name: str, window: int, specs: tuple[EvaluationSpec, ...], status: Status
    ) -> Iterator[list[EvalResult]]:
        """Rows of everything not done yet, as they come."""
        subject = Subject(self.model, self.tokenizer, stage, name, window, self.dtype)
        setting = Setting(self.held_out, self.config.seed, run.shared, ConsoleSay(self.console, status))
        return evaluate(subject, specs, setting, run.examples(stage), run.measured(stage, name))

    def expected_seconds(self, parts: Sequence[str]) -> dict[str, float]:
        """Seconds that each part of a run takes on this machine, measured with the model; empty where not known."""
        config, seconds = self.config.train, dict.fromkeys(parts, 0.0)
        if world_size() > 1 or config.lora or config.fsdp or config.deepspeed:
            return {}  # only a wrapped model would tell
        evaluated = [part for part in parts if part.startswith(EVALUATION)]
        if evaluated:
            one = measure_evaluation(self.model, self.config.evaluate or (), self.dtype)
            if one is None:
                return {}
            seconds.update(dict.fromkeys(evaluated, one))
        if "train" in parts:
            step = measure_training(
                self.model,
                window=window_tokens(self.config.method, self.lengths),
                windows=config.per_device_train_batch_size * config.gradient_accumulation_steps,
                dtype=self.dtype,
                kl_weight=config.kl_weight or 0.0,
                skips=self._has_skips,
                echoes=bool(config.echo_share),
            )
            if step is None:
                return {}
            seconds["train"] = step * config.max_steps
        return seconds

    def train(self, run: RunDir, *callbacks: TrainerCallback) -> bool:
        """Train to the end or to a signal; a model written before is loaded instead.

        Args:
            run: where checkpoints and the log go.
            callbacks: more of them, besides progress, log and signals.

        Returns:
            Whether training came to its end.
        """
        config = self.config.train
        if from_first(is_first() and (run.model / "config.json").is_file()):
            if is_first():
                self._load_trained(run)
            return True
        teacher = self._teacher()
        if config.lora:
            torch.manual_seed(self.config.seed)  # for their first weights
            self.model = add_adapters(self.model, config.lora)
        if config.auto_find_batch_size:
            config = self._with_fitting_batch(config, teacher)
        arguments = training_arguments(config, run.checkpoints, self.config.seed, self.dtype, self.model.device)
        windows_per_step = arguments.train_batch_size * config.gradient_accumulation_steps * arguments.world_size
        tokens_per_step = windows_per_step * window_tokens(self.config.method, self.lengths)
        trained = train(
            model=self.model,
            arguments=arguments,
            dataset=self._examples(config.max_steps * windows_per_step),
            collator=self._collator(),
            eval_dataset=self._eval_examples() if config.eval_steps else None,
            callbacks=[
                ProgressBar(self.console, tokens_per_step),
                TrainLog(run.train_log, tokens_per_step),
                StopOnSignal(),
                *callbacks,
            ],
            teacher=teacher,
            dtype=self.dtype,
            say=lambda line: self.console.print(line, highlight=False),
            on_first_step=lambda weights: self._prove(run, weights),
            compiled=config.torch_compile,
            lean=config.gradient_checkpointing is True,
        )
        if trained.finished:
            self._make_plain(trained.weights)
        self.model.eval()
        return trained.finished

    def _with_fitting_batch(self, config: TrainConfig, teacher: Teacher | None) -> TrainConfig:
        """The batch that fits, said aloud."""
        window = window_tokens(self.config.method, self.lengths)
        trial = step_on(self.model, window, self.dtype, teacher, skips=self._has_skips, echoes=bool(config.echo_share))
        config = with_fitting_batch(config, trial, self.model.device)
        self.console.print(
            f"batch: {config.per_device_train_batch_size} windows at a time, "
            f"{config.gradient_accumulation_steps} times a step",
            highlight=False,
        )
        return config

    def _collator(self) -> WindowCollator:
        """What draws the windows."""
        training = self.config.train
        return WindowCollator(
            self.config.positions,
            self.lengths,
            self.config.seed,
            training.untouched_share,
            training.echo_share,
            mark_text=True,
            whole_batches=isinstance(self.config.rope, Mixed),
            sentences=sentences_of(self.tokenizer) if isinstance(self.config.positions, LongRecipe) else None,
            target_growth=training.target_growth,
        )

    def _make_plain(self, gathered: dict[str, torch.Tensor] | None) -> None:
        """Leave a model without shards, adapters or weights of 4 bits, where there is one to be left."""
        if gathered is not None or self._four_bits:
            weights = trained_weights(self.model) if gathered is None else gathered
            if is_first():
                # An accelerator may have no room for it; it is read again from what is written.
                self.model = self._plain_model(weights)
        elif self.config.train.lora:
            self.model = merged(self.model)

    def _plain_model(self, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
        """A model without shards, adapters or weights of 4 bits, with these trained weights, on the CPU."""
        lora = self.config.train.lora
        model = load_model(self.config.model, torch.device("cpu"))
        set_rope_scaling(model, self.config.rope, self.lengths)
        if lora:
            model = add_adapters(model, lora.model_copy(update={"load_in_4bit": False}))
        unknown = model.load_state_dict(weights, strict=False).unexpected_keys
        assert not unknown, unknown
        return merged(model) if lora else model

    def _prove_written(self, path: Path, loss: float, tables: dict[str, nn.Module]) -> None:
        """Compare what was written with the loss and the rotary tables of what was in memory."""
        prove(path, loss, self.tokenizer, tables, self.lengths, trust_remote_code=self.config.model.trust_remote_code)

    def _prove(self, run: RunDir, gathered: dict[str, torch.Tensor] | None) -> None:
        """Write the model once, as at the end, and read it back as a stranger would; nothing of that is left.

        Args:
            gathered: the weights of a model that several processes share; None where this one has them all.
        """
        if not is_first():
            return
        with self.console.status("writing the model once, to see that it can be read"), randomness_kept():
            model = self.model
            if gathered is not None or self.config.train.lora:
                model = self._plain_model(trained_weights(self.model) if gathered is None else gathered)
            # Weights in 4 bits are others than those that are written.
            loss = proof_loss(model if gathered is not None or self._four_bits else self.model)
            with _place_to_prove(run) as path:
                save_checkpoint(model, self.tokenizer, path, self.lengths, card="")
                tables = rotary_tables(model)
                del model  # before it is read: there may be no room for two
                self._prove_written(path, loss, tables)
        self.console.print("After step 1 the model was written and read back with transformers: it is the same.")

    def _teacher(self) -> Teacher | None:
        if not self.config.train.kl_weight:
            return None
        model = load_model(self.config.model, self.model.device, self.dtype, four_bits=self._four_bits)
        return Teacher(model, self.config.train.kl_weight)

    def save(self, run: RunDir) -> None:
        """Write the checkpoint, unless it is there."""
        if is_first() and not (run.model / "config.json").is_file():
            card = model_card(self.config, self.lengths)
            # Before the model: nothing may claim another one later.
            write_json(run.rope, {**live_rope(self.model, self.lengths), "before": self.frequencies_before})
            if self.config.method == "interpolate":
                with _place_to_prove(run) as path:
                    save_checkpoint(self.model, self.tokenizer, path, self.lengths, card)
                    self._prove_written(path, proof_loss(self.model), rotary_tables(self.model))
                    path.rename(run.model)  # only then: --resume takes the model that is there
            else:  # read back after the first step
                save_checkpoint(self.model, self.tokenizer, run.model, self.lengths, card)
            if self.model.device.type != default_device().type or self._four_bits:
                self._load_trained(run)

    def _load_trained(self, run: RunDir) -> None:
        trained = self.config.model.model_copy(update={"path": str(run.model), "revision": None})
        self.model = load_model(trained, default_device(), four_bits=self._four_bits)

    @property
    def _has_skips(self) -> bool:
        return self.config.method not in ("plain", "full")

    @property
    def _four_bits(self) -> bool:
        return in_four_bits(self.config)

    def _examples(self, count: int) -> TrainingExamples:
        if count > MOST_EXAMPLES:
            raise UserError(
                f"A run has at most {MOST_EXAMPLES:,} windows, since their order is drawn at its start, but {count:,} "
                "are asked for. Lower train.max_steps or the batch.",
                code="too_many_windows",
            )
        share = self.config.data.retrieval_share
        retrieval = retrieval_documents(self.tokenizer, vocabulary_size(self.model), self.sources)
        length = window_tokens(self.config.method, self.lengths)
        begin = begin_of_text(self.tokenizer)
        return TrainingExamples(self.sources, count, self.config.seed, begin, retrieval, share, length)

    def _eval_examples(self) -> TrainingExamples:
        if not any(len(source.spans) for source in self.held_out_sources):
            raise UserError(
                "eval_steps needs a held-out document as long as a training window, but there is none. "
                "Raise data.held_out_share, lower the train length, or leave train.eval_steps out.",
                code="held_out_documents_too_short",
            )
        usable = [source for source in self.held_out_sources if len(source.spans)]
        # As at the end of the training: what counts is the target, also while it grows.
        return TrainingExamples(usable, EVAL_WINDOWS, self.config.seed, begin_of_text(self.tokenizer), progress=1.0)


def open_workbench(config: RunConfig, lengths: Lengths, console: Console) -> Workbench:
    """Load the model and tokenise the data of a resolved configuration.

    Raises:
        UserError: when they do not fit each other, or no document is long enough.
    """
    if config.data.retrieval_share and config.method != "interpolate" and window_tokens(config.method, lengths) < 32:
        raise UserError(
            f"Retrieval documents need a training window of 32 tokens, but it has {lengths.train}. "
            "Raise the train length, or set data.retrieval_share to 0.",
            code="window_too_short_for_retrieval",
        )
    _check_processes(config.train)
    if config.train.deepspeed:
        check_builds(several_hosts=world_size() > int(os.environ.get("LOCAL_WORLD_SIZE", world_size())))
    join_processes(default_device(), deepspeed=bool(config.train.deepspeed))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tokenizer = load_tokenizer(config.model)
    stores = open_sources(config.data, tokenizer, console)
    begin = begin_of_text(tokenizer)
    sources = _cut(config, lengths, [store.train for store in stores], len(begin))
    if config.method != "interpolate":
        _check_long_enough(config, lengths, stores, sources, len(begin), console)
    model_config, lines = usable_attention(config.model, default_device())
    config = config.model_copy(update={"model": model_config})
    with console.status("loading the model"):
        model = load_model(config.model, default_device(), four_bits=in_four_bits(config))
    used = max(part.largest_id() for store in stores for part in (store.train, store.held_out))
    check_vocabulary(model, tokenizer, used)
    dtype, more = usable_dtype(config.model, model, model.device)
    lines += more
    if config.method != "interpolate":
        train_config, more = usable_speedups(config.train, model, model.device)
        config = config.model_copy(update={"train": train_config})
        lines += more
        _speed_up(model, config.train)
    for line in lines:
        console.print(line, highlight=False)
    return Workbench(
        config=config,
        lengths=lengths,
        console=console,
        model=model,
        tokenizer=tokenizer,
        dtype=dtype,
        frequencies_before=live_rope(model, lengths)["long"],
        sources=[source for source in sources if len(source.spans)],
        held_out_sources=_cut(config, lengths, [store.held_out for store in stores], len(begin)),
        held_out=HeldOut(
            "held-out " + ", ".join(source.source for source in config.data.sources),
            held_out_documents([[store.held_out] for store in stores], config.data.short_documents == "join", begin),
        ),
        data_summary={"sources": [store.summary for store in stores]},
    )


def in_four_bits(config: RunConfig) -> bool:
    """Whether weights are kept in 4 bits, which only adapters can be trained on."""
    lora = config.train.lora
    return config.method != "interpolate" and lora is not None and lora.load_in_4bit


def _speed_up(model: PreTrainedModel, config: TrainConfig) -> None:
    """What is done to the model itself, before the probe looks at it."""
    if config.use_liger_kernel:
        use_liger(model)
    if config.gradient_checkpointing:
        recompute_activations(model, "selective" if config.gradient_checkpointing == "selective" else "all")


def _check_processes(config: TrainConfig) -> None:
    """Refuse what the Trainer would make of several accelerators in one process: copies of the model in threads; and
    shards of one process.
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


def _cut(config: RunConfig, lengths: Lengths, parts: list[Documents], begin: int) -> list[Source]:
    """Pieces of documents; `begin` tokens go in front of each later."""
    needed = config.positions.tokens_needed(lengths) - begin
    used = config.positions.tokens_used(lengths) - begin
    shortest = max(needed, config.data.min_document_tokens or 0)
    join = config.data.short_documents == "join"
    return [
        Source(part, with_answers(part, cut_spans(part, needed, used, join, shortest)), source.weight)
        for source, part in zip(config.data.sources, parts, strict=True)
    ]


def _check_long_enough(
    config: RunConfig,
    lengths: Lengths,
    stores: list[TokenStore],
    sources: list[Source],
    begin: int,
    console: Console,
) -> None:
    """Say how many documents are too short; refuse a source that has no other."""
    shortest = max(config.positions.tokens_needed(lengths) - begin, config.data.min_document_tokens or 0)
    for store, source in zip(stores, sources, strict=True):
        join = config.data.short_documents == "join"
        short = 0 if join else int((store.train.lengths < shortest).sum())
        name = store.summary["source"]
        if not len(source.spans):
            raise UserError(
                f"Method {config.method!r} needs documents of at least {shortest:,} tokens, but the longest training "
                f"document of {name} has {int(store.train.lengths.max(initial=0)):,}. Lower --train-length, give "
                f"longer documents{'' if join else ', or set data.short_documents=join'}.",
                code="documents_too_short",
            )
        store.summary["too_short"] = short
        if short:
            console.print(f"{name}: {short:,} documents below {shortest:,} tokens are left out", highlight=False)


def retrieval_documents(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, sources: list[Source], copies_share: float = 0.25
) -> RetrievalDocuments:
    """Synthetic retrieval documents with filler from the training text, and of tokens below `vocabulary`."""
    weights = np.array([source.weight for source in sources])

    def prose(rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        source = sources[rng.choice(len(sources), p=weights / weights.sum())]
        begin, end = source.spans[rng.integers(len(source.spans))]
        start = rng.integers(begin, max(begin, end - count), endpoint=True)
        return np.resize(source.documents.read(int(start), int(min(start + count, end))), count)

    return RetrievalDocuments(
        encode=lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        bos=begin_of_text(tokenizer),
        special=frozenset(tokenizer.all_special_ids),
        vocabulary_size=min(len(tokenizer), vocabulary),
        prose=prose,
        copies_share=copies_share,
    )
