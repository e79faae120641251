"""The run configuration: typed, strict, the same in YAML, on the command line and in Python."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Strict, model_validator

from skipwise.data.config import DataConfig, DocumentsConfig, SourceConfig
from skipwise.errors import UserError, nearest
from skipwise.evaluation.specs import EvaluationSpec
from skipwise.models.config import ModelConfig
from skipwise.positions import SAMPLERS, PoSE, Sampler
from skipwise.rope import Scaling, YaRN
from skipwise.training.config import TrainConfig
from skipwise.utils.sections import name_of
from skipwise.utils.settings import ByName, Length, Section, Seed, _named, expand_name

Positions = Annotated[Sampler, ByName, BeforeValidator(_named("pose"), json_schema_input_type=Sampler | str)]
Rope = Annotated[Scaling, ByName, BeforeValidator(_named("yarn"), json_schema_input_type=Scaling | str)]
Evaluation = Annotated[
    EvaluationSpec, ByName, BeforeValidator(expand_name, json_schema_input_type=EvaluationSpec | str)
]


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


def check_results_once(specs: tuple[EvaluationSpec, ...]) -> None:
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
    def _one_row_per_result(self) -> "RunConfig":
        check_results_once(self.evaluate or ())
        return self

    @model_validator(mode="after")
    def _for_skips_only(self) -> "RunConfig":
        if self.trains and self.train.echo_share and not self.positions.has_skips:
            raise UserError(
                f"train.echo_share is for windows with skips, but those of {self.positions} have none. Set it to 0.",
                code="windows_have_no_skips",
            )
        return self

    @property
    def trains(self) -> bool:
        """Whether there is any training."""
        return self.train.max_steps > 0

    @property
    def method(self) -> str:
        """`interpolate` without training, else the name of the sampler."""
        return self.positions.name if self.trains else "interpolate"


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
    def _one_row_per_result(self) -> "EvaluateConfig":
        check_results_once(self.evaluate or ())
        return self


METHODS = ("interpolate", *(name_of(cls) for cls in SAMPLERS))


def method_overrides(method: str) -> dict[str, Any]:
    """The configuration keys that `--method` stands for."""
    if method not in METHODS:
        raise UserError(
            f"--method must be a known method, not {method!r}.{nearest(method, METHODS)}", code="unknown_method"
        )
    return {"train": {"max_steps": 0}} if method == "interpolate" else {"positions": {"name": method}}
