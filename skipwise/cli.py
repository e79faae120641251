"""The command line."""

import logging
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from skipwise import __version__, config_commands, model_commands, planning_commands, report_commands
from skipwise.errors import UserError, of_machine
from skipwise.ranks import is_first, joined, leave_processes, lost_process, rank
from skipwise.terminal import Command, OneLine, Program, console, errors, unexpected

app = typer.Typer(
    cls=Program,
    help="Extend the context window of a language model by training on short windows.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
INTERRUPTED = 130  # what Typer makes of Ctrl-C
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: schedulers may try again


def _show_version(wanted: bool) -> None:
    if wanted:
        console.print(__version__)
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was found.")] = False,
) -> None:
    """Options of all commands."""
    console.quiet |= quiet
    errors.show_origin = debug


def extend(
    model: Annotated[str, typer.Argument(help="Model directory, hub id, .gguf file, builtin:tiny, or a config.yaml.")],
    target: Annotated[
        str | None, typer.Option(help="Window wanted, e.g. 32k. Needed, unless a config.yaml has it.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="File, directory, hub dataset, builtin:python. Needed, unless a config.yaml has it."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Run directory.  \\[default: runs/MODEL-TARGET-METHOD]")] = None,
    method: Annotated[str | None, typer.Option(help="One of {methods}.")] = None,
    rope: Annotated[str | None, typer.Option(help="One of {scalings}.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    train_length: Annotated[str | None, typer.Option(help="Tokens in a training window.")] = None,
    original: Annotated[str | None, typer.Option(help="Window of pretraining, where the config does not say.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any key: section.key=value; repeatable.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output directory.")] = False,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep the last checkpoints of the training when it is finished.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Extend a model's context window, and measure it before and after."""
    from skipwise.config_files import parse_config, values_from_flags

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

    from skipwise.extension import extend as run_extension
    from skipwise.report.page import write_report
    from skipwise.report.table import comparison_table, stage_columns
    from skipwise.runs import RunDir

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
    config: Annotated[Path | None, typer.Option(help="YAML: data, evaluate, seed, chat, dtype.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="One of {evaluations}.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Context lengths, e.g. 4k,8k.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Documents: file, directory, hub dataset, preset:pg19.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where rows and examples are kept.")] = None,
    chat: Annotated[bool | None, typer.Option("--chat", help="Prompts through the chat template.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of prompts and of the choice of documents.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="passkey.trials=20, dtype=float32; repeatable.")
    ] = None,
) -> None:
    """Measure models side by side. What the output directory holds already is not measured again."""
    from skipwise.comparison import request
    from skipwise.comparison.compare import compare
    from skipwise.comparison.side_by_side import side_by_side
    from skipwise.config_files import merge, only_given, parse_assignment, parse_evaluate_config, read_yaml
    from skipwise.report.table import comparison_table, depth_table, difference_table, evaluation_markdown
    from skipwise.runs import RunDir, figure_of, write_text

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
    asked = {figure_of(row) for row in rows}
    shown = side_by_side(directory, [one.name for one in found], asked)
    console.print(comparison_table("Evaluation", shown.columns))
    for heading, own in shown.columns.items():
        grid = depth_table(heading, own)
        if grid is not None:
            console.print(grid)
    if shown.differences:
        console.print(difference_table(shown.first, shown.differences))
    whole = side_by_side(directory)
    write_text(RunDir(directory).table, evaluation_markdown(whole.columns, whole.first, whole.differences))
    console.print(f"Rows and examples: {directory}")
    if not any(row.value is not None for row in rows):
        raise UserError("Nothing could be measured; the reasons are above.", code="nothing_measured")


def study(
    file: Annotated[Path, typer.Argument(help="Study file (YAML): base, methods, seeds, domains.")],
    output: Annotated[Path | None, typer.Option(help="Where cells, tables and plots are kept.")] = None,
    jobs: Annotated[int, typer.Option(help="Cells at a time, each with its share of cores or GPUs.", min=1)] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what all of it costs, and stop.")] = False,
    print_commands: Annotated[
        bool, typer.Option("--print-commands", help="Print a command per cell that is not there yet, and stop.")
    ] = False,
    summary: Annotated[
        bool, typer.Option("--summary", help="Tables and plots of the cells that are there, and stop.")
    ] = False,
    cell: Annotated[str | None, typer.Option(help="Run this cell only, in this process.")] = None,
) -> None:
    """Compare methods side by side: same budget, several seeds, tuned alike. Goes on where it was interrupted."""
    from skipwise.environment import without_directories
    from skipwise.report.study import draw_study, study_markdown
    from skipwise.report.study_page import write_study_page
    from skipwise.report.table import plain_table
    from skipwise.runs import write_text
    from skipwise.study import run as study_run

    opened = study_run.open_study(file, output or Path("runs") / file.stem)
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
    figures, losses, environments = study_run.write_summary(opened)
    directory = opened.directory
    text = study_markdown(figures)
    write_text(directory.table, text)
    draw_study(figures, losses, directory.path / "plots")
    page = directory.path / "report.html"
    command = shlex.join(["skipwise", "study", *map(without_directories, (str(file), "--output", str(directory.path)))])
    write_study_page(figures, losses, command, file.read_text(encoding="utf-8"), environments, page)
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
    from skipwise.demo import run_demo

    runs = run_demo(output, console, resume, controls)
    report_commands.report(runs, output / "report.html")


for command in (
    extend,
    planning_commands.plan,
    planning_commands.coverage,
    planning_commands.search,
    evaluate,
    study,
    report_commands.report,
    report_commands.explore,
    model_commands.doctor,
    model_commands.convert,
    model_commands.export,
    demo,
):
    app.command(cls=Command)(command)


@app.command("list", cls=Command)
def list_(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """What can be chosen by name."""
    import json
    from typing import get_args

    from skipwise.config import METHODS, Tracker
    from skipwise.data.builtin import PYTHON
    from skipwise.data.presets import PREFIX, PRESETS
    from skipwise.evaluation.specs import EVALUATIONS
    from skipwise.models.aids import AIDS
    from skipwise.models.locate import TINY
    from skipwise.positions import SAMPLERS
    from skipwise.report.table import pairs_table
    from skipwise.rope import ROPE_SCALINGS
    from skipwise.sections import name_of

    classes = {"positions": SAMPLERS, "rope": ROPE_SCALINGS, "evaluate": EVALUATIONS}
    described = {
        title: {name_of(cls): (cls.__doc__ or "").strip().splitlines()[0] for cls in own}
        for title, own in classes.items()
    } | {"aids": dict(AIDS)}
    named = {
        "models": [TINY, "hub ids, directories, .gguf files"],
        "methods": list(METHODS),
        "data": [PYTHON, *(PREFIX + name for name in PRESETS), "files, directories, hub datasets"],
        "trackers": list(get_args(Tracker)),
        "engines": ["train.fsdp", "train.deepspeed"],
        "conversions": ["gptj", "baichuan"],
    }
    if as_json:
        print(json.dumps({**described, **named}))
        return
    for title, own in described.items():
        console.print(pairs_table(f"{title}, for evaluate MODEL+NAME" if title == "aids" else title, list(own.items())))
        console.print()
    console.print(pairs_table("by name alone", [(title, ", ".join(names)) for title, names in named.items()]))


def _short(path: str) -> str:
    return Path(path.rpartition(":")[2]).name.removesuffix(".gguf") or "model"


app.add_typer(config_commands.app, name="config")


def main() -> None:
    """Run a command; turn a user's mistake into one message and exit code 2."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says on every CPU that it could be faster
    logging.getLogger("huggingface_hub.utils._http").addFilter(OneLine())
    signal.signal(signal.SIGTERM, _stop)  # a training puts its own in this place, which saves first
    code = run(app)
    if code in (0, STOPPED):  # after an error others may still wait for this process; its launcher ends them
        leave_processes(code)
    sys.exit(code)


def _stop(number: int, frame: FrameType | None) -> None:
    """What is finished is written already, so the process can end where it is."""
    raise SystemExit(STOPPED)


def _refuse(error: UserError) -> int:
    """Print a mistake in the input, or a condition of the machine; the exit code."""
    if errors.show_origin:
        errors.print_exception()
    if is_first() or joined():  # before, every process finds the same
        errors.print("Error:", style="red", end=" ")
        of = "" if is_first() else f"process {rank()}: "
        errors.print(f"{of}{error} [{error.code}]", soft_wrap=True)
    return 2


def run(command: Callable[[], Any]) -> int:
    """The exit code: 0 done, 2 wrong input or a file that cannot be used, 75 stopped after saving, 1 unexpected."""
    try:
        command()
    except UserError as error:
        return _refuse(error)
    except SystemExit as ended:
        if ended.code in (INTERRUPTED, STOPPED):
            word = "Interrupted" if ended.code == INTERRUPTED else "Stopped"
            errors.print(f"{word}. The same command goes on (extend and demo with --resume).")
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except Exception as error:
        if type(error).__name__ == "PreemptedError":  # its module imports what most commands do not need
            if is_first():
                errors.print(str(error), soft_wrap=True)
            return STOPPED
        if lost_process(error):
            errors.print(
                f"Error: process {rank()}: another process of this run, or its host, is gone ({error}). Checkpoints "
                "are as they were; the same command on all hosts goes on with --resume.",
                soft_wrap=True,
            )
            return STOPPED
        condition = of_machine(error)
        if condition is not None:
            return _refuse(condition)
        if errors.show_origin:
            raise
        errors.print(f"Error: {unexpected(error)}", soft_wrap=True)
        return 1
    return 0
