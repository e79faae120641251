"""One flat file of all benchmarks, and tables and plots of docs/performance.md, from the rows in benchmarks/results/.

python benchmarks/summary.py
"""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

from plots import draw_lengths, draw_qualities
from time_to_quality import RECIPES

from skipwise.models.locate import TINY
from skipwise.models.shape import ModelShape, read_config, shape_of
from skipwise.planning.costs import Step, step_flops, step_memory
from skipwise.utils.files import format_bytes, write_json, write_text

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
SMOLLM2 = ModelShape(
    layers=30, heads=9, key_heads=3, head_dim=64, hidden_size=576, intermediate_size=1536, vocabulary=49152
)
# By what factor of the best perplexity of any training at full length, and with what share of passkeys, at the target.
QUALITIES = {"time_to_quality": (1.01, 0.95), "time_to_passkey": (math.inf, 0.95)}
Row = dict[str, Any]


def load(name: str) -> dict[str, Any]:
    """What a benchmark wrote."""
    loaded: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text())
    return loaded


def step_seconds(row: Row) -> float:
    """The median."""
    return statistics.median(row["seconds"])


def fastest(rows: list[Row], train_length: int, side: str) -> Row:
    """The row of most tokens per second among those of a window whose side begins so."""
    own = [row for row in rows if row["train_length"] == train_length and row["side"].startswith(side)]
    own = [row for row in own if "recomputed" in side or "recomputed" not in row["side"]]
    return max(own, key=lambda row: row["tokens_per_second"])


def side_of(rows: list[Row], train_length: int, side: str) -> Row:
    """The row of a side."""
    return next(row for row in rows if (row["train_length"], row["side"]) == (train_length, side))


def loss_difference(rows: list[Row], side: str) -> float:
    """The largest relative distance of a step's loss from that of Hugging Face autocast."""
    losses = {(row["side"], row["train_length"], row["batch"]): row["losses"] for row in rows}
    return max(
        abs(one - other) / other
        for (_, *size), own in losses.items()
        for one, other in zip(losses[side, *size], losses["stock autocast", *size], strict=True)
    )


def floor_seconds(row: Row, shape: ModelShape, rate: float) -> float:
    """What a step would take if it were nothing but matmuls at full rate."""
    return step_flops(shape, Step(row["train_length"], row["batch"])).total / rate


def results() -> dict[str, Any]:
    """All ratios, flat."""
    training, lengths, everyday = load("training-SmolLM2-135M-Instruct"), load("lengths-tiny"), load("everyday")
    evaluation, small = (load(f"evaluation-{name}")["rows"] for name in ("SmolLM2-135M-Instruct", "tiny"))
    rows = training["rows"]
    result: dict[str, Any] = {}
    for train_length in (2048, 512):
        ours, hf = side_of(rows, train_length, "ours"), fastest(rows, train_length, "stock")
        result[f"train_speedup_{train_length}"] = ours["tokens_per_second"] / hf["tokens_per_second"]
    for suffix, side, other in (
        ("", "ours", "stock"),
        ("_selective", "ours, selective", "stock"),
        ("_all", "ours, all recomputed", "Hugging Face bfloat16, recomputed"),
    ):
        for at, train_length in (("", 1024), ("_2048", 2048)):
            ours, hf = side_of(rows, train_length, side), fastest(rows, train_length, other)
            result[f"train_memory_ratio{at}{suffix}"] = ours["peak_megabytes"] / hf["peak_megabytes"]
            if suffix:
                result[f"train_speedup{at or '_1024'}{suffix}"] = ours["tokens_per_second"] / hf["tokens_per_second"]
    for at, train_length in (("", 1024), ("_2048", 2048)):  # beside what a user has who asks for nothing
        ours, hf = side_of(rows, train_length, "ours, all recomputed"), fastest(rows, train_length, "stock")
        result[f"train_memory_ratio{at}_all_to_plain"] = ours["peak_megabytes"] / hf["peak_megabytes"]
        result[f"train_speedup{at or '_1024'}_all_to_plain"] = ours["tokens_per_second"] / hf["tokens_per_second"]
    ours = side_of(rows, 2048, "ours")
    rate = training["flops_per_second"]["bfloat16"]
    result["gemm_share"] = floor_seconds(ours, SMOLLM2, rate) / step_seconds(ours)
    for side in ("ours", "Hugging Face bfloat16"):
        result[f"loss_difference_{side.replace(' ', '_')}"] = loss_difference(rows, side)
    pose = {row["target_length"]: row for row in lengths["rows"] if row["train_length"] == 256}
    full = {row["target_length"]: row for row in lengths["rows"] if row["train_length"] == row["target_length"]}
    result["pose_time_growth_x64"] = step_seconds(pose[64 * 256]) / step_seconds(pose[512])
    result["pose_memory_growth_x64"] = pose[64 * 256]["peak_megabytes"] / pose[512]["peak_megabytes"]
    result["full_over_pose_time_x8"] = step_seconds(full[2048]) / step_seconds(pose[2048])
    result["full_over_pose_memory_x8"] = full[2048]["peak_megabytes"] / pose[2048]["peak_megabytes"]
    for suffix, own in (("", evaluation), ("_tiny", small)):
        truncated, generated, passkey, sliding = (row["ratio"] for row in own)
        result[f"truncated_ppl_speedup{suffix}"] = truncated
        result[f"passkey_over_generate{suffix}"] = generated
        result[f"passkey_speedup{suffix}"] = passkey
        result[f"sliding_ppl_speedup{suffix}"] = sliding
    result |= {key: value for key, value in everyday.items() if key not in ("environment", "documents")}
    result |= growth_exponents()
    result |= quality_ratios()
    result["machine"] = everyday["environment"]
    return result


def exponent(sizes: list[float], costs: list[float]) -> float:
    """Slope of log(cost) over log(size): 1 where cost is proportional to size."""
    x, y = ([math.log(value) for value in values] for values in (sizes, costs))
    return statistics.linear_regression(x, y).slope


def growth_rows() -> tuple[list[Row], Row]:
    """SmolLM2 by train length, and the embedded model at the shortest."""
    rows = load("growth-SmolLM2-135M-Instruct")["rows"]
    return [row for row in rows if "model" not in row], next(row for row in rows if row.get("model") == "tiny")


def growth_exponents() -> dict[str, float]:
    """By train length (of one window a step), size of the model, and number of documents."""
    rows, small = growth_rows()
    lengths = [row["train_length"] for row in rows]
    documents = load("everyday")["documents"]
    counts = [row["documents"] for row in documents]
    sizes = [float(shape.parameters) for shape in (shape_of(read_config(TINY)), SMOLLM2)]
    return {
        "time_by_train_length_exponent": exponent(lengths, [step_seconds(row) for row in rows]),
        "memory_by_train_length_exponent": exponent(lengths, [row["peak_megabytes"] for row in rows]),
        "time_by_parameters_exponent": exponent(sizes, [step_seconds(small), step_seconds(rows[0])]),
        "memory_by_parameters_exponent": exponent(sizes, [small["peak_megabytes"], rows[0]["peak_megabytes"]]),
        **{f"{key}_by_documents_exponent": exponent(counts, [row[f"{key}_seconds"] for row in documents])
           for key in ("build", "open", "cut")},
    }  # fmt: skip


def growth_table() -> list[str]:
    """Seconds and memory of a step by train length, a window at a time."""
    lines = ["| train length | step | of a token | memory |", "| ---: | ---: | ---: | ---: |"]
    for row in growth_rows()[0]:
        seconds = step_seconds(row)
        cells = f"{seconds:.2f} s | {1000 * seconds / row['train_length']:.2f} ms | {row['peak_megabytes']:,.0f} MiB"
        lines.append(f"| {row['train_length']:,} | {cells} |")
    return lines


def qualities() -> list[Row]:
    """Every recipe: its settings, seconds of a step, rows, and when it was first good enough, or None."""
    seconds = load("quality-seconds")["seconds"]
    found = []
    for recipe in RECIPES.values():
        file = HERE / "results" / "quality" / f"{recipe.name}.json"
        if file.exists():
            found.append(
                {"recipe": recipe, "seconds": seconds[recipe.step], "rows": json.loads(file.read_text())["rows"]}
            )
    best = min(row["perplexity_4096"] for one in found if one["recipe"].method == "full" for row in one["rows"])
    for one in found:
        for name, (perplexity, passkey) in QUALITIES.items():
            good = (
                row["step"] for row in one["rows"]
                if row["perplexity_4096"] <= perplexity * best and row["passkey_4096"] >= passkey
            )  # fmt: skip
            step = next(good, None)
            one[name] = None if step is None else step * one["seconds"]
    return found


def quality_ratios() -> dict[str, float | None]:
    """How much sooner the quickest PoSE is there than the quickest full length; None where one never is."""
    found = qualities()
    ratios: dict[str, float | None] = {}
    for name in QUALITIES:
        sides = [
            [one[name] for one in found if (one["recipe"].method == "full") == full and one[name] is not None]
            for full in (True, False)
        ]
        ratios[f"{name}_ratio_x16"] = min(sides[0]) / min(sides[1]) if all(sides) else None
    return ratios


def quality_table() -> list[str]:
    """Recipes, at their end and when they were good enough."""
    lines = [
        "| method | window | chunks | text | teacher | rate | step | training | perplexity at 4k, 256 | "
        "passkey at 4k, 256 | passkey 95 % at 4k after | and perplexity within 1 % after |",
        "| --- | ---: | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in qualities():
        recipe, last = one["recipe"], one["rows"][-1]
        pose = recipe.method == "pose"
        cells = [
            recipe.method,
            f"{recipe.train_length:,}",
            str(recipe.chunks) if pose else "-",
            recipe.content if pose else "-",
            "yes" if recipe.teacher and pose else "no",
            f"{recipe.learning_rate:g}",
            f"{one['seconds']:.2f} s",
            f"{recipe.steps * one['seconds']:,.0f} s",
            f"{last['perplexity_4096']:.2f}, {last['perplexity_256']:.2f}",
            f"{last['passkey_4096']:.0%}, {last['passkey_256']:.0%}",
            *(
                "never" if one[name] is None else f"{one[name]:,.0f} s"
                for name in ("time_to_passkey", "time_to_quality")
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def training_table() -> list[str]:
    """Hugging Face and ours, by size of a step."""
    loaded = load("training-SmolLM2-135M-Instruct")
    sides = list(dict.fromkeys(row["side"] for row in loaded["rows"]))
    lines = [f"| step | {' | '.join(sides)} | ours / floor |", f"| --- |{' ---: |' * (len(sides) + 1)}"]
    sizes = dict.fromkeys((row["train_length"], row["batch"]) for row in loaded["rows"])
    for size in sizes:
        own = {row["side"]: row for row in loaded["rows"] if (row["train_length"], row["batch"]) == size}
        cells = [
            f"{own[side]['tokens_per_second']:.0f} tokens/s, {own[side]['peak_megabytes']:,.0f} MiB"
            if side in own
            else "-"
            for side in sides
        ]
        share = floor_seconds(own["ours"], SMOLLM2, loaded["flops_per_second"]["bfloat16"]) / step_seconds(own["ours"])
        lines.append(f"| {size[1]} x {size[0]:,} | {' | '.join(cells)} | {share:.0%} |")
    return lines


def lengths_table() -> list[str]:
    """PoSE and full length by target (the paper's Figure 3), with what the planner says."""
    shape = shape_of(read_config(TINY))
    lines = [
        "| target | PoSE | full length | time | time, planned | memory | memory, planned |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = load("lengths-tiny")["rows"]
    full = {row["target_length"]: row for row in rows if row["train_length"] == row["target_length"]}
    for row in rows:
        target = row["target_length"]
        if row["train_length"] == target:
            continue
        cells = [f"{step_seconds(row):.2f} s, {row['peak_megabytes']:,.0f} MiB"]
        if target in full:
            other = full[target]
            steps = [Step(one["train_length"], one["batch"]) for one in (row, other)]
            flops = [step_flops(shape, step).total for step in steps]
            memory = [step_memory(shape, step, cpu=True).peak for step in steps]
            cells += [
                f"{step_seconds(other):.2f} s, {other['peak_megabytes']:,.0f} MiB",
                f"{step_seconds(other) / step_seconds(row):.1f}x",
                f"{flops[1] / flops[0]:.1f}x",
                f"{other['peak_megabytes'] / row['peak_megabytes']:.1f}x",
                f"{memory[1] / memory[0]:.1f}x",
            ]
        else:
            cells += ["-"] * 5
        lines.append(f"| {target:,} | {' | '.join(cells)} |")
    return lines


def memory_table() -> list[str]:
    """Measured and planned peaks."""
    lines = ["| model | step | measured | planned | planned / measured |", "| --- | --- | ---: | ---: | ---: |"]
    for name, file, shape in (
        ("embedded", "lengths-tiny", shape_of(read_config(TINY))),
        ("SmolLM2-135M", "training-SmolLM2-135M-Instruct", SMOLLM2),
    ):
        seen = set()
        for row in load(file)["rows"]:
            size = (row["batch"], row["train_length"])
            if row["side"] == "ours" and size not in seen:
                seen.add(size)
                planned = step_memory(shape, Step(row["train_length"], row["batch"]), cpu=True).peak
                peak = row["peak_megabytes"] * 2**20
                cells = f"{format_bytes(peak)} | {format_bytes(planned)} | {planned / peak:.2f}"
                lines.append(f"| {name} | {size[0]} x {size[1]:,} | {cells} |")
    return lines


def ratios_table(flat: dict[str, Any]) -> list[str]:
    """Every number of the flat file."""
    lines = ["| result | value |", "| --- | ---: |"]
    return lines + [f"| `{key}` | {value:,.4g} |" for key, value in flat.items() if isinstance(value, int | float)]


def main() -> None:
    """Write both."""
    flat = results()
    write_json(HERE / "results.json", flat)
    page = PAGE.read_text(encoding="utf-8")
    tables = {
        "training": training_table(),
        "lengths": lengths_table(),
        "quality": quality_table(),
        "growth": growth_table(),
        "memory": memory_table(),
        "ratios": ratios_table(flat),
    }
    for name, lines in tables.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = marked.subn(lambda match, lines=lines: match[1] + "\n".join([*lines, match[2]]), page)  # type: ignore[misc]
        assert count == 1, f"docs/performance.md has no place for {name}"
    write_text(PAGE, page)
    draw_lengths(load("lengths-tiny")["rows"], PAGE.parent / "images" / "lengths.svg")
    draw_qualities(qualities(), PAGE.parent / "images" / "quality.svg")


if __name__ == "__main__":
    main()
