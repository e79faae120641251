"""What a run will do, from its configuration alone. No torch."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from skipwise.config import LengthsConfig, RunConfig, TrainConfig
from skipwise.config_files import read_deepspeed
from skipwise.costs import LOGIT_ROWS, Step, StepFlops, StepMemory, step_flops, step_memory
from skipwise.errors import UserError
from skipwise.lengths import Lengths, format_length
from skipwise.models.shape import ModelShape
from skipwise.positions import PositionSampler

# The largest that the PoSE paper reports: 2k to 128k (its abstract).
LARGEST_FACTOR = 64
COST_NOT_KNOWN = (
    "What a step costs is known for dense decoders in the layout of Llama. This model is of another kind, such as a "
    "mixture of experts; extend trains it all the same."
)


@dataclass(frozen=True)
class Plan:
    """A run in numbers.

    Attributes:
        window_tokens: tokens in one training window (the target length for the method `full`).
        attention_saving: how many times fewer attention scores a window has than one of target length.
        parameters: number of weights, tied ones once.
        active: those that one token meets; fewer with a mixture of experts.
        train_flops: of all steps (`costs.step_flops`); None for models whose costs are not known.
        peak_memory: bytes of one device at the height of a step (`costs.step_memory`); None likewise, and without one.
        cpu: whether a device is one, whose heap holds more than is in use.
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
    active: int
    train_flops: float | None
    peak_memory: float | None
    cpu: bool

    def as_dict(self) -> dict[str, Any]:
        """A plain dictionary, ready for JSON."""
        return asdict(self)


def window_tokens(method: str, lengths: Lengths) -> int:
    """Tokens in one training window."""
    return lengths.target if method == "full" else lengths.train


def step_of(config: RunConfig, window: int, teacher: bool) -> Step:
    """One training step of a run, in windows of so many tokens."""
    train = config.train
    return Step(
        window=window,
        windows=train.per_device_train_batch_size,
        accumulation=train.gradient_accumulation_steps,
        checkpointing=train.gradient_checkpointing,
        teacher=teacher,
        adapter_rank=train.lora.r if train.lora else 0,
        embeddings_trained=bool(train.lora and train.lora.train_norms_and_embeddings),
        four_bits=bool(train.lora and train.lora.load_in_4bit),
    )


def zero_stage(train: TrainConfig) -> int:
    """The stage of sharding that a configuration asks for; FSDP shards as stage 3 does."""
    if train.deepspeed is None:
        return 3 if train.fsdp else 0
    stage: int = read_deepspeed(Path(train.deepspeed))["zero_optimization"]["stage"]
    return stage


def make_plan(
    *,
    model: str,
    method: str,
    rope: str,
    lengths: Lengths,
    parameters: int,
    active: int,
    shape: ModelShape | None,
    steps: int,
    step: Step,
    processes: int = 1,
    zero: int = 0,
    cpu: bool = False,
) -> Plan:
    """Derive every figure of the plan.

    Args:
        parameters: of the model.
        active: those that one token meets.
        shape: its sizes, where they are known.
        step: what one process does in one of the steps.
        processes: that share the work.
        zero: stage of sharding among them.
        cpu: whether they run on one.
    """
    window = window_tokens(method, lengths)
    windows = step.windows * step.accumulation * processes
    return Plan(
        model=model,
        method=method,
        rope=rope,
        original_length=lengths.original,
        train_length=lengths.train,
        target_length=lengths.target,
        factor=lengths.factor,
        steps=steps,
        windows_per_step=windows,
        window_tokens=window,
        train_tokens=steps * windows * window,
        attention_saving=(lengths.target / window) ** 2,
        parameters=parameters,
        active=active,
        train_flops=None if shape is None else steps * processes * step_flops(shape, step).total,
        peak_memory=None if shape is None or not steps else step_memory(shape, step, processes, zero, cpu).peak,
        cpu=cpu,
    )


def describe_plan(plan: Plan) -> list[tuple[str, str]]:
    """The plan as (what, how much) pairs for people."""
    rows = [
        ("model", f"{plan.model} ({describe_parameters(plan.parameters, plan.active)})"),
        (
            "context window",
            f"{plan.original_length:,} -> {plan.target_length:,} tokens ({format_length(plan.original_length)} -> "
            f"{format_length(plan.target_length)}, factor {plan.factor:g})",
        ),
        ("method, RoPE", f"{plan.method}, {plan.rope}"),
    ]
    if plan.method == "interpolate":
        rows.append(("training", "none: only the RoPE is rescaled"))
    else:
        rows += [
            ("training", f"{plan.steps:,} steps of {plan.windows_per_step} windows of {plan.window_tokens:,} tokens"),
            (
                "tokens",
                f"{plan.train_tokens:,}" + (f", about {plan.train_flops:.2g} FLOPs" if plan.train_flops else ""),
            ),
        ]
        if plan.window_tokens < plan.target_length:
            fewer = f"{plan.attention_saving:,.{0 if plan.attention_saving >= 10 else 2}f}"
            rows.append(("attention", f"{fewer} times fewer scores per window than at full length"))
        if plan.peak_memory is not None:
            heap = " (with a CPU's heap, without Python and its libraries)" if plan.cpu else ""
            rows.append(("memory", f"{format_bytes(plan.peak_memory)} of each device at the height of a step{heap}"))
    return rows


def describe_parameters(total: int, active: int) -> str:
    """`"134.5 M parameters"`, and with a mixture of experts also those that one token meets."""
    of_token = "" if active == total else f", {active / 1e6:,.1f} M of them active"
    return f"{total / 1e6:,.1f} M parameters{of_token}"


def doubts(lengths: Lengths) -> list[str]:
    """What to say of a target before it is paid for."""
    if lengths.factor <= LARGEST_FACTOR:
        return []
    return [
        f"A factor of {lengths.factor:,.5g} is beyond {LARGEST_FACTOR}, the largest of the PoSE paper. Measure a "
        "smaller target first, or begin with a model that has a longer window."
    ]


@dataclass(frozen=True)
class Cost:
    """What one step takes, in PoSE's windows or at full length.

    Attributes:
        method: `pose` and the like, or `full`.
        step: the step of one device.
        flops: of one device.
        memory: of one device.
        seconds: of a step; None where the speed is not known.
    """

    method: str
    step: Step
    flops: StepFlops
    memory: StepMemory
    seconds: float | None


def compare_costs(
    config: RunConfig,
    lengths: Lengths,
    shape: ModelShape,
    *,
    devices: int,
    zero: int,
    cpu: bool,
    flops_per_second: float | None,
) -> list[Cost]:
    """A step of the run, and one at full length with the same number of windows.

    Args:
        lengths: the resolved three.
        shape: of the model.
        devices: that share the work; each has windows of its own.
        zero: stage of sharding, 0 to 3.
        cpu: whether a device is one.
        flops_per_second: that one device reaches while it trains.
    """
    costs = []
    for method in dict.fromkeys((config.method, "full")):
        window = window_tokens(method, lengths)
        wanted = config.train.kl_weight
        teacher = window <= lengths.original if wanted is None else wanted > 0 and method == config.method
        step = step_of(config, window, teacher)
        flops = step_flops(shape, step)
        seconds = None if flops_per_second is None else flops.total / flops_per_second
        costs.append(Cost(method, step, flops, step_memory(shape, step, devices, zero, cpu), seconds))
    return costs


class Wanted(Protocol):
    """What a run wants; a `RunConfig` is one."""

    @property
    def lengths(self) -> LengthsConfig:
        """Target, and train and original where they are set."""

    @property
    def positions(self) -> PositionSampler:
        """The position sampler."""


def resolve_target(config: Wanted, first: int, current: int) -> Lengths:
    """The three lengths of a run on a model with this first window, and this one now.

    Raises:
        UserError: when the target is not above them, or the sampler cannot work with them.
    """
    original = config.lengths.original or first
    target = config.lengths.target
    if target <= current:
        raise UserError(
            f"The target must be above the model's window of {current:,} tokens, but it is {target:,}. "
            f"Raise --target, for example to {2 * current:,}.",
            code="target_not_above_window",
        )
    if target <= original:
        raise UserError(
            f"The target must be above the original length, but {target:,} <= {original:,}. "
            "Raise --target, or lower lengths.original.",
            code="target_not_above_original",
        )
    lengths = Lengths(original=original, train=config.lengths.train or original, target=target)
    config.positions.check(lengths)
    return lengths


def explain_costs(
    config: RunConfig, costs: list[Cost], *, cpu: bool, windowed: bool, device_memory: float | None
) -> list[str]:
    """What the table leaves unsaid, a line each.

    Args:
        cpu: whether a device is one.
        windowed: whether some of the model's layers see only the last tokens.
    """
    teacher = any(cost.step.teacher for cost in costs)
    lines = [
        "Memory of a CPU, with what its heap holds beyond what is in use."
        if cpu
        else "Memory of an accelerator; a CPU needs more (--cpu).",
        "Peak: gradients come as activations go, so only the larger of both counts, but both with accumulation.",
        f"Logits: of {LOGIT_ROWS} tokens at a time{' (of the teacher, too)' * teacher}, and the gradient of the output "
        "embedding.",
    ]
    if teacher:
        lines.append(
            "Teacher: the untouched model; training keeps close to it in windows that are short enough for it. "
            "train.kl_weight=0 does without."
        )
    if any(cost.seconds is not None for cost in costs):
        lines.append("Seconds: as if all ran at that rate; a whole step takes about half as long again.")
    if config.train.lora:
        lines.append("Adapters: beside all matrices of layers; what they keep of activations is not counted.")
    uncounted = [name for name in ("torch_compile", "use_liger_kernel") if getattr(config.train, name)]
    if config.model.attn_implementation == "eager":
        uncounted.append("the scores that eager attention keeps")
    if windowed:
        uncounted.append(
            "that some layers see only the last tokens, and their mask (a byte for each pair of tokens of a window)"
        )
    if uncounted:
        lines.append(f"Not counted: {', '.join(uncounted)}.")
    if device_memory is not None:
        lines.append("Drivers and fragments take some memory more, which is not counted.")
        if any(cost.memory.peak > device_memory for cost in costs):
            lines.append(
                "What does not fit may with train.gradient_checkpointing=true, a smaller "
                "train.per_device_train_batch_size, a shorter --train-length, or --zero 3 on more --devices."
            )
    return lines


def cost_rows(costs: list[Cost]) -> list[dict[str, Any]]:
    """The costs as plain dictionaries, ready for JSON; bytes and seconds of a step."""
    return [{**asdict(cost), "peak_bytes": cost.memory.peak, "total_flops": cost.flops.total} for cost in costs]


def describe_costs(costs: list[Cost], steps: int, device_memory: float | None) -> tuple[list[str], list[list[str]]]:
    """Header and body of a table, a column for each method.

    Args:
        costs: of `compare_costs`.
        steps: of the run, for its whole time.
        device_memory: bytes that a device has.
    """
    rows = [["tokens of a step", *(f"{c.step.windows * c.step.accumulation} x {c.step.window:,}" for c in costs)]]
    for name in ("products", "attention"):
        rows.append([f"FLOPs of a step: {name}", *(f"{getattr(c.flops, name):.2e}" for c in costs)])
    for name in ("weights", "copies", "optimizer", "teacher", "gradients", "activations", "logits", "buffers", "peak"):
        values = [getattr(c.memory, name) for c in costs]
        if any(values):
            rows.append([f"memory: {name}", *(format_bytes(value) for value in values)])
    if device_memory is not None:
        fits = ("yes" if c.memory.peak <= device_memory else "no" for c in costs)
        rows.append([f"fits into {format_bytes(device_memory)}", *fits])
    times = [c.seconds for c in costs if c.seconds is not None]
    if times:
        rows.append(["seconds of a step", *(f"{seconds:,.2f}" for seconds in times)])
        rows.append([f"hours of {steps:,} steps", *(f"{seconds * steps / 3600:,.2f}" for seconds in times)])
    return ["", *(cost.method for cost in costs)], rows


def format_bytes(size: float) -> str:
    """`"13.5 GB"`, `"410 MB"`: thousands, as memory is sold."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"
