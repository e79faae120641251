"""The main job: plan, evaluate, probe, train, write the checkpoint, evaluate again, show one table."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console

from skipwise.config import LengthsConfig, RunConfig
from skipwise.config_files import read_deepspeed, to_yaml
from skipwise.data.sources import check_source, is_hub_dataset, same_content
from skipwise.environment import describe_environment
from skipwise.errors import UserError
from skipwise.evaluation.cost import describe_evaluation
from skipwise.evaluation.specs import EvalResult, EvaluationSpec, Passkey, Perplexity, Stage
from skipwise.lengths import Lengths
from skipwise.models.locate import model_location
from skipwise.planning import (
    Plan,
    describe_plan,
    doubts,
    make_plan,
    resolve_target,
    step_of,
    window_tokens,
    zero_stage,
)
from skipwise.ranks import is_first, wait_for_all, world_size
from skipwise.runs import RunDir, read_json, write_json, write_text
from skipwise.training.trackers import check_trackers, send_results

if TYPE_CHECKING:
    from skipwise.models.inspection import ModelInfo
    from skipwise.workbench import Workbench

# A fall of passkey accuracy inside the original window by more than this is worth a warning.
RETRIEVAL_FALL = 0.1


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


def inspect_run(config: RunConfig) -> tuple["ModelInfo", Lengths]:
    """What is known of the model of a run, and the three lengths.

    Raises:
        UserError: when the model cannot be extended, the target is not above its current window, or the sampler cannot
            work with the lengths.
    """
    from skipwise.models.inspection import inspect_model

    info = inspect_model(config.model, config.lengths.target, config.lengths.original)
    return info, resolve_target(config, info.windows.original, info.windows.current)


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


def teacher_weight(config: RunConfig, lengths: Lengths) -> float:
    """The weight of the term to the untouched model, which must be able to read a training window.

    Raises:
        UserError: when the term is asked for and it cannot.
    """
    wanted, window = config.train.kl_weight, window_tokens(config.method, lengths)
    fits = window <= lengths.original
    if wanted and not fits:
        raise UserError(
            f"train.kl_weight needs windows that the untouched model can read, but they have {window:,} tokens "
            f"and its window {lengths.original:,}. Leave train.kl_weight out or set it to 0.",
            code="kl_window_exceeds_original",
        )
    return float(fits) if wanted is None else wanted


def resolve(config: RunConfig, lengths: Lengths) -> RunConfig:
    """The configuration with what depends on the model filled in."""
    weight = teacher_weight(config, lengths)
    evaluate = default_evaluations(lengths) if config.evaluate is None else config.evaluate
    return config.model_copy(
        update={
            "lengths": LengthsConfig(target=lengths.target, train=lengths.train, original=lengths.original),
            "train": config.train.model_copy(update={"kl_weight": weight}),
            "evaluate": evaluate,
        }
    )


def plan_of(config: RunConfig, info: "ModelInfo", lengths: Lengths) -> Plan:
    """The plan of a run."""
    from skipwise.models.load import default_device

    return make_plan(
        model=config.model.path,
        method=config.method,
        rope=config.rope.name,
        lengths=lengths,
        parameters=info.parameters.total,
        active=info.parameters.active,
        shape=info.shape,
        steps=config.train.max_steps,
        step=step_of(config, window_tokens(config.method, lengths), bool(config.train.kl_weight)),
        processes=world_size(),
        zero=zero_stage(config.train),
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
    run = RunDir(output)
    if is_first():
        check_early(config, run, resume)

    from skipwise.models.skeleton import check_scaling

    info, lengths = inspect_run(config)
    config = resolve(config, lengths)
    plan = plan_of(config, info, lengths)
    check_scaling(info.config, config.rope, lengths, config.model.trust_remote_code)
    if dry_run:
        show_plan(plan, config, info, console)
        return []

    resolved = to_yaml(config)
    with run.held() if is_first() else nullcontext():
        if is_first():
            run.claim(resume, resolved)
        show_plan(plan, config, info, console)
        if is_first() and resume and not run.resolved.exists():
            console.print(f"Nothing to resume: {output} holds no run yet, and this one begins.", markup=False)

        from skipwise.workbench import open_workbench

        bench = open_workbench(config, lengths, console)  # may still find the data wanting
        bench.check()
        begun = run.resolved.exists()
        if is_first():
            _write_start(run, config, plan, bench, given, resolved)
        wait_for_all()
        expected: dict[str, float] = {}
        if is_first() and not begun:  # a resumed run shows what is left in its progress bars
            with console.status("measuring how long this takes"):
                expected = bench.expected_seconds(parts_of(config))
        _measure_and_train(run, bench, config, lengths, info.windows.current, console, expected)
        if is_first() and not keep_checkpoints:
            shutil.rmtree(run.checkpoints, ignore_errors=True)  # the model is written, and they are large
        rows = run.read_results()
        if is_first() and config.train.report_to:
            send_results(config.train.report_to, run.path, rows, say=console.print)

    from skipwise.report.table import warning

    for line in retrieval_warnings(rows, lengths.original):
        console.print(warning(line))
    return rows


def _measure_and_train(
    run: RunDir,
    bench: "Workbench",
    config: RunConfig,
    lengths: Lengths,
    window: int,
    console: Console,
    expected: dict[str, float],
) -> None:
    """Every part in turn: measured as it came, with the new RoPE, trained, measured again.

    Args:
        window: of the model as it came, in tokens.
        expected: seconds that each part takes; empty where they are not known.
    """
    from skipwise.duration import TimeLeft, format_seconds

    parts, time_left = parts_of(config), TimeLeft(expected)
    whole = time_left.seconds()
    if whole is not None:
        console.print(f"This run takes {format_seconds(whole)} on this machine.", highlight=False)

    @contextmanager
    def part(name: str) -> Iterator[None]:
        """Announce a part of the run, time it, and record that it is done."""
        seconds = time_left.seconds()
        left = "" if seconds is None else f" (whole run: {format_seconds(seconds)} left)"
        console.print(f"part {parts.index(name) + 1} of {len(parts)}: {name}{left}", style="bold")
        started = time.monotonic()
        with timed(run, name):
            yield
        time_left.finish(name, time.monotonic() - started)
        if is_first():
            done = read_json(run.parts) if run.parts.exists() else {}
            write_json(run.parts, {**done, name: True})

    def measure(stage: Stage, window: int) -> None:
        if f"evaluate {stage}" in parts:
            with part(f"evaluate {stage}"):
                _evaluate(run, bench, stage, config.model.path, window, config.evaluate or (), console)

    measure("original", window)
    bench.interpolate()
    measure("interpolated", lengths.target)
    with part("write" if config.method == "interpolate" else "train"):
        if config.method != "interpolate" and not bench.train(run):
            raise PreemptedError(f"Stopped and saved in {run.path}. The same command with --resume goes on.")
        bench.save(run)
    measure("extended", lengths.target)


def show_plan(plan: Plan, config: RunConfig, info: "ModelInfo", console: Console) -> None:
    """Print what will happen, how far layers see, and that an earlier scaling is replaced."""
    from skipwise.report.table import pairs_table, warning

    hub = " (hub dataset, not looked at yet)"
    pairs = [
        *describe_plan(plan),
        ("data", ", ".join(one.source + hub * is_hub_dataset(one) for one in config.data.sources)),
        ("evaluation", describe_evaluation(config.evaluate or ()) or "none"),
        ("stages", f"{', '.join(stages_of(config))} (each is evaluated)" if stages_of(config) else "none"),
    ]
    console.print(pairs_table("Plan", pairs))
    for line in doubts(Lengths(plan.original_length, plan.train_length, plan.target_length)):
        console.print(warning(line))
    for line in info.notes():
        console.print(line)


def stages_of(config: RunConfig) -> list[Stage]:
    """The stages that will be measured, in their order: where nothing is trained, there is no last one."""
    if config.evaluate == ():
        return []
    left_out = ["extended"] if config.method == "interpolate" else []
    return [stage for stage in get_args(Stage) if stage in config.stages and stage not in left_out]


def parts_of(config: RunConfig) -> list[str]:
    """What a run does, by name and in order."""
    parts = {f"evaluate {stage}": stage for stage in stages_of(config)}
    before = [name for name, stage in parts.items() if stage != "extended"]
    model = "write" if config.method == "interpolate" else "train"
    return [*before, model, *(name for name in parts if name not in before)]


def _write_start(run: RunDir, config: RunConfig, plan: Plan, bench: "Workbench", given: str, resolved: str) -> None:
    if run.resolved.exists():
        sources = [read_json(run.data).get("sources", []), json.loads(json.dumps(bench.data_summary))["sources"]]
        if len(sources[0]) != len(sources[1]) or not all(map(same_content, *sources)):
            raise UserError(
                f"{run.path} was started on data of other content (see {run.data}). Bring them back, or choose another "
                "--output.",
                code="data_changed",
            )
        before = read_json(run.plan)["windows_per_step"]
        if before != plan.windows_per_step:
            raise UserError(
                f"{run.path} was started with {before} windows in a step, but these processes have "
                f"{plan.windows_per_step}. Start as many processes as before, or choose another --output.",
                code="windows_per_step_changed",
            )
        return
    write_text(run.config, given)
    write_json(run.environment, describe_environment())
    write_json(run.plan, plan.as_dict())
    write_json(run.data, bench.data_summary)
    write_json(run.parts, dict.fromkeys(parts_of(config), False))
    write_text(run.resolved, resolved)  # last: its presence makes the directory a run


def _evaluate(
    run: RunDir,
    bench: "Workbench",
    stage: Stage,
    name: str,
    window: int,
    specs: tuple[EvaluationSpec, ...],
    console: Console,
) -> None:
    """Measure what is not in the results yet, and add each row as soon as it is there. The other processes wait."""
    if is_first():
        with console.status(f"evaluating the {stage} model") as status:
            for rows in bench.evaluate(run, stage, name, window, specs, status):
                run.add_results(rows)
    wait_for_all()


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


def retrieval_warnings(rows: list[EvalResult], original: int, remedies: bool = True) -> list[str]:
    """One warning per length inside the original window where retrieval fell, and what perplexity did.

    Perplexity can improve while retrieval dies, so a run must not be judged by the former alone.

    Args:
        rows: of `results.jsonl`.
        original: length of the original window, in tokens.
        remedies: say what to do about it, too, which who trains it wants to know and who uses it does not.
    """
    values = {
        (row.stage, row.evaluation, row.context_length): row.value
        for row in rows
        if row.context_length is not None
        and row.depth is None
        and row.value is not None
        and row.metric in ("accuracy", "perplexity")
    }
    improved: dict[int, str] = {}  # by length: what it did elsewhere says nothing of a fall here
    for (stage, name, length), before in sorted(values.items()):
        trained = values.get(("extended", name, length), before)
        if stage == "original" and name != "passkey" and trained < before:
            said = f"although {name.replace('_', ' ')} there improved from {before:.4g} to {trained:.4g}"
            improved.setdefault(length, said)
    warnings = []
    for (stage, name, length), before in sorted(values.items(), key=lambda item: item[0][2]):
        after = values.get(("extended", name, length))
        if (stage, name) != ("original", "passkey") or length > original or after is None:
            continue
        if before - after > RETRIEVAL_FALL:
            untrained = values.get(("interpolated", name, length))
            remedy = (
                "Lower train.learning_rate, raise data.retrieval_share, train.untouched_share or train.kl_weight."
                if untrained is None or after < untrained
                else f"The new RoPE alone has {untrained:.0%}: train longer, or choose another rope."
            )
            fall = f"passkey accuracy at {length:,} tokens fell from {before:.0%} to {after:.0%}"
            fall += _by_chance(rows, length)
            said = " ".join(part for part in (fall, improved.get(length)) if part)
            warnings.append(f"{said}.{f' {remedy}' if remedies else ''}")
    return warnings


def _by_chance(rows: list[EvalResult], length: int) -> str:
    """Whether the intervals of two shares leave open that nothing fell."""
    of = [row for row in rows if (row.evaluation, row.context_length, row.depth) == ("passkey", length, None)]
    before, after = ({row.stage: row for row in of}.get(stage) for stage in ("original", "extended"))
    if before is None or after is None or before.interval_low is None or after.interval_high is None:
        return ""
    return f" (of {after.num_samples}: it may be chance)" if after.interval_high >= before.interval_low else ""
