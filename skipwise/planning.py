"""What a run will do, from its configuration alone. No torch."""

from dataclasses import asdict, dataclass
from typing import Any

from skipwise.lengths import Lengths, format_length


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that its cost depends on.

    Attributes:
        parameters: number of weights, tied ones once.
        layers, hidden_size, heads: as in the model's config.
    """

    parameters: int
    layers: int
    hidden_size: int
    heads: int


@dataclass(frozen=True)
class Plan:
    """A run in numbers.

    Attributes:
        window_tokens: tokens in one training window (the target length for the method `full`).
        attention_saving: how many times fewer attention scores a window has than one of target length.
        train_flops: 6 FLOPs per weight and token (Kaplan et al., arXiv 2001.08361, Section 2.1) plus
            12 per layer, width and pair of tokens for attention, halved by the causal mask.
    """

    model: str
    method: str
    rope: str
    original_length: int
    train_length: int
    target_length: int
    factor: float
    steps: int
    windows_per_step: int
    window_tokens: int
    train_tokens: int
    attention_saving: float
    parameters: int
    train_flops: float

    def as_dict(self) -> dict[str, Any]:
        """A plain dictionary, ready for JSON."""
        return asdict(self)


def window_tokens(method: str, lengths: Lengths) -> int:
    """Tokens in one training window."""
    return lengths.target if method == "full" else lengths.train


def train_flops(shape: ModelShape, tokens: int, window: int) -> float:
    """FLOPs of training on `tokens` tokens in windows of `window`.

    >>> train_flops(ModelShape(parameters=1000, layers=2, hidden_size=8, heads=1), tokens=100, window=10)
    696000.0
    """
    return float(tokens * (6 * shape.parameters + 6 * shape.layers * shape.hidden_size * window))


def make_plan(
    *, model: str, method: str, rope: str, lengths: Lengths, shape: ModelShape, steps: int, windows_per_step: int
) -> Plan:
    """Derive every figure of the plan."""
    window = window_tokens(method, lengths)
    tokens = steps * windows_per_step * window
    return Plan(
        model=model,
        method=method,
        rope=rope,
        original_length=lengths.original,
        train_length=lengths.train,
        target_length=lengths.target,
        factor=lengths.factor,
        steps=steps,
        windows_per_step=windows_per_step,
        window_tokens=window,
        train_tokens=tokens,
        attention_saving=(lengths.target / window) ** 2,
        parameters=shape.parameters,
        train_flops=train_flops(shape, tokens, window),
    )


def describe_plan(plan: Plan) -> list[tuple[str, str]]:
    """The plan as (what, how much) pairs for people."""
    rows = [
        ("model", f"{plan.model} ({plan.parameters / 1e6:,.1f} M parameters)"),
        (
            "context window",
            f"{plan.original_length:,} -> {plan.target_length:,} tokens ({format_length(plan.original_length)} -> "
            f"{format_length(plan.target_length)}, factor {plan.factor:g})",
        ),
        ("method, RoPE", f"{plan.method}, {plan.rope}"),
    ]
    if plan.method != "interpolate":
        rows += [
            ("training", f"{plan.steps:,} steps of {plan.windows_per_step} windows of {plan.window_tokens:,} tokens"),
            ("tokens", f"{plan.train_tokens:,}, about {plan.train_flops:.2g} FLOPs"),
            ("attention", f"{plan.attention_saving:,.0f} times fewer scores per window than at full length"),
        ]
    return rows
