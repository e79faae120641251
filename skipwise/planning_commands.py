"""The commands for what to know before a training: plan, coverage, search."""

from pathlib import Path
from typing import Annotated, Any

import typer

from skipwise.errors import UserError
from skipwise.terminal import console


def plan(
    model: Annotated[str, typer.Argument(help="Model directory, hub id, builtin:tiny, or a config.yaml.")],
    target: Annotated[str | None, typer.Option(help="Window wanted, e.g. 32k.")] = None,
    method: Annotated[str | None, typer.Option(help="One of {methods}.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    train_length: Annotated[str | None, typer.Option(help="Tokens in a training window.")] = None,
    original: Annotated[str | None, typer.Option(help="Window of pretraining, where the config does not say.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any key: section.key=value; repeatable.")] = None,
    devices: Annotated[int, typer.Option(help="That share the work.", min=1)] = 1,
    zero: Annotated[
        int | None, typer.Option(help="ZeRO stage; 3 is also FSDP.  \\[default: of the configuration]", min=0, max=3)
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Devices are CPUs, whose heap holds more than is in use.")] = False,
    device_memory: Annotated[float | None, typer.Option(help="Of a device, in GB.", min=0.0)] = None,
    flops: Annotated[
        float | None, typer.Option(help="FLOP/s a device reaches in training, e.g. 150e12.", min=1.0)
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine's matrix products instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what training in mixed bfloat16 takes, beside training at full length. Needs no GPU and loads no weights."""
    import json
    from dataclasses import asdict

    from skipwise.config_files import parse_config, values_from_flags
    from skipwise.planning import (
        COST_NOT_KNOWN,
        compare_costs,
        cost_rows,
        describe_costs,
        describe_parameters,
        doubts,
        explain_costs,
        zero_stage,
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
    if config.method == "interpolate":
        raise UserError(
            "The method interpolate trains nothing, so it costs nothing. Plan another --method.",
            code="plan_without_training",
        )
    from skipwise.extension import inspect_run  # imports torch, so what can be wrong without it comes first

    info, lengths = inspect_run(config)
    if measure:
        from skipwise.models.speed import products_per_second

        flops = products_per_second(config.model.dtype)
    zero = zero_stage(config.train) if zero is None else zero
    hardware: dict[str, Any] = {"devices": devices, "zero": zero, "cpu": cpu}
    costs = [] if info.shape is None else compare_costs(config, lengths, info.shape, **hardware, flops_per_second=flops)
    notes = [*info.notes(), *([] if costs else [COST_NOT_KNOWN])]
    if as_json:
        about = {"model": config.model.path, **asdict(info.parameters), "original_length": info.windows.original}
        about |= {"current_length": info.windows.current, "target_length": lengths.target}
        about |= {"steps": config.train.max_steps, "devices": devices, "zero": zero, "flops_per_second": flops}
        print(json.dumps({**about, "costs": cost_rows(costs), "doubts": doubts(lengths), "notes": notes}))
        return
    from skipwise.report.table import plain_table, warning

    size = describe_parameters(info.parameters.total, info.parameters.active)
    of = f"{config.model.path}, {size}, {lengths.original:,} -> {lengths.target:,}"
    sharing = "" if (devices, zero) == (1, 0) else f", each of {devices} devices, ZeRO stage {zero}"
    memory = None if device_memory is None else device_memory * 1e9
    if costs:
        console.print(plain_table(f"{of}{sharing}", *describe_costs(costs, config.train.max_steps, memory)))
        if flops:
            console.print(f"at {flops:.3g} FLOP/s a device{', as measured here' if measure else ''}")
        windowed = info.layers is not None
        for line in explain_costs(config, costs, cpu=cpu, windowed=windowed, device_memory=memory):
            console.print(line)
    else:
        console.print(of)
    for line in notes:
        console.print(line)
    for line in doubts(lengths):
        console.print(warning(line))


def coverage(
    target: Annotated[str, typer.Option(help="Window wanted, e.g. 16k.")],
    train_length: Annotated[str, typer.Option(help="Tokens in a training window.")],
    original: Annotated[
        str | None, typer.Option(help="Window of pretraining, if it is not the train length; for matched.")
    ] = None,
    positions: Annotated[
        list[str] | None,
        typer.Option(help='Position sampler, repeatable: pose, "{name: pose, chunks: 3}".  \\[default: some of each]'),
    ] = None,
    windows: Annotated[int, typer.Option(help="To draw where there is no formula.", min=1)] = 1000,
    plot: Annotated[Path | None, typer.Option(help="Draw both by distance, as an SVG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the figures of every distance.")] = False,
) -> None:
    """Say which relative distances position samplers show to a model, and after how many windows all of them."""
    import json

    from skipwise.config_files import parse_assignment, parse_config
    from skipwise.coverage import coverage as coverage_of
    from skipwise.coverage import describe_coverages
    from skipwise.lengths import Lengths
    from skipwise.report.table import plain_table

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
        from skipwise.report.coverage import draw_coverages

        draw_coverages(found, plot)
    if as_json:
        print(json.dumps({text: one.as_dict() for text, one in found.items()}))
        return
    title = f"Relative distances of {lengths.target:,} in windows of {lengths.train:,}"
    console.print(plain_table(title, *describe_coverages(found)))
    console.print("~ of a sample of windows; the rest is exact")


def search(
    model: Annotated[str, typer.Argument(help="Model directory, hub id, builtin:tiny, or a run's config.yaml.")],
    target: Annotated[str | None, typer.Option(help="Window wanted, e.g. 32k.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Text for filler, as for extend; repeatable.")] = None,
    fitness: Annotated[str, typer.Option(help="Loss of what: needles (answers) or text (all tokens).")] = "needles",
    documents: Annotated[int, typer.Option(help="Of the target length.", min=1)] = 8,
    generations: Annotated[int, typer.Option(help="Of the evolution.", min=1)] = 8,
    population: Annotated[int, typer.Option(help="Candidates of a generation.", min=1)] = 12,
    seed: Annotated[int | None, typer.Option(help="Of documents and evolution.")] = None,
    output: Annotated[Path, typer.Option(help="Where losses and the result are kept.")] = Path("runs/search"),
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any key of a run; repeatable.")] = None,
) -> None:
    """Search factors of the RoPE scaling 'mixed' for a model, without training. Goes on where it was interrupted."""
    from typing import cast, get_args

    from skipwise.config_files import parse_config, values_from_flags
    from skipwise.errors import nearest
    from skipwise.search import Fitness, Search, search_factors

    kinds = get_args(Fitness)
    if fitness not in kinds:
        raise UserError(
            f"--fitness is {' or '.join(kinds)}, not {fitness!r}.{nearest(fitness, kinds)}", code="unknown_choice"
        )
    flags: dict[str, Any] = {
        "lengths": {"target": target},
        "data": {"sources": data or None},
        "rope": {"name": "mixed"},
        "seed": seed,
    }
    config = parse_config(values_from_flags(model, flags, None, set_))
    wanted = Search(cast("Fitness", fitness), documents, generations, population)
    file = search_factors(config, wanted, output, console)
    console.print(f"Found: {file}. Use its rope section in a configuration.")
