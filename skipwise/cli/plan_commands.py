"""The commands for what to know before a training: plan, coverage, search."""

from pathlib import Path
from typing import Annotated, Any

import typer

from skipwise.cli.terminal import console
from skipwise.errors import UserError


def plan(
    model: Annotated[str, typer.Argument(help="Model directory, hub id, builtin:tiny, or a config.yaml.")],
    target: Annotated[str | None, typer.Option(help="Set the target length, e.g. 32k.")] = None,
    method: Annotated[str | None, typer.Option(help="Choose the method: {methods}.")] = None,
    steps: Annotated[int | None, typer.Option(help="Set the number of training steps.")] = None,
    train_length: Annotated[str | None, typer.Option(help="Set the tokens in a training window.")] = None,
    original: Annotated[
        str | None, typer.Option(help="Set the original length, if the model's config does not state it.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Set any key: section.key=value; repeatable.")] = None,
    devices: Annotated[int, typer.Option(help="Share the work among this many devices.", min=1)] = 1,
    zero: Annotated[
        int | None,
        typer.Option(help="Shard by this ZeRO stage; 3 is also FSDP.  \\[default: as configured]", min=0, max=3),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Plan for CPU training (adds allocator overhead).")] = False,
    device_memory: Annotated[
        float | None, typer.Option(help="Compare with this much memory of a device, in GB.", min=0.0)
    ] = None,
    flops: Annotated[
        float | None, typer.Option(help="Estimate time at this rate of a device, in FLOP/s, e.g. 150e12.", min=1.0)
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the rate of matmuls on this machine instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Estimate memory, FLOPs and time of training, and of training at full length. Needs no GPU, loads no weights."""
    import json
    from dataclasses import asdict

    from skipwise.config.files import parse_config, values_from_flags
    from skipwise.planning.plan import compare_costs, zero_stage
    from skipwise.report.plan import (
        COST_NOT_KNOWN,
        cost_rows,
        describe_costs,
        describe_parameters,
        explain_costs,
        plan_warnings,
    )

    if measure and flops:
        raise UserError(
            f"--measure finds the rate itself, so --flops {flops:g} cannot be kept. Leave one of them out.",
            code="flops_with_measure",
        )
    if steps == 0:
        raise UserError(
            "--steps 0 trains nothing, which costs nothing. Plan at least one step.", code="plan_without_training"
        )

    flags: dict[str, Any] = {
        "lengths": {"target": target, "train": train_length, "original": original},
        "train": {"max_steps": steps},
    }
    values = values_from_flags(model, flags, method, set_)
    values.setdefault("data", "builtin:python")  # costs do not depend on it
    config = parse_config(values)
    if not config.trains:
        raise UserError(
            "The method interpolate trains nothing, so it costs nothing. Plan another --method.",
            code="plan_without_training",
        )
    from skipwise.export.inspection import inspect_run

    info, run = inspect_run(config)
    lengths = run.lengths
    if measure:
        from skipwise.planning.machine import matmul_rate

        flops = matmul_rate(config.model.dtype)
    zero = zero_stage(config.train) if zero is None else zero
    hardware: dict[str, Any] = {"devices": devices, "zero": zero, "cpu": cpu}
    costs = [] if info.shape is None else compare_costs(run, info.shape, **hardware, flops_per_second=flops)
    notes = [*info.notes(), *([] if costs else [COST_NOT_KNOWN])]
    if as_json:
        about = {"model": config.model.path, **asdict(info.parameters), "original_length": info.windows.original}
        about |= {"current_length": info.windows.current, "target_length": lengths.target}
        about |= {"steps": config.train.max_steps, "devices": devices, "zero": zero, "flops_per_second": flops}
        print(json.dumps({**about, "costs": cost_rows(costs), "warnings": plan_warnings(lengths), "notes": notes}))
        return
    from skipwise.report.tables import plain_table, warning

    size = describe_parameters(info.parameters.total, info.parameters.active)
    of = f"{config.model.path}, {size}, {lengths.original:,} -> {lengths.target:,}"
    sharing = "" if (devices, zero) == (1, 0) else f", each of {devices} devices, ZeRO stage {zero}"
    memory = None if device_memory is None else device_memory * 1e9
    if costs:
        console.print(plain_table(f"{of}{sharing}", *describe_costs(costs, config.train.max_steps, memory)))
        if flops:
            console.print(f"at {flops:.3g} FLOP/s a device{', as measured here' if measure else ''}")
        windowed = info.layers is not None
        for line in explain_costs(run, costs, cpu=cpu, windowed=windowed, device_memory=memory):
            console.print(line)
    else:
        console.print(of)
    for line in notes:
        console.print(line)
    for line in plan_warnings(lengths):
        console.print(warning(line))


def coverage(
    target: Annotated[str, typer.Option(help="Set the target length, e.g. 16k.")],
    train_length: Annotated[str, typer.Option(help="Set the tokens in a training window.")],
    original: Annotated[
        str | None, typer.Option(help="Set the original length, if it is not the train length; only matched uses it.")
    ] = None,
    positions: Annotated[
        list[str] | None,
        typer.Option(help='Position sampler, repeatable: pose, "{name: pose, chunks: 3}".  \\[default: some of each]'),
    ] = None,
    windows: Annotated[int, typer.Option(help="Sample this many windows where there is no formula.", min=1)] = 1000,
    plot: Annotated[Path | None, typer.Option(help="Draw probability and pairs by distance, as an SVG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with a result for every distance.")] = False,
) -> None:
    """Show which relative distances position samplers cover, and after how many windows they cover all."""
    import json

    from skipwise.config.files import parse_assignment, parse_config
    from skipwise.lengths import Lengths
    from skipwise.positions.coverage import coverage as coverage_of
    from skipwise.report.plan import describe_coverages
    from skipwise.report.tables import plain_table

    found = {}
    for text in positions or ["plain", "pose", "{name: pose, chunks: 3}", "randpos", "full"]:
        # A configuration needs a model and data; nothing here depends on them.
        values: dict[str, Any] = {"model": {"path": "builtin:tiny"}, "data": "builtin:python"}
        named = {"target": target, "train": train_length, "original": original or train_length}
        values |= {"lengths": named, **parse_assignment(f"positions={text}")}
        config = parse_config(values)
        assert config.lengths.train is not None and config.lengths.original is not None
        lengths = Lengths(original=config.lengths.original, train=config.lengths.train, target=config.lengths.target)
        found[text] = coverage_of(config.positions, lengths, windows)
    if plot is not None:
        from skipwise.report.charts import coverages_chart
        from skipwise.report.page import write_picture

        write_picture(coverages_chart(found), plot)
    if as_json:
        print(json.dumps({text: one.as_dict() for text, one in found.items()}))
        return
    title = f"Relative distances of {lengths.target:,} in windows of {lengths.train:,}"
    console.print(plain_table(title, *describe_coverages(found)))
    console.print("~ of a sample of windows; the rest is exact")
