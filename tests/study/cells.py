"""Cells of a study without running them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from skipwise.config.files import merge

PERPLEXITY = {"name": "perplexity", "context_lengths": [256, 1024], "stride": 64, "documents": 2, "final_tokens": 64}

STUDY: dict[str, Any] = {
    "base": {
        "model": {"path": "builtin:tiny"},
        "lengths": {"target": 1024},
        "data": "builtin:python",
        "train": {"max_steps": 40, "warmup_steps": 8},
    },
    "methods": {
        "untouched": "untouched",
        "interpolate": "interpolate",
        "full": "full",
        "pose": "pose",
        "three": {"positions": {"chunks": 3}, "train": {"echo_share": 0.5}},
    },
    "scalings": {"yarn": {"name": "yarn", "beta_fast": 4}, "linear": "linear"},
    "seeds": [1, 2],
    "development": {"learning_rates": [1e-3, 2e-3], "seeds": [0], "domains": ["dev"]},
    "domains": {
        "dev": {"data": {"source": "builtin:python", "held_out_share": 0.05}, "evaluate": [PERPLEXITY]},
        "books": {"data": "books.jsonl", "evaluate": [PERPLEXITY]},
    },
}


def without_none(values: dict[str, Any]) -> dict[str, Any]:
    """So that None takes a key away."""
    kept = {key: without_none(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in kept.items() if value is not None}


def write(path: Path, **changes: Any) -> Path:
    file = path / "study.yaml"
    values = without_none(merge(STUDY, changes))
    file.write_text(yaml.safe_dump(values))
    return file
