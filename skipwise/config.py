"""The run configuration: typed, strict, the same in YAML, on the command line and in Python."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from skipwise.data.presets import expand_preset
from skipwise.errors import UserError, nearest
from skipwise.evaluation.specs import EvaluationSpec, Length
from skipwise.positions import SAMPLERS, PoSE, Sampler
from skipwise.rope import Mixed, Scaling, YaRN
from skipwise.sections import name_of


def expand_name(value: object) -> object:
    """`yarn` is short for `{name: yarn}`."""
    return {"name": value} if isinstance(value, str) else value


def _named(default: str) -> Callable[[object], object]:
    """`expand_name`, with a name for a section that only sets other keys."""

    def expand(value: object) -> object:
        value = expand_name(value)
        return {"name": default, **value} if isinstance(value, dict) else value

    return expand


ByName = Field(discriminator="name")
Positions = Annotated[Sampler, ByName, BeforeValidator(_named("pose"), json_schema_input_type=Sampler | str)]
Rope = Annotated[Scaling, ByName, BeforeValidator(_named("yarn"), json_schema_input_type=Scaling | str)]
Evaluation = Annotated[
    EvaluationSpec, ByName, BeforeValidator(expand_name, json_schema_input_type=EvaluationSpec | str)
]


def _to_float(value: object) -> object:
    """YAML 1.1 reads `1e-5` as a string; people mean the number."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


Number = Annotated[float, BeforeValidator(_to_float, json_schema_input_type=float | str)]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Share = Annotated[Number, Field(ge=0.0, le=1.0)]


# Far more than anyone trains, and little enough that the order of all windows can be drawn.
MOST_STEPS, MOST_WINDOWS = 1_000_000, 10_000


# What numpy takes.
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """A part of the configuration: frozen, and strict about keys and types."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ModelConfig(Section):
    """Which model, and how it is computed.

    Attributes:
        path: directory, hub id, `.gguf` file, or `builtin:tiny`.
        dtype: compute dtype. Weights are kept in float32 while training (small updates vanish in
            bfloat16). `auto` takes bfloat16 where the hardware multiplies it natively.
        attn_implementation: as in transformers; None leaves the choice to it.
        trust_remote_code: run code that comes with the model. Off unless asked for.
        revision: of a hub model.
    """

    path: str
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None


class LengthsConfig(Section):
    """Context lengths in tokens; `32k` means 32,768.

    Attributes:
        target: the window wanted.
        train: tokens per training window; None for the original window.
        original: the window of pretraining; None reads it from the model.
    """

    target: Length
    train: Length | None = None
    original: Length | None = None


class SourceConfig(Section):
    """One source of documents.

    Attributes:
        source: file, directory, hub dataset name, `builtin:python`, or a preset: `preset:gov-report`,
            `preset:proof-pile`, `preset:pg19`.
        weight: relative share of the training windows drawn from it.
        text_field: name of the text column in JSONL, Parquet and hub datasets.
        messages_field: name of a column of conversations instead: lists of messages with `role` and `content`, written
            with the tokenizer's chat template. There the loss is on what the assistant says.
        split: of a hub dataset.
        subset: of a hub dataset that has several (its configuration name).
        data_files: of a hub dataset, to read some of its files only.
        revision: of a hub dataset; name one to be sure of what is read.
        max_documents: read no more than this many; a stream larger than the disk is cut with it.
    """

    source: str
    weight: Annotated[Number, Field(gt=0.0)] = 1.0
    text_field: str = "text"
    messages_field: str | None = None
    split: str = "train"
    subset: str | None = None
    data_files: str | None = None
    revision: str | None = None
    max_documents: Annotated[int, Field(ge=1)] | None = None


class DocumentsConfig(Section):
    """Documents, some of them held out by the hash of their text.

    Attributes:
        sources: one or more; a single one may be written as `source: docs.jsonl`.
        held_out_share: share of the documents that evaluation sees; 1 for all of them, where nothing was trained on
            them.
        short_documents: leave documents as they are (`skip` those that are too short), or `join` neighbours with
            end-of-text tokens between.
        max_malformed_share: stop when more of a source's records than this cannot be read.
    """

    sources: Annotated[
        tuple[
            Annotated[SourceConfig, BeforeValidator(lambda v: _source(v), json_schema_input_type=SourceConfig | str)],
            ...,
        ],
        Strict(False),
    ]
    held_out_share: Annotated[Number, Field(gt=0.0, le=1.0)] = 1.0
    short_documents: Literal["skip", "join"] = "skip"
    max_malformed_share: Share = 0.01

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, value: object) -> object:
        """One `source` for a list of one; `text_field`, `messages_field` and `split` here for all."""
        if isinstance(value, str):
            return {"sources": [value]}
        if not isinstance(value, Mapping):
            return value
        if "source" in value and "sources" in value:
            raise UserError("data takes either `source` or `sources`, not both.", code="source_and_sources")
        shared = {key: value[key] for key in ("text_field", "messages_field", "split") if key in value}
        rest = {key: value[key] for key in value if key not in (*shared, "source")}
        sources = [value["source"]] if "source" in value else value.get("sources")
        if not isinstance(sources, list | tuple):
            return rest | shared
        named = [_source(source) for source in sources]
        return rest | {"sources": [{**shared, **one} if isinstance(one, Mapping) else one for one in named]}

    @model_validator(mode="after")
    def _not_empty(self) -> "DocumentsConfig":
        if not self.sources:
            raise UserError("data.sources must name at least one source. Give --data PATH.", code="no_sources")
        return self


class DataConfig(DocumentsConfig):
    """What is trained and evaluated on.

    Attributes:
        held_out_share: share of the documents kept for evaluation.
        min_document_tokens: shorter documents are skipped; None for what the sampler needs.
        retrieval_share: share of the training windows that are synthetic retrieval documents (facts
            hidden in text and asked for later, with the loss on the answer). Text alone makes
            a model forget how to retrieve.
    """

    held_out_share: Annotated[Number, Field(gt=0.0, lt=1.0)] = 0.05
    min_document_tokens: Length | None = None
    retrieval_share: Share = 0.25


def _source(value: object) -> object:
    named = {"source": value} if isinstance(value, str) else value
    return expand_preset(dict(named)) if isinstance(named, Mapping) else named


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
        target_growth: share of the training over which the target grows from the train length to its own; 0 for the
            whole target from the beginning.
        echo_share: share of the windows with skips in which tokens weigh as if the skipped text repeated
            them, so that the model learns to choose among as many as it will meet. Needs sdpa or eager attention.
        kl_weight: weight of a Kullback-Leibler term to the untouched model, which reads the same
            tokens at ordinary positions under its own RoPE; only up to the first gap in the text
            of a window. 0 switches it off (and saves a forward pass and a copy of the
            weights). None is 1 where a training window fits into the original window, and 0
            where the untouched model could not read it.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them: `true` all but
            what goes into a layer; `selective` what is cheap, and keep matrix products and attention.
        torch_compile: compile the layers for training.
        use_liger_kernel: train with the fused GPU kernels of `liger-kernel`.
        lora: train low-rank adapters instead of all weights; `{}` for the defaults.
        auto_find_batch_size: lower the batch of a device to what fits into its memory, and accumulate gradients over
            more of them, so that a step has as many windows as before.
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
    auto_find_batch_size: bool = False
    fsdp: bool = False
    deepspeed: str | None = None
    eval_steps: Annotated[int, Field(ge=1)] | None = None
    load_best_model_at_end: bool = False
    report_to: Annotated[tuple[Tracker, ...], Strict(False)] = ()
    untouched_share: Share = 0.25
    target_growth: Share = 0.0
    echo_share: Share = 0.0
    kl_weight: Annotated[Number, Field(ge=0.0)] | None = None

    @model_validator(mode="after")
    def _best_needs_evaluation(self) -> "TrainConfig":
        if self.load_best_model_at_end and (self.eval_steps is None or self.save_steps % self.eval_steps):
            raise UserError(
                "load_best_model_at_end needs eval_steps, with save_steps a multiple of it, but they are "
                f"{self.eval_steps} and {self.save_steps}.",
                code="best_model_needs_evaluation",
            )
        return self

    @model_validator(mode="after")
    def _one_engine(self) -> "TrainConfig":
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
        if self.auto_find_batch_size and (self.fsdp or self.deepspeed):
            raise UserError(
                "train.auto_find_batch_size tries a batch on a whole model, but fsdp and deepspeed shard it. Leave it "
                "out, and set per_device_train_batch_size and gradient_accumulation_steps.",
                code="batch_search_with_sharding",
            )
        return self

    @model_validator(mode="after")
    def _one_chooses_what_is_kept(self) -> "TrainConfig":
        if self.torch_compile and self.gradient_checkpointing == "selective":
            raise UserError(
                "torch_compile decides itself what to compute again, so gradient_checkpointing cannot be 'selective' "
                "with it. Leave one of them out.",
                code="selective_checkpointing_with_compile",
            )
        return self


def check_figures_once(specs: tuple[EvaluationSpec, ...]) -> None:
    """Raise `UserError` when an evaluation is asked for twice at a context length."""
    seen: set[tuple[str, int | None]] = set()
    for spec in specs:
        for length in spec.context_lengths:
            if (spec.name, length) in seen:
                at = "" if length is None else f" at {length:,} tokens"
                raise UserError(f"evaluate asks for {spec.name}{at} twice. Ask once.", code="duplicate_evaluation")
            seen.add((spec.name, length))


class RunConfig(Section):
    """One extension, whole.

    Attributes:
        positions: position sampler.
        rope: RoPE scaling.
        evaluate: what to measure before and after; None chooses perplexity and passkey at lengths
            from the original window to the target.
        stages: which models to measure.
        seed: of everything random.
    """

    model: ModelConfig
    lengths: LengthsConfig
    data: DataConfig
    positions: Positions = PoSE()
    rope: Rope = YaRN()
    train: TrainConfig = TrainConfig()
    evaluate: Annotated[tuple[Evaluation, ...], Strict(False)] | None = None
    stages: Annotated[tuple[Literal["original", "interpolated", "extended"], ...], Strict(False)] = (
        "original",
        "interpolated",
        "extended",
    )
    seed: Seed = 0

    @model_validator(mode="after")
    def _one_row_per_figure(self) -> "RunConfig":
        check_figures_once(self.evaluate or ())
        return self

    @model_validator(mode="after")
    def _for_skips_only(self) -> "RunConfig":
        one_chunk = isinstance(self.positions, PoSE) and self.positions.chunks == 1
        if one_chunk or self.method in ("plain", "full"):
            for key in ("echo_share", "target_growth"):
                if getattr(self.train, key):
                    raise UserError(
                        f"train.{key} is for windows with skips, but those of {self.positions} have none. Set it to 0.",
                        code="windows_have_no_skips",
                    )
        return self

    @model_validator(mode="after")
    def _batches_that_stay(self) -> "RunConfig":
        if self.train.auto_find_batch_size and isinstance(self.rope, Mixed):
            raise UserError(
                "With rope 'mixed' the windows of a batch are of one kind, so another batch would draw other windows. "
                "Leave train.auto_find_batch_size out.",
                code="batch_search_with_mixed_rope",
            )
        return self

    @property
    def method(self) -> str:
        """`interpolate` when nothing is trained, else the sampler's name."""
        return "interpolate" if self.train.max_steps == 0 else self.positions.name


class EvaluateConfig(Section):
    """What `skipwise evaluate` measures on every model it is given.

    Attributes:
        data: documents to score and to take haystacks from.
        evaluate: what to measure; None chooses perplexity and passkey at a quarter, half and all of the longest window.
        dtype: compute dtype, as for `model.dtype`.
        attn_implementation: as in transformers; None leaves the choice to it.
        trust_remote_code: run code that comes with a model. Off unless asked for.
        chat: put prompts through the chat template of the tokenizer.
        seed: of prompts and of the choice of documents.
    """

    data: DocumentsConfig = DocumentsConfig(sources=(SourceConfig(source="builtin:python"),), held_out_share=0.05)
    evaluate: Annotated[tuple[Evaluation, ...], Strict(False)] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    chat: bool = False
    seed: Seed = 0

    @model_validator(mode="after")
    def _one_row_per_figure(self) -> "EvaluateConfig":
        check_figures_once(self.evaluate or ())
        return self


METHODS = ("interpolate", *(name_of(cls) for cls in SAMPLERS))


def method_overrides(method: str) -> dict[str, Any]:
    """The configuration keys that `--method` stands for."""
    if method not in METHODS:
        raise UserError(
            f"--method must be a known method, not {method!r}.{nearest(method, METHODS)}", code="unknown_method"
        )
    return {"train": {"max_steps": 0}} if method == "interpolate" else {"positions": {"name": method}}
