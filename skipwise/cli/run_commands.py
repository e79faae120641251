"""Commands that run something long: extend, evaluate, study, demo, search."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from skipwise.cli.report_commands import report
from skipwise.cli.terminal import console
from skipwise.errors import UserError
from skipwise.utils.distributed import is_first


def extend(
    model: Annotated[str, typer.Argument(help="Model directory, hub id, .gguf file, builtin:tiny, or a config.yaml.")],
    target: Annotated[
        str | None, typer.Option(help="Set the target length, e.g. 32k. Required unless a config.yaml sets it.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Train on this file, directory, hub dataset or builtin:python. Required unless a config.yaml sets it."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the run to this directory.  \\[default: runs/MODEL-TARGET-METHOD]")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Choose the method: {methods}.")] = None,
    rope: Annotated[str | None, typer.Option(help="Choose the RoPE scaling: {scalings}.")] = None,
    steps: Annotated[int | None, typer.Option(help="Set the number of training steps.")] = None,
    train_length: Annotated[str | None, typer.Option(help="Set the tokens in a training window.")] = None,
    original: Annotated[
        str | None, typer.Option(help="Set the original length, if the model's config does not state it.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Set the random seed.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Set any key: section.key=value; repeatable.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output directory.")] = False,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep the last training checkpoints after the run.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Extend a model's context window, and evaluate it before and after."""
    from skipwise.config.files import parse_config, values_from_flags

    flags: dict[str, Any] = {
        "lengths": {"target": target, "train": train_length, "original": original},
        "data": {"sources": data or None},
        "rope": {"name": rope},
        "train": {"max_steps": steps},
        "seed": seed,
    }
    if method == "interpolate" and steps:
        raise UserError(
            f"--method interpolate trains nothing, so --steps {steps} cannot be kept. Leave one of them out.",
            code="steps_for_untrained_method",
        )
    values = values_from_flags(model, flags, method, set_)
    config = parse_config(values)

    import yaml

    from skipwise.report.page import write_report
    from skipwise.report.tables import comparison_table, stage_columns
    from skipwise.runs.directory import RunDir
    from skipwise.workflows.extend import extend as run_extension

    run = output or Path("runs") / f"{_short(config.model.path)}-{config.lengths.target}-{config.method}"
    rows = run_extension(
        config,
        run,
        given=yaml.safe_dump(values, sort_keys=False),
        console=console,
        resume=resume,
        dry_run=dry_run,
        keep_checkpoints=keep_checkpoints,
    )
    if not dry_run:
        console.print(f"Model: {run / 'model'}")
    if rows:
        title = f"{config.model.path}, target {config.lengths.target:,}, rope {config.rope.name}"
        console.print(comparison_table(title, stage_columns(rows, trained=config.method)))
        for reason in sorted({row.reason for row in rows if row.status == "failed" and row.reason}):
            console.print(f"failed: {reason}")
        console.print(f"Results: {run / 'results.jsonl'}")
    if is_first() and not dry_run:
        write_report([run], RunDir(run).report)
        console.print(f"Report: {RunDir(run).report}")


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Models or runs: directory, hub id, .gguf file, builtin:tiny.")],
    config: Annotated[
        Path | None, typer.Option(help="Read settings from this YAML file: data, evaluate, seed, chat, dtype.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run only these evaluations: {evaluations}.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Evaluate at these context lengths, e.g. 4k,8k.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Evaluate on these documents: file, directory, hub dataset, preset:pg19.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write rows, examples and the report to this directory.")] = None,
    chat: Annotated[bool | None, typer.Option("--chat", help="Apply the tokenizer's chat template to prompts.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Set the random seed of prompts and of the choice of documents.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Set a key, e.g. passkey.trials=20 or dtype=float32; repeatable.")
    ] = None,
) -> None:
    """Evaluate models side by side. Results that the output directory holds are not measured again."""
    from skipwise.config.files import merge, only_given, parse_assignment, parse_evaluate_config, read_yaml
    from skipwise.evaluation.results import result_key
    from skipwise.report.evaluation import write_evaluation_page
    from skipwise.report.tables import comparison_table, depth_table, difference_table, evaluation_markdown
    from skipwise.runs.directory import RunDir
    from skipwise.utils.files import read_json, write_text
    from skipwise.workflows import evaluation_arguments as request
    from skipwise.workflows.evaluate import compare
    from skipwise.workflows.side_by_side import side_by_side

    found = request.find_models(models)
    values = request.values_of_run(found) if config is None else read_yaml(config)
    if config is None and values:
        console.print("evaluations, seed and documents are those of the first run")
    flags: dict[str, Any] = {"data": {"sources": data or None}, "chat": chat, "seed": seed}
    if data:
        values.pop("data", None)  # the documents of a run are those it held out; others are used whole
    values = merge(values, only_given(flags))
    settings = []
    for assignment in set_ or []:
        head, _, rest = assignment.partition(".")
        if head in request.NAMES:
            ((key, value),) = parse_assignment(rest).items()
            settings.append((head, key, value))
        else:
            values = merge(values, parse_assignment(assignment))
    names = [name.strip() for given in only or [] for name in given.split(",")]
    chosen = [length.strip() for length in lengths.split(",")] if lengths else []
    values["evaluate"] = request.select_evaluations(values.get("evaluate"), names, chosen, settings)
    parsed = parse_evaluate_config(values)
    directory = output or request.default_output(found)
    rows = compare(found, parsed, directory, given=request.as_given(values), console=console)
    asked = {result_key(row) for row in rows}
    shown = side_by_side(directory, [one.name for one in found], asked)
    console.print(comparison_table("Evaluation", shown.columns))
    for heading, own in shown.columns.items():
        grid = depth_table(heading, own)
        if grid is not None:
            console.print(grid)
    if shown.differences:
        console.print(difference_table(shown.first, shown.differences))
    whole = side_by_side(directory)
    files = RunDir(directory)
    write_text(files.table, evaluation_markdown(whole.columns, whole.first, whole.differences))
    environment = read_json(files.environment)
    write_evaluation_page(
        whole.columns, whole.first, whole.differences,
        command=f"skipwise {str(environment.get('command', '')).partition(' ')[2]}",
        config=files.resolved.read_text(encoding="utf-8"), environment=environment, output=files.report,
    )  # fmt: skip
    console.print(f"Rows and examples: {directory}")
    console.print(f"Report: {files.report}", soft_wrap=True)
    if not any(row.value is not None for row in rows):
        raise UserError("Nothing could be measured; the reasons are above.", code="nothing_measured")


def study(
    file: Annotated[Path, typer.Argument(help="Study file (YAML): base, methods, seeds, domains.")],
    output: Annotated[Path | None, typer.Option(help="Write cells, tables and plots to this directory.")] = None,
    jobs: Annotated[
        int, typer.Option(help="Run this many cells at a time, each with its share of cores or GPUs.", min=1)
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cost of the study and stop.")] = False,
    print_commands: Annotated[
        bool, typer.Option("--print-commands", help="Print a command for each unfinished cell and stop.")
    ] = False,
    summary: Annotated[
        bool, typer.Option("--summary", help="Write tables and plots of the finished cells and stop.")
    ] = False,
    cell: Annotated[str | None, typer.Option(help="Run this cell only, in this process.")] = None,
) -> None:
    """Compare methods at the same budget, with several seeds and tuned learning rates. Resumes where it stopped."""
    from skipwise.report.page import write_picture
    from skipwise.report.study import study_markdown, write_study_page
    from skipwise.report.tables import plain_table
    from skipwise.runs.environment import without_directories
    from skipwise.study import run as study_run
    from skipwise.utils.files import write_text

    opened = study_run.open_study(file, output or Path("runs") / file.stem, written=summary)
    if not (summary or dry_run or print_commands):  # which need no texts
        study_run.check_sources(opened)
    if print_commands:
        for line in study_run.print_commands(opened):
            print(line)
        return
    if dry_run:
        header = ["", "cells", "finished", "trained", "steps", "tokens", "FLOPs"]
        console.print(plain_table(f"Study {file}", header, study_run.cost_rows(opened)))
        return
    if cell is not None:
        study_run.run_one(opened, cell, console)
        return
    failure = None
    if not summary:
        try:
            study_run.run_study(opened, jobs, console)
        except UserError as error:
            failure = error
    results, losses, environments = study_run.write_summary(opened)
    directory = opened.directory
    text = study_markdown(results)
    write_text(directory.table, text)
    page = directory.path / "report.html"
    command = shlex.join(["skipwise", "study", *map(without_directories, (str(file), "--output", str(directory.path)))])
    charts = write_study_page(results, losses, command, file.read_text(encoding="utf-8"), environments, page)
    for chart in charts:
        if chart.spec is not None:
            write_picture(chart, directory.path / "plots" / f"{chart.key}.svg")
    console.print(text, soft_wrap=True)
    console.print(f"Tables and plots: {directory.path}")
    console.print(f"Report: {page}")
    if failure is not None:
        raise failure


def demo(
    output: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what the directory holds already and do the rest.")
    ] = False,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls", help="Also run the controls: the new RoPE without training, training without skips."
        ),
    ] = False,
) -> None:
    """Extend the embedded model to 16 times its window; evaluate it before and after. Takes minutes on two cores."""
    from skipwise.workflows.demo import run_demo

    runs = run_demo(output, console, resume, controls)
    report(runs, output / "report.html")


def search(
    model: Annotated[str, typer.Argument(help="Model directory, hub id, builtin:tiny, or a run's config.yaml.")],
    target: Annotated[str | None, typer.Option(help="Set the target length, e.g. 32k.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Take filler text from this source, as for extend; repeatable.")
    ] = None,
    fitness: Annotated[
        str, typer.Option(help="Minimise the loss of needles (answers) or text (all tokens).")
    ] = "needles",
    documents: Annotated[int, typer.Option(help="Set the number of documents of the target length.", min=1)] = 8,
    generations: Annotated[int, typer.Option(help="Set the number of generations.", min=1)] = 8,
    population: Annotated[int, typer.Option(help="Set the number of candidates in a generation.", min=1)] = 12,
    seed: Annotated[int | None, typer.Option(help="Set the random seed of documents and evolution.")] = None,
    output: Annotated[Path, typer.Option(help="Write losses and the result to this directory.")] = Path("runs/search"),
    set_: Annotated[list[str] | None, typer.Option("--set", help="Set any key of a run; repeatable.")] = None,
) -> None:
    """Search factors of the RoPE scaling 'mixed' for a model, without training. Resumes where it stopped."""
    from typing import cast, get_args

    from skipwise.config.files import parse_config, values_from_flags
    from skipwise.errors import nearest
    from skipwise.workflows.search import Fitness, Search, search_factors

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


def _short(path: str) -> str:
    return Path(path.rpartition(":")[2]).name.removesuffix(".gguf") or "model"
