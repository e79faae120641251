"""What a run will do, from its configuration alone. No torch."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from skipwise.config.resolve import ResolvedRun
from skipwise.models.shape import ModelShape
from skipwise.planning.costs import Step, StepFlops, StepMemory, step_flops, step_memory
from skipwise.training.config import TrainConfig, read_deepspeed


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


def step_of(train: TrainConfig, window: int, teacher: bool) -> Step:
    """One training step.

    Args:
        train: settings of training.
        window: tokens in one window.
        teacher: whether the loss has a term to the untouched model.
    """
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
    run: ResolvedRun,
    *,
    parameters: int,
    active: int,
    shape: ModelShape | None,
    processes: int = 1,
    zero: int = 0,
    cpu: bool = False,
) -> Plan:
    """Derive every number of the plan.

    Args:
        run: settings of the run.
        parameters: parameters of the model.
        active: parameters that one token meets.
        shape: sizes of the model, where they are known.
        processes: processes that share the work.
        zero: stage of sharding among them.
        cpu: whether they run on a CPU.
    """
    lengths, window, steps = run.lengths, run.window_length, run.train.max_steps
    step = step_of(run.train, window, bool(run.train.kl_weight))
    windows = step.windows * step.accumulation * processes
    return Plan(
        model=run.model.path,
        method=run.method,
        rope=run.rope.name,
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
    run: ResolvedRun,
    shape: ModelShape,
    *,
    devices: int,
    zero: int,
    cpu: bool,
    flops_per_second: float | None,
) -> list[Cost]:
    """Costs of a step of the run, and of one at full length with the same number of windows.

    Args:
        run: settings of the run.
        shape: sizes of the model.
        devices: devices that share the work; each has windows of its own.
        zero: stage of sharding, 0 to 3.
        cpu: whether a device is a CPU.
        flops_per_second: FLOP/s of one device while it trains.
    """
    own = (run.method, run.window_length, bool(run.train.kl_weight))
    full = ("full", run.lengths.target, False)  # the untouched model cannot read such a window
    costs = []
    for method, window, teacher in dict.fromkeys((own, full)):
        step = step_of(run.train, window, teacher)
        flops = step_flops(shape, step)
        seconds = None if flops_per_second is None else flops.total / flops_per_second
        costs.append(Cost(method, step, flops, step_memory(shape, step, devices, zero, cpu), seconds))
    return costs
