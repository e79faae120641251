"""What a larger target costs inside the original window: the embedded model to 2 ... 64 times it.

    python -m experiments.tradeoff docs/results/tradeoff

For every target the model with the new RoPE alone (linear, and YaRN) and the one trained by PoSE with YaRN (300 steps
of 4 windows): perplexity of 256 tokens, mean entropy of attention, and the smallest gap in the positions, in tokens,
that changes what the model predicts by 0.01 nats. Writes rows.json, table.md and a plot; models are kept in
runs/tradeoff, and the same command goes on where it was interrupted.
"""

import argparse
import json
from bisect import bisect_left
from pathlib import Path
from typing import Any

import altair as alt
import torch
import yaml
from rich.console import Console

from skipwise.config.files import merge, parse_config, parse_evaluate_config
from skipwise.config.run import RunConfig
from skipwise.data.config import DocumentsConfig
from skipwise.data.store import open_sources
from skipwise.lengths import format_length
from skipwise.models.config import ModelConfig
from skipwise.models.load import load_model, load_tokenizer
from skipwise.report.page import write_picture
from skipwise.report.vega import color_by, data_of, finished_chart, length_axis
from skipwise.runs.directory import RunDir
from skipwise.utils.files import write_json, write_text
from skipwise.workflows.extend import extend

FACTORS = (2, 4, 8, 16, 32, 64)
WINDOW, WINDOWS = 256, 64
# Positions are numbers to RoPE; they need not be whole ones.
GAPS = tuple(2 ** (power / 4) for power in range(-24, 25))
# A gap is noticed when it moves the predictions behind it by this much (KL divergence, nats).
NOTICED = 0.01
BASE: dict[str, Any] = {
    "model": {"path": "builtin:tiny"},
    "rope": {"name": "yarn", "beta_fast": 4},
    "data": {"source": "builtin:python", "retrieval_share": 0.3},
    "train": {
        **{"max_steps": 300, "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 20},
        **{"untouched_share": 0.25, "adam_beta2": 0.95, "weight_decay": 0.1},
    },
    "evaluate": [],
}


# By name: what is done at each target.
MODELS: dict[str, dict[str, Any]] = {
    "interpolate, linear": {"rope": "linear", "train": {"max_steps": 0}},
    "interpolate": {"train": {"max_steps": 0}},
    "pose": {},
}


def config_for(factor: int, model: str) -> RunConfig:
    """One extension."""
    return parse_config(merge({**BASE, "lengths": {"target": factor * WINDOW}}, MODELS[model]))


def windows(path: str) -> torch.Tensor:
    """int64[WINDOWS, WINDOW]: the beginnings of pieces of held-out documents."""
    data: DocumentsConfig = parse_evaluate_config({"data": {"source": "builtin:python", "held_out_share": 0.05}}).data
    (store,) = open_sources(data, load_tokenizer(ModelConfig(path=path)), Console(stderr=True))
    pieces = [
        store.held_out.read(begin, begin + WINDOW)
        for start, stop in zip(store.held_out.starts, store.held_out.stops, strict=True)
        for begin in range(int(start), int(stop) - WINDOW, WINDOW)
    ]
    step = len(pieces) / WINDOWS
    return torch.stack([torch.from_numpy(pieces[int(number * step)]) for number in range(WINDOWS)])


@torch.no_grad()
def measure(path: str, ids: torch.Tensor) -> dict[str, float | None]:
    """Perplexity, attention entropy in nats, and the smallest gap that is noticed (None where none of `GAPS` is)."""
    model = load_model(ModelConfig(path=path, attn_implementation="eager"), torch.device("cpu"))
    positions = torch.arange(WINDOW, dtype=torch.float32)
    mask = torch.ones_like(ids)
    output = model(ids, attention_mask=mask, position_ids=positions.expand_as(ids), output_attentions=True)
    before = output.logits.log_softmax(-1)
    nll = -before[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    shares = torch.stack(output.attentions)[..., WINDOW // 2 :, :]
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum(-1).mean()

    def change(gap: float) -> float:
        """KL divergence of what the second half predicts from what it predicts `gap` farther from the first."""
        moved = positions + gap * (positions >= WINDOW // 2)
        after = model(ids, attention_mask=mask, position_ids=moved.expand_as(ids)).logits.log_softmax(-1)
        behind = slice(WINDOW // 2, None)
        return float((before[:, behind].exp() * (before[:, behind] - after[:, behind])).sum(-1).mean())

    noticed = bisect_left(GAPS, NOTICED, key=change)  # it grows with the gap, as far as these go
    smallest = GAPS[noticed] if noticed < len(GAPS) else None
    return {"perplexity": float(nll.exp()), "entropy": float(entropy), "smallest_gap": smallest}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| target | model | perplexity at 256 | attention entropy | smallest gap noticed |",
             "| ---: | --- | ---: | ---: | ---: |"]  # fmt: skip
    for row in rows:
        gap = f"{row['smallest_gap']:.2f}" if row["smallest_gap"] else f"above {GAPS[-1]:.0f}"
        results = f"{row['perplexity']:.2f} | {row['entropy']:.3f} nats | {gap}"
        lines.append(f"| {format_length(row['target'])} | {row['model']} | {results} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The three results by target, as an SVG file."""
    titles = {"perplexity": "perplexity at 256", "entropy": "attention entropy, nats", "smallest_gap": "smallest gap"}
    points: list[dict[str, Any]] = [
        {"context": row["target"], "model": row["model"], "what": title, "value": row[key]}
        for key, title in titles.items()
        for row in rows
        if row[key] is not None
    ]
    lines = data_of(points).mark_line(point=True).encode(
        x=length_axis("context", points), y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
        color=color_by("model"),
    )  # fmt: skip
    panels = lines.properties(width=260, height=220).facet(facet=alt.Facet("what:N", title=None, sort=None), columns=3)
    panels = panels.resolve_scale(y="independent")
    write_picture(finished_chart("tradeoff", "By target", "By target.", points, panels, wide=False), path)


def main() -> None:
    """Train and measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    file, console = output / "rows.json", Console()
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    done = {(row["target"], row["model"]) for row in rows}
    ids = windows("builtin:tiny")
    if not rows:
        rows.append({"target": WINDOW, "model": "untouched", **measure("builtin:tiny", ids)})
    for factor in FACTORS:
        for name in MODELS:
            if (factor * WINDOW, name) in done:
                continue
            run = RunDir(Path("runs/tradeoff") / f"{factor}-{name.replace(', ', '-')}")
            config = config_for(factor, name)
            extend(config, run.path, given=yaml.safe_dump(BASE), console=console, resume=True)
            rows.append({"target": factor * WINDOW, "model": name, **measure(str(run.model), ids)})
            write_json(file, {"rows": rows})
            console.print(rows[-1])
    rows.sort(key=lambda row: (row["target"], list(MODELS).index(row["model"]) if row["model"] in MODELS else -1))
    write_text(output / "table.md", table(rows))
    draw(rows, output / "tradeoff.svg")


if __name__ == "__main__":
    main()
