"""The charts of a report: what each shows, its rows, and how they are drawn. Read from run directories; no torch."""

import math
from collections.abc import Callable, Mapping, Sequence

import altair as alt
import numpy as np
from numpy.typing import NDArray

from skipwise.errors import UserError
from skipwise.evaluation.metrics import METRICS, Metric, metric_of
from skipwise.evaluation.results import EvalResult
from skipwise.export.readers import Reading, transformers_5
from skipwise.lengths import format_length
from skipwise.models.shape import read_config
from skipwise.positions import Document, Plain, example_rng
from skipwise.positions.coverage import Coverage, coverage
from skipwise.report.vega import (
    Chart,
    color_by,
    data_of,
    finished_chart,
    length_axis,
    number_axis,
    stroke_legend,
    tooltips,
)
from skipwise.runs.record import STAGES, Row, Run

# Points of a line: more cannot be told apart.
POINTS = 240
# Windows that coverage is drawn from, where there is no formula.
WINDOWS = 400
# Rows of results, each with the name of its line in the charts.
Series = Sequence[tuple[str, EvalResult]]


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """All charts that these runs have numbers for."""
    makers: list[Callable[[Sequence[Run]], Chart | None]] = [
        training_chart,
        coverage_chart,
        wavelength_chart,
        window_chart,
        cost_chart,
    ]
    charts = [chart for maker in makers if (chart := maker(runs)) is not None]
    return [*result_charts(series_of(runs)), *charts]


def result_charts(series: Series) -> list[Chart]:
    """All charts that these results have numbers for, whichever command measured them."""
    makers = (perplexity_chart, passkey_chart, suite_chart, others_table)
    return [chart for maker in makers if (chart := maker(series)) is not None]


def series_of(runs: Sequence[Run]) -> list[tuple[str, EvalResult]]:
    """Results of runs with the name of their line: the stage, and the run where there are several."""
    return [
        (stage if len(runs) == 1 else f"{run.name}: {stage}", row)
        for run in runs
        for row in run.results
        for stage in [STAGES.get(row.stage, row.stage)]
    ]


def perplexity_chart(series: Series) -> Chart | None:
    """Perplexity by context length."""
    rows = [
        {"model": name, "context": row.context_length, "perplexity": row.value, "low": row.interval_low,
         "high": row.interval_high, "text": row.data}
        for name, row in series
        if row.evaluation == "perplexity" and row.metric == "perplexity" and row.value is not None
    ]  # fmt: skip
    if not rows:
        return None
    base = data_of(rows).encode(x=length_axis("context", rows), color=color_by("model"))
    value = alt.Y("perplexity:Q", scale=alt.Scale(type="log", nice=False, padding=12), title="perplexity")
    line = base.mark_line(point=True).encode(
        y=value, tooltip=["model:N", "context:Q", "perplexity:Q", "low:Q", "high:Q"]
    )
    band = base.mark_errorbar(ticks=True).encode(y=alt.Y("low:Q", title="perplexity"), y2="high:Q")
    caption = (
        "Lower is better. With context that helps, it falls from left to right; beyond its window a model rises. Bars "
        "are 95 % intervals, mostly the spread between documents."
    )
    return finished_chart("perplexity", "Perplexity by context length", caption, rows, band + line)


def passkey_chart(series: Series) -> Chart | None:
    """Passkeys found, by length and depth."""
    rows: list[Row] = [
        {"model": name, "context": row.context_length, "depth": f"{row.depth:.0%}", "found": row.value,
         "trials": row.num_samples}
        for name, row in series
        if row.evaluation == "passkey" and row.depth is not None and row.value is not None
    ]  # fmt: skip
    if not rows:
        return None
    order = [format_length(length) for length in sorted({row["context"] for row in rows})]
    rows = [{**row, "length": format_length(row["context"])} for row in rows]
    depths = sorted({row["depth"] for row in rows}, key=lambda depth: float(depth.rstrip("%")))
    cells = data_of(rows).encode(
        x=alt.X("length:N", sort=order, title="context length", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("depth:N", sort=depths, title="depth of the key"),
    )
    shade = alt.Color("found:Q", scale=alt.Scale(domain=[0, 1], scheme="viridis"), legend=alt.Legend(format=".0%"))
    squares = cells.mark_rect().encode(color=shade, tooltip=["model:N", "length:N", "depth:N", "found:Q", "trials:Q"])
    light = alt.condition("datum.found < 0.6", alt.value("white"), alt.value("black"))
    words = cells.mark_text().encode(text=alt.Text("found:Q", format=".0%"), color=light)
    models = list(dict.fromkeys(str(row["model"]) for row in rows))
    both = alt.layer(squares, words).properties(width=230, height=140)
    faceted = both.facet(facet=alt.Facet("model:N", sort=models, title=None), columns=3)
    caption = "The share of five-digit keys that are found, by how long the text is and where in it the key stands."
    return finished_chart("passkey", "Passkeys by length and depth", caption, rows, faceted, wide=False)


def suite_chart(series: Series) -> Chart | None:
    """The tasks of RULER and other scores, by length."""
    rows = [row for row, metric in _others(series) if row["context"] is not None and metric.higher_is_better]
    if not rows:
        return None
    base = data_of(rows).encode(x=length_axis("context", rows), color=color_by("model"), tooltip=tooltips(rows))
    intervals = base.mark_rule(opacity=0.5).encode(y=alt.Y("low:Q", title="score"), y2="high:Q")
    drawn = alt.layer(intervals, base.mark_line(point=True).encode(y="score:Q"))
    faceted = drawn.properties(width=220, height=120).facet(facet=alt.Facet("task:N", title=None), columns=3)
    caption = "Higher is better; strokes are 95 % intervals."
    return finished_chart("suite", "Retrieval and other tasks", caption, rows, faceted, wide=False)


def others_table(series: Series) -> Chart | None:
    """Results that are in no chart: other perplexities, and tasks that have no context length."""
    rows = [row for row, metric in _others(series) if row["context"] is None or not metric.higher_is_better]
    return Chart("others", "Other results", "Of perplexities lower is better.", rows, None) if rows else None


def _others(series: Series) -> list[tuple[Row, Metric]]:
    """Results of everything but perplexity and passkeys; a task with several metrics is several."""
    found = [
        (name, row)
        for name, row in series
        if row.evaluation != "passkey"
        and row.metric != row.evaluation  # those of `perplexity_chart`
        and row.depth is None
        and row.value is not None
    ]
    metrics: dict[str, set[str]] = {}
    for _, row in found:
        metrics.setdefault(row.evaluation, set()).add(row.metric)
    rows = []
    for name, row in found:
        # Bits per byte of an evaluation that is named after a perplexity need their own name.
        alone = len(metrics[row.evaluation]) == 1 and row.evaluation not in METRICS
        task = row.evaluation if alone else f"{row.evaluation} {row.metric}"
        values = {"score": row.value, "low": row.interval_low, "high": row.interval_high}
        rows.append(({"model": name, "task": task, "context": row.context_length, **values}, metric_of(row.metric)))
    return rows


def by_length_chart(evaluation: str, metric: Metric, rows: Sequence[Row], caption: str) -> Chart:
    """One evaluation by context length, a line for each `method` and a panel for each `domain`.

    Args:
        evaluation: its name.
        metric: its main metric.
        rows: with `method`, `domain`, `context`, `value`, `low` and `high`.
        caption: what one sees besides which direction is better.
    """
    name = evaluation.replace("_", " ")
    scale = alt.Scale(domain=[0, 1]) if metric.share else alt.Scale(type="log", nice=False)
    base = data_of(rows).encode(x=length_axis("context", rows), color=color_by("method"), tooltip=tooltips(rows))
    intervals = base.mark_rule(opacity=0.4, clip=True).encode(y=alt.Y("low:Q"), y2="high:Q")
    lines = base.mark_line(point=True).encode(y=alt.Y("value:Q", title=name, scale=scale))
    drawn = alt.layer(lines, intervals).properties(width=300, height=240)
    faceted = drawn.facet(facet=alt.Facet("domain:N", title=None), columns=2).resolve_scale(y="independent")
    text = f"{'Higher' if metric.higher_is_better else 'Lower'} is better; {caption}"
    return finished_chart(evaluation, f"{name} by context length".capitalize(), text, rows, faceted, wide=False)


def difference_chart(reference: str, rows: Sequence[Row], caption: str) -> Chart:
    """Differences from a reference with their intervals, a panel for each `figure`.

    Args:
        reference: name of the method or model that others are compared with.
        rows: with `figure`, `method`, `difference`, `low`, `high` and `none`, the value of no difference.
        caption: what one sees.
    """
    data = data_of(rows)
    base = data.encode(y=alt.Y("method:N", title=None, sort=None))
    none = data.mark_rule(strokeDash=[2, 2], color="gray").encode(x="none:Q")
    drawn = none + base.mark_rule().encode(
        x=alt.X("low:Q", title="difference", scale=alt.Scale(zero=False)), x2="high:Q"
    )
    drawn += base.mark_point(filled=True).encode(x="difference:Q", tooltip=tooltips(rows))
    faceted = drawn.properties(width=300).facet(facet=alt.Facet("figure:N", title=None), columns=2)
    faceted = faceted.resolve_scale(x="independent")
    return finished_chart("differences", f"Compared with {reference}", caption, rows, faceted, wide=False)


def coverages_chart(found: Mapping[str, Coverage]) -> Chart:
    """Distances that samplers show: their probability in one window, and the expected number of pairs (Figure 5 of the
    PoSE paper).
    """
    rows: list[Row] = [
        {"sampler": name, "distance": round(float(group.mean())), "probability": float(own.seen[group].mean()),
         "pairs": float(own.pairs[group].mean())}
        for name, own in found.items()
        for group in _groups(len(own.seen))
    ]  # fmt: skip
    panels = [
        data_of(rows).mark_line(clip=True).encode(
            x=number_axis("distance", "relative distance, tokens"),
            y=alt.Y(f"{field}:Q", title=title, scale=scale),
            color=color_by("sampler"),
            tooltip=tooltips(rows),
        ).properties(width=420, height=260)
        for field, title, scale in (
            ("probability", "probability of being seen in a window", alt.Scale()),
            ("pairs", "expected pairs of tokens in a window", alt.Scale(type="log", domainMin=1e-3, clamp=True)),
        )
    ]  # fmt: skip
    caption = "By relative distance of two tokens."
    return finished_chart("coverage", "Relative distances", caption, rows, alt.hconcat(*panels), wide=False)


def _groups(length: int) -> list[NDArray[np.int64]]:
    """Distances from 1 on, in as many groups as a line has points."""
    return np.array_split(np.arange(1, length), min(POINTS, length - 1))


def training_chart(runs: Sequence[Run]) -> Chart | None:
    """Loss, learning rate, norm of the gradients, speed and memory by step."""
    names = {
        "loss": "loss", "eval_loss": "loss, held out", "learning_rate": "learning rate", "grad_norm": "gradient",
        "tokens_per_second": "tokens per second", "peak_memory": "peak memory so far, GB",
    }  # fmt: skip
    rows = [
        {"run": run.name, "step": line["step"], "what": text,
         "value": line[key] / 1e9 if key == "peak_memory" else line[key]}
        for run in runs
        for line in run.log
        for key, text in names.items()
        if isinstance(line.get(key), int | float)
    ]  # fmt: skip
    if not rows:
        return None
    lines = data_of(rows).mark_line(point=alt.OverlayMarkDef(size=12))
    lines = lines.encode(
        x=alt.X("step:Q", title="step", scale=alt.Scale(nice=False)),
        y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=4)),
        color=color_by("run"),
        tooltip=tooltips(rows),
    ).properties(width=760, height=90)
    kinds = [text for text in names.values() if any(row["what"] == text for row in rows)]
    faceted = lines.facet(facet=alt.Facet("what:N", sort=kinds, title=None), columns=1).resolve_scale(y="independent")
    caption = "The loss mixes text, retrieval documents and the term to the untouched model, so it need not fall far."
    return finished_chart("training", "Training", caption, rows, faceted, wide=False)


def coverage_chart(runs: Sequence[Run]) -> Chart | None:
    """How often a training window shows each relative distance."""
    rows: list[Row] = []
    for run in runs:
        if not run.config.trains:
            continue
        found = coverage(run.config.positions, run.lengths, WINDOWS)
        rows += [
            {"run": run.name, "distance": round(float(group.mean())), "probability": float(found.seen[group].mean())}
            for group in _groups(len(found.seen))
        ]
    if not rows:
        return None
    lines = data_of(rows).mark_line().encode(
        x=number_axis("distance", "relative distance, tokens"),
        y=alt.Y("probability:Q", title="probability in one window"),
        color=color_by("run"),
        tooltip=tooltips(rows),
    )  # fmt: skip
    caption = (
        "Of windows with skips, at the full target. Pretraining shows distances up to the original window; with skips "
        "all those of the target are met, the far ones by few windows each."
    )
    return finished_chart("coverage", "Relative distances that training shows", caption, rows, lines)


def wavelength_chart(runs: Sequence[Run]) -> Chart | None:
    """Wavelengths of the rotary dimensions, before and after."""
    rows: list[Row] = []
    for run in runs:
        kept = run.json("rope").get("before")  # a base may be a file of another format, or away
        before = None if kept else _reading(run.config.model.path)
        written = run.directory.model.is_dir()  # else its path would be taken for a name of the hub
        after = _reading(str(run.directory.model)) if written else None
        tables = {} if before is None else {"before": before.long, "after": _planned(run, before)}
        if kept:
            tables = {"before": np.array(kept), "after": np.array(run.json("rope")["long"])}
        if after is not None:
            tables["after"] = after.long
        rows += [
            {"run": run.name, "frequencies": when, "pair": pair, "wavelength": 2 * math.pi / float(frequency)}
            for when, frequencies in tables.items()
            for pair, frequency in enumerate(frequencies)
        ]
    if not rows:
        return None
    lengths = runs[0].lengths
    marks = [
        {"length": lengths.original, "what": f"original window, {lengths.original:,}"},
        {"length": lengths.target, "what": f"target, {lengths.target:,}"},
    ]
    lines = data_of(rows).mark_line().encode(
        x=number_axis("pair", "pair of dimensions, fastest first"),
        y=alt.Y("wavelength:Q", scale=alt.Scale(type="log"), title="tokens per turn"),
        color=color_by("run"),
        strokeDash=alt.StrokeDash("frequencies:N", title=None, sort=["after", "before"], legend=stroke_legend()),
        tooltip=tooltips(rows),
    )  # fmt: skip
    rules = data_of(marks).encode(y="length:Q")
    drawn = lines + rules.mark_rule(strokeDash=[2, 2], color="gray").encode(tooltip=["what:N"])
    words = rules.mark_text(align="left", dy=-5, x=4, color="gray").encode(text="what:N")
    caption = (
        "A pair that turns many times within the original window tells near positions apart; one that never turns "
        "around in it has not been seen at the angles that farther positions would give it, so it is slowed down."
    )
    return finished_chart("rope", "RoPE wavelengths", caption, rows, drawn + words)


def window_chart(runs: Sequence[Run]) -> Chart | None:
    """The position ids of one training window."""
    rows: list[Row] = []
    for run in runs:
        if not run.config.trains:
            continue
        sampler = run.config.positions
        length = max(sampler.tokens_needed(run.lengths), run.lengths.train)
        boundaries = np.arange(24, length, 24)
        for name, one in ((run.name, sampler), ("without skips", Plain())):
            window = one.sample(Document(length, boundaries), run.lengths, example_rng(run.config.seed, 0, 0))
            places = range(0, len(window.position_ids), -(-len(window.position_ids) // POINTS))  # no gaps of its own
            rows += [{"window": name, "token": int(at), "position": int(window.position_ids[at])} for at in places]
    if not rows:
        return None
    rows = list({(row["window"], row["token"]): row for row in rows}.values())
    points = data_of(rows).mark_circle(size=14).encode(
        x=number_axis("token", "token of the window"),
        y=alt.Y("position:Q", title="position id"),
        color=color_by("window"),
        tooltip=tooltips(rows),
    )  # fmt: skip
    caption = (
        "One example: the text goes on, or is skipped as well, while its positions jump. Every window jumps elsewhere."
    )
    return finished_chart("window", "What a training window looks like", caption, rows, points)


def cost_chart(runs: Sequence[Run]) -> Chart | None:
    """What was planned, and what it took."""
    rows: list[Row] = []
    for run in runs:
        plan, seconds = run.json("plan"), run.json("timings")
        peak = max((line.get("peak_memory") or 0 for line in run.log), default=0)  # None on some devices
        flops, trained = plan.get("train_flops"), seconds.get("train")
        window = plan.get("windows_per_step", 0) * plan.get("window_tokens", 0)
        found = {
            "steps": (plan.get("steps"), run.steps),
            "tokens of training": (plan.get("train_tokens"), run.steps * window),
            "peak memory, GB": (_in_billions(plan.get("peak_memory")), _in_billions(peak)),
            "FLOPs of training": (flops, None),
            "planned FLOPs per second that training took": (None, flops / trained if flops and trained else None),
            **{f"seconds: {part}": (None, value) for part, value in seconds.items()},
        }
        rows += [
            {"run": run.name, "what": what, "planned": planned, "measured": measured or None}
            for what, (planned, measured) in found.items()
            if planned or measured
        ]
    if not rows:
        return None
    caption = (
        "FLOPs and memory are planned from the sizes of the model. On a CPU what is measured "
        "is all memory that the process held until then, evaluations included. Steps are counted up to the last that "
        "was logged."
    )
    return Chart("cost", "Planned and measured cost", caption, rows, None)


def _in_billions(value: float | None) -> float | None:
    return value / 1e9 if value else None


def _reading(path: str) -> Reading | None:
    try:
        return transformers_5(read_config(path))
    except (UserError, KeyError):  # a hub that is away, another kind of model
        return None


def _planned(run: Run, before: Reading) -> NDArray[np.float64]:
    """The frequencies that a run will train with, while its model is not written."""
    return run.config.rope.frequencies(2 * len(before.long), before.theta, run.lengths)[0]
