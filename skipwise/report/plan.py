"""Plans, costs and coverage in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from skipwise.config.resolve import ResolvedRun
from skipwise.lengths import Lengths, format_length
from skipwise.planning.costs import LOGIT_ROWS
from skipwise.planning.plan import Cost, Plan
from skipwise.positions.coverage import Coverage
from skipwise.utils.files import format_bytes

# The largest that the PoSE paper reports: 2k to 128k (its abstract).
LARGEST_FACTOR = 64

COST_NOT_KNOWN = (
    "What a step costs is known for dense decoders in the layout of Llama. This model is of another kind, such as a "
    "mixture of experts; extend trains it all the same."
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
    if not plan.steps:
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


def plan_warnings(lengths: Lengths) -> list[str]:
    """What to say of a target before it is paid for."""
    if lengths.factor <= LARGEST_FACTOR:
        return []
    return [
        f"A factor of {lengths.factor:,.5g} is beyond {LARGEST_FACTOR}, the largest of the PoSE paper. Measure a "
        "smaller target first, or begin with a model that has a longer window."
    ]


def explain_costs(
    run: ResolvedRun, costs: list[Cost], *, cpu: bool, windowed: bool, device_memory: float | None
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
    if run.train.lora:
        lines.append("Adapters: beside all matrices of layers; what they keep of activations is not counted.")
    uncounted = [name for name in ("torch_compile", "use_liger_kernel") if getattr(run.train, name)]
    if run.model.attn_implementation == "eager":
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
    for name in ("matmuls", "attention"):
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


def describe_coverages(found: Mapping[str, Coverage]) -> tuple[list[str], list[list[str]]]:
    """Header and body of a table, a column for each sampler.

    Pairs are counted by quarters of the target: what share of a window's pairs is how far apart.
    """
    rows = [["seen, the rarest distance", *(_mark(one.seen_exact, f"{one.seen.min():.2g}") for one in found.values())]]
    for quarter in range(4):
        name = f"pairs, {('first', 'second', 'third', 'last')[quarter]} quarter of distances"
        shares = [np.array_split(one.pairs, 4)[quarter].sum() / one.pairs.sum() for one in found.values()]
        rows.append(
            [name, *(_mark(one.pairs_exact, f"{share:.1%}") for one, share in zip(found.values(), shares, strict=True))]
        )
    cover = [
        f"{one.windows_to_cover:,}" if one.windows_to_cover else "never" if one.seen_exact else "more than drawn"
        for one in found.values()
    ]
    seen = [_mark(one.seen_exact, text) for one, text in zip(found.values(), cover, strict=True)]
    rows.append(["windows until all are seen, 99 %", *seen])
    return ["", *found], rows


def _mark(exact: bool, text: str) -> str:
    return text if exact else f"~{text}"
