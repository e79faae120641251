"""Rows of results."""

from __future__ import annotations

from typing import Any

from skipwise.evaluation.results import EvalResult


def row(stage: Any, evaluation: str, length: int, value: float | None, **changes: Any) -> EvalResult:
    metric = "accuracy" if evaluation == "passkey" else "perplexity"
    settings: dict[str, Any] = {
        "stage": stage, "evaluation": evaluation, "data": "d", "context_length": length, "depth": None,
        "metric": metric, "value": value, "stderr": None, "interval_low": None, "interval_high": None,
        "num_samples": 10, "status": "ok", "reason": None, "model": "m",
    }  # fmt: skip
    return EvalResult(**settings | changes)
