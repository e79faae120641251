"""Decide what a run's settings leave open, once its model is known."""

from dataclasses import dataclass
from typing import get_args

from skipwise.config.run import LengthsConfig, RunConfig
from skipwise.data.config import DataConfig
from skipwise.errors import UserError
from skipwise.evaluation.passkey import Passkey
from skipwise.evaluation.perplexity import Perplexity
from skipwise.evaluation.results import Stage
from skipwise.evaluation.specs import EvaluationSpec
from skipwise.lengths import Lengths
from skipwise.models.config import ModelConfig
from skipwise.positions import Sampler
from skipwise.rope import Scaling
from skipwise.training.config import TrainConfig


@dataclass(frozen=True)
class ResolvedRun:
    """Every setting of a run, decided. Each step of the run takes its own section.

    Attributes:
        model: settings of the model.
        data: settings of the documents.
        positions: position sampler.
        rope: RoPE scaling.
        train: settings of training, with the weight of the teacher.
        evaluate: evaluations of every stage.
        stages: stages to evaluate.
        seed: seed of everything random.
        lengths: original, train and target length.
        current_length: window of the model before the run, in tokens.
    """

    model: ModelConfig
    data: DataConfig
    positions: Sampler
    rope: Scaling
    train: TrainConfig
    evaluate: tuple[EvaluationSpec, ...]
    stages: tuple[Stage, ...]
    seed: int
    lengths: Lengths
    current_length: int

    @property
    def trains(self) -> bool:
        """Whether there is any training."""
        return self.train.max_steps > 0

    @property
    def method(self) -> str:
        """`interpolate` without training, else the name of the sampler."""
        return self.positions.name if self.trains else "interpolate"

    @property
    def window_length(self) -> int:
        """Tokens in one training window."""
        return self.positions.window_length(self.lengths)

    @property
    def four_bits(self) -> bool:
        """Whether weights are kept in 4 bits, which only adapters can be trained on."""
        lora = self.train.lora
        return self.trains and lora is not None and lora.load_in_4bit

    @property
    def measured_stages(self) -> tuple[Stage, ...]:
        """Stages that are evaluated, in order: without training there is no extended one."""
        possible = [stage for stage in get_args(Stage) if self.trains or stage != "extended"]
        return tuple(stage for stage in possible if self.evaluate and stage in self.stages)

    @property
    def steps(self) -> tuple[str, ...]:
        """Steps of the run by name, in order."""
        before = tuple(f"evaluate {stage}" for stage in self.measured_stages if stage != "extended")
        after = tuple(f"evaluate {stage}" for stage in self.measured_stages if stage == "extended")
        return (*before, "train" if self.trains else "write", *after)

    def as_config(self) -> RunConfig:
        """The configuration that `resolved.yaml` holds."""
        lengths = LengthsConfig(target=self.lengths.target, train=self.lengths.train, original=self.lengths.original)
        return RunConfig(
            model=self.model,
            lengths=lengths,
            data=self.data,
            positions=self.positions,
            rope=self.rope,
            train=self.train,
            evaluate=self.evaluate,
            stages=self.stages,
            seed=self.seed,
        )


def resolve(config: RunConfig, original: int, current: int) -> ResolvedRun:
    """Decide what a configuration leaves open.

    Args:
        config: settings as given.
        original: window of the model's pretraining, in tokens, where `config.lengths.original` does not say it.
        current: window of the model now, in tokens.

    Raises:
        UserError: when the target is not above these windows, the sampler cannot work with the lengths, or the teacher
            cannot read a training window.
    """
    lengths = resolve_lengths(config.lengths, original, current)
    config.positions.check(lengths)
    weight = teacher_weight(config.train.kl_weight, config.positions.window_length(lengths), lengths.original)
    return ResolvedRun(
        model=config.model,
        data=config.data,
        positions=config.positions,
        rope=config.rope,
        train=config.train.model_copy(update={"kl_weight": weight}),
        evaluate=default_evaluations(lengths) if config.evaluate is None else config.evaluate,
        stages=config.stages,
        seed=config.seed,
        lengths=lengths,
        current_length=current,
    )


def resolve_lengths(config: LengthsConfig, original: int, current: int) -> Lengths:
    """Original, train and target length of a run.

    Args:
        config: lengths as given.
        original: window of the model's pretraining, in tokens, where `config.original` does not say it.
        current: window of the model now, in tokens.

    Raises:
        UserError: when the target is not above them.
    """
    original = config.original or original
    if config.target <= current:
        raise UserError(
            f"The target must be above the model's window of {current:,} tokens, but it is {config.target:,}. "
            f"Raise --target, for example to {2 * current:,}.",
            code="target_not_above_window",
        )
    if config.target <= original:
        raise UserError(
            f"The target must be above the original length, but {config.target:,} <= {original:,}. "
            "Raise --target, or lower lengths.original.",
            code="target_not_above_original",
        )
    return Lengths(original=original, train=config.train or original, target=config.target)


def default_evaluations(lengths: Lengths) -> tuple[EvaluationSpec, ...]:
    """Perplexity and passkey at the original window, its doublings, and the target."""
    doublings = [max(2, lengths.original)]
    while doublings[-1] * 2 < lengths.target:
        doublings.append(doublings[-1] * 2)
    at = tuple(dict.fromkeys((*doublings, lengths.target)))
    final = min(1024, max(1, lengths.original // 2))
    return (
        Perplexity(context_lengths=at, stride=max(1, final // 2), documents=8, final_tokens=final),
        Passkey(context_lengths=at, trials=20),
    )


def teacher_weight(wanted: float | None, window: int, original: int) -> float:
    """Weight of the Kullback-Leibler term to the untouched model, which must be able to read a training window.

    Args:
        wanted: weight as given; None for 1 where the untouched model can read a window, else 0.
        window: tokens in a training window.
        original: window of the untouched model, in tokens.

    Raises:
        UserError: when the term is asked for and the window is too long.
    """
    fits = window <= original
    if wanted and not fits:
        raise UserError(
            f"train.kl_weight needs windows that the untouched model can read, but they have {window:,} tokens "
            f"and its window {original:,}. Leave train.kl_weight out or set it to 0.",
            code="kl_window_exceeds_original",
        )
    return float(fits) if wanted is None else wanted
