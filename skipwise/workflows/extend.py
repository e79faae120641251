"""The main job: plan, evaluate, probe, train, write the checkpoint, evaluate again, show one table."""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from skipwise.config.files import to_yaml
from skipwise.config.resolve import ResolvedRun
from skipwise.config.run import RunConfig
from skipwise.data.sources import check_source, is_hub_dataset, same_content
from skipwise.errors import UserError
from skipwise.evaluation.cost import describe_evaluation
from skipwise.evaluation.results import EvalResult, Stage, retrieval_warnings
from skipwise.evaluation.specs import EvaluationSpec
from skipwise.lengths import Lengths
from skipwise.models.locate import model_location
from skipwise.planning.plan import Plan, make_plan, zero_stage
from skipwise.report.plan import describe_plan, plan_warnings
from skipwise.runs.directory import RunDir
from skipwise.runs.environment import describe_environment
from skipwise.runs.trackers import send_results
from skipwise.training.config import read_deepspeed
from skipwise.training.trackers import check_trackers
from skipwise.utils.distributed import is_first, wait_for_all, world_size
from skipwise.utils.files import read_json, write_json, write_text

if TYPE_CHECKING:
    from skipwise.export.inspection import ModelInfo
    from skipwise.workflows.context import RunContext


class PreemptedError(Exception):
    """Training was stopped by a signal, after saving."""


def check_early(config: RunConfig, run: RunDir, resume: bool) -> None:
    """Find what is wrong without importing anything heavy.

    Raises:
        UserError: for a model path, data source, engine's file, output directory or length that cannot be right.
    """
    model_location(config.model.path)
    for source in config.data.sources:
        check_source(source)
    if config.train.deepspeed:
        read_deepspeed(Path(config.train.deepspeed))
    check_trackers(config.train.report_to)
    if config.lengths.train is not None or config.lengths.original is not None:
        train = config.lengths.train or config.lengths.original
        original = config.lengths.original or train
        assert train is not None and original is not None
        config.positions.check(Lengths(original=original, train=train, target=config.lengths.target))
    if run.path.exists() and not resume:
        with run.held():
            run.claim(resume=False, resolved="")


def plan_of(run: ResolvedRun, info: "ModelInfo") -> Plan:
    """The plan of a run on this machine."""
    from skipwise.models.load import default_device

    return make_plan(
        run,
        parameters=info.parameters.total,
        active=info.parameters.active,
        shape=info.shape,
        processes=world_size(),
        zero=zero_stage(run.train),
        cpu=default_device().type == "cpu",
    )


def extend(
    config: RunConfig,
    output: Path,
    *,
    given: str,
    console: Console,
    resume: bool = False,
    dry_run: bool = False,
    keep_checkpoints: bool = False,
) -> list[EvalResult]:
    """Extend a model's context window, and measure what came of it.

    Args:
        config: what to do.
        output: the run directory.
        given: the configuration as the user wrote it.
        console: where progress and tables go.
        resume: go on with the run in `output`.
        dry_run: stop after the plan; nothing is written.
        keep_checkpoints: of the training, with their optimizer, when the model is written.

    Returns:
        Every row of `results.jsonl`.

    Raises:
        UserError: for wrong input, before anything is written.
        PreemptedError: when a signal stopped the training; `resume` goes on.
    """
    directory = RunDir(output)
    if is_first():
        check_early(config, directory, resume)

    from skipwise.export.inspection import inspect_run
    from skipwise.models.skeleton import check_scaling

    info, run = inspect_run(config)
    plan = plan_of(run, info)
    check_scaling(info.config, run.rope, run.lengths, run.model.trust_remote_code)
    if dry_run:
        show_plan(plan, run, info, console)
        return []

    resolved = to_yaml(run.as_config())
    with directory.held() if is_first() else nullcontext():
        if is_first():
            directory.claim(resume, resolved)
        show_plan(plan, run, info, console)
        if is_first() and resume and not directory.resolved.exists():
            console.print(f"Nothing to resume: {output} holds no run yet, and this one begins.", markup=False)

        from skipwise.workflows.context import open_context
        from skipwise.workflows.duration import expected_seconds

        context = open_context(run, console)  # may still refuse the data
        context.check()
        begun = directory.resolved.exists()
        if is_first():
            _write_start(directory, run, plan, context.data.summary, given, resolved)
        wait_for_all()
        expected: dict[str, float] = {}
        if is_first() and not begun:  # a resumed run shows what is left in its progress bars
            with console.status("measuring how long this takes"):
                expected = expected_seconds(context)
        _measure_and_train(directory, context, expected)
        if is_first() and not keep_checkpoints:
            shutil.rmtree(directory.checkpoints, ignore_errors=True)  # the model is written, and they are large
        rows = directory.read_results()
        if is_first() and run.train.report_to:
            send_results(run.train.report_to, directory.path, rows, log=console.print)

    from skipwise.report.tables import warning

    for line in retrieval_warnings(rows, run.lengths.original):
        console.print(warning(line))
    return rows


def _measure_and_train(directory: RunDir, context: "RunContext", expected: dict[str, float]) -> None:
    """Take every step in turn: evaluate the model as it came, rescale its RoPE, evaluate, train, evaluate.

    Args:
        directory: run directory.
        context: context of the run.
        expected: seconds that each step takes; empty where they are not known.
    """
    from skipwise.workflows.duration import TimeLeft, format_seconds
    from skipwise.workflows.save import prove_trained, save_model
    from skipwise.workflows.train import train_model

    run, console, time_left = context.run, context.console, TimeLeft(expected)
    whole = time_left.seconds()
    if whole is not None:
        console.print(f"This run takes {format_seconds(whole)} on this machine.", highlight=False)

    @contextmanager
    def step(name: str) -> Iterator[None]:
        """Announce a step of the run, time it, and record that it is done."""
        seconds = time_left.seconds()
        left = "" if seconds is None else f" (whole run: {format_seconds(seconds)} left)"
        console.print(f"step {run.steps.index(name) + 1} of {len(run.steps)}: {name}{left}", style="bold")
        started = time.monotonic()
        with timed(directory, name):
            yield
        time_left.finish(name, time.monotonic() - started)
        if is_first():
            done = read_json(directory.parts) if directory.parts.exists() else {}
            write_json(directory.parts, {**done, name: True})

    def evaluate(stage: Stage, window: int) -> None:
        if f"evaluate {stage}" in run.steps:
            with step(f"evaluate {stage}"):
                _evaluate(directory, context, stage, window)

    evaluate("original", run.current_length)
    context.interpolate()
    evaluate("interpolated", run.lengths.target)
    with step("train" if run.trains else "write"):
        if run.trains and not train_model(context, directory, on_first_step=partial(prove_trained, context, directory)):
            raise PreemptedError(f"Stopped and saved in {directory.path}. The same command with --resume goes on.")
        save_model(context, directory)
    evaluate("extended", run.lengths.target)


def show_plan(plan: Plan, run: ResolvedRun, info: "ModelInfo", console: Console) -> None:
    """Print what will happen, how far layers see, and that an earlier scaling is replaced."""
    from skipwise.report.tables import pairs_table, warning

    hub = " (hub dataset, not looked at yet)"
    stages = run.measured_stages
    pairs = [
        *describe_plan(plan),
        ("data", ", ".join(one.source + hub * is_hub_dataset(one) for one in run.data.sources)),
        ("evaluation", describe_evaluation(run.evaluate) or "none"),
        ("stages", f"{', '.join(stages)} (each is evaluated)" if stages else "none"),
    ]
    console.print(pairs_table("Plan", pairs))
    for line in plan_warnings(run.lengths):
        console.print(warning(line))
    for line in info.notes():
        console.print(line)


def _write_start(
    directory: RunDir, run: ResolvedRun, plan: Plan, data_summary: dict[str, Any], given: str, resolved: str
) -> None:
    """Write what a run begins with; of a run that has begun, check that data and processes are the same."""
    if directory.resolved.exists():
        sources = [read_json(directory.data).get("sources", []), json.loads(json.dumps(data_summary))["sources"]]
        if len(sources[0]) != len(sources[1]) or not all(map(same_content, *sources)):
            raise UserError(
                f"{directory.path} was started on data of other content (see {directory.data}). Bring them back, or "
                "choose another --output.",
                code="data_changed",
            )
        before = read_json(directory.plan)["windows_per_step"]
        if before != plan.windows_per_step:
            raise UserError(
                f"{directory.path} was started with {before} windows in a step, but these processes have "
                f"{plan.windows_per_step}. Start as many processes as before, or choose another --output.",
                code="windows_per_step_changed",
            )
        return
    write_text(directory.config, given)
    write_json(directory.environment, describe_environment())
    write_json(directory.plan, plan.as_dict())
    write_json(directory.data, data_summary)
    write_json(directory.parts, dict.fromkeys(run.steps, False))
    write_text(directory.resolved, resolved)  # last: its presence makes the directory a run


def _evaluate(directory: RunDir, context: "RunContext", stage: Stage, window: int) -> None:
    """Measure what is not in the results yet, and add each row as soon as it is there. The other processes wait."""
    if is_first():
        for rows in measured_rows(directory, context, stage, window, context.run.evaluate):
            directory.add_results(rows)
    wait_for_all()


def measured_rows(
    directory: RunDir, context: "RunContext", stage: Stage, window: int, specs: Sequence[EvaluationSpec]
) -> Iterator[list[EvalResult]]:
    """Measure what the results of a run do not hold yet, and give rows as they come.

    Args:
        directory: run directory, which keeps every example.
        context: context of the run.
        stage: state of the model.
        window: tokens that the model can handle in this state.
        specs: evaluations.
    """
    from skipwise.evaluation.measurement import EvaluationContext, ModelUnderTest
    from skipwise.evaluation.progress import ConsoleProgress
    from skipwise.evaluation.runner import evaluate

    run, name = context.run, context.run.model.path
    tested = ModelUnderTest(context.model, context.tokenizer, stage, name, window, context.dtype)
    with context.console.status(f"evaluating the {stage} model") as status:
        progress = ConsoleProgress(context.console, status)
        evaluation = EvaluationContext(context.data.held_out, run.seed, directory.shared, progress)
        yield from evaluate(tested, specs, evaluation, directory.examples(stage), directory.measured(stage, name))


@contextmanager
def timed(run: RunDir, part: str) -> Iterator[None]:
    """Add the seconds of a part to `timings.json`; a resumed run adds up."""
    started = time.monotonic()
    try:
        yield
    finally:
        if is_first():
            seconds: dict[str, Any] = read_json(run.timings) if run.timings.exists() else {}
            seconds[part] = round(seconds.get(part, 0.0) + time.monotonic() - started, 1)
            write_json(run.timings, seconds)
