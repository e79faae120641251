"""From finished cells to figures: methods by domain and length, beside full length, the original, the reference."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from skipwise.evaluation.intervals import wilson
from skipwise.lengths import Lengths
from skipwise.study.cell import Finished, Units
from skipwise.study.config import Cell, Choice, Development, StudyConfig
from skipwise.study.statistics import Mean, crossed_mean, holm

Row = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One method, with its scaling and budget, and all of its seeds."""

    choice: Choice
    cells: tuple[tuple[Cell, Finished], ...]

    @property
    def name(self) -> str:
        """`full, yarn, equal tokens`: only what tells it from others."""
        method, scaling, budget = self.choice
        return ", ".join(part for part in (method, scaling, budget and f"equal {budget}") if part)


def arms_of(finished: Sequence[tuple[Cell, Finished]]) -> list[Arm]:
    """Cells put together that differ in their seeds only, in order."""
    choices = dict.fromkeys((cell.method, cell.scaling, cell.budget) for cell, _ in finished)
    return [
        Arm(
            choice,
            tuple((cell, own) for cell, own in finished if (cell.method, cell.scaling, cell.budget) == choice),
        )
        for choice in choices
    ]


def choose_rates(development: Development, finished: Sequence[tuple[Cell, Finished]], target: int) -> list[Row]:
    """The learning rate of each method: that with the lowest mean loss, or the highest mean score.

    Returns:
        For each choice its `method`, `scaling`, `budget`, `learning_rate`, `at_edge` (whether a rate beyond the grid
        might be better) and `tried`: (rate, figure) pairs.
    """
    figure = f"{development.evaluation}/{development.context_length or target}"
    rows = []
    for arm in arms_of(finished):
        by_rate: dict[float, list[Units]] = {}
        for cell, own in arm.cells:
            assert cell.learning_rate is not None
            by_rate.setdefault(cell.learning_rate, []).append(own.units[development.domain][figure])
        tried = sorted((rate, _shown(_mean(units), units[0])) for rate, units in by_rate.items())
        best = (min if "nll" in next(iter(by_rate.values()))[0] else max)(tried, key=lambda pair: pair[1])
        method, scaling, budget = arm.choice
        rows.append(
            {
                "method": method,
                "scaling": scaling,
                "budget": budget,
                "learning_rate": best[0],
                "at_edge": len(tried) > 1 and best in (tried[0], tried[-1]),
                "tried": tried,
            }
        )
    return rows


def summarise(
    study: StudyConfig, lengths: Lengths, finished: Sequence[tuple[Cell, Finished]], rates: Sequence[Row]
) -> Row:
    """All figures of a study.

    Per domain, evaluation and length the arms, each with its value and 95 % interval; the ratio of its perplexity to
    that of `full` at equal steps (`over_full`) and, inside the original window, to that of the untouched model
    (`original_window_ratio`); and the paired difference from the reference: of scores as they are, of perplexities as
    a ratio. The p values of all differences at one evaluation and length, over all domains, are one family (Holm).
    """
    arms = arms_of(finished)
    rows = [row for arm in arms for row in _rows(arm, arms, study, lengths)]
    families: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row.get("p_value") is not None:
            families.setdefault((row["evaluation"], row["context_length"]), []).append(row)
    for family in families.values():
        for row, corrected in zip(family, holm([row["p_value"] for row in family]), strict=True):
            row["p_value_holm"] = corrected
    return {
        "model": study.base["model"]["path"],
        "original_length": lengths.original,
        "train_length": lengths.train,
        "target_length": lengths.target,
        "reference": study.reference,
        "seeds": list(study.seeds),
        "learning_rates": list(rates),
        "figures": rows,
    }


def mean_losses(finished: Sequence[tuple[Cell, Finished]]) -> dict[str, list[tuple[int, float]]]:
    """By arm, the mean training loss of its seeds by step; arms that are not trained have none."""
    result = {}
    for arm in arms_of(finished):
        by_step: dict[int, list[float]] = {}
        for _, own in arm.cells:
            for step, loss in own.losses:
                by_step.setdefault(step, []).append(loss)
        if by_step:
            result[arm.name] = [(step, sum(losses) / len(losses)) for step, losses in sorted(by_step.items())]
    return result


def _rows(arm: Arm, arms: Sequence[Arm], study: StudyConfig, lengths: Lengths) -> Iterator[Row]:
    method, scaling, budget = arm.choice
    for domain, figure in _figures(arm):
        evaluation, _, length = figure.rpartition("/")
        units = _units(arm, domain, figure)
        mean = _mean(units)
        row: Row = {
            "domain": domain,
            "evaluation": evaluation,
            "context_length": int(length),
            "method": method,
            "scaling": scaling,
            "budget": budget,
            "seeds": len(units),
            "value": _shown(mean, units[0]),
            "interval": _shown_interval(mean, units),
        }
        full = _other(arms, "full", scaling, "steps")
        if full is not None and full is not arm and "nll" in units[0]:
            row["over_full"] = _compared(arm, full, domain, figure)
        original = _other(arms, "untouched", None, None)
        if original is not None and original is not arm and int(length) <= lengths.original and "nll" in units[0]:
            row["original_window_ratio"] = _compared(arm, original, domain, figure)
        reference = _other(arms, study.reference, scaling, None)
        if reference is not None and reference is not arm and arm.cells[0][0].seed is not None:
            difference = _difference(arm, reference, domain, figure)
            if difference is not None:
                row["over_reference"] = _with_interval(difference, "nll" in units[0])
                row["p_value"] = difference.p_value
        yield row


def _figures(arm: Arm) -> Iterator[tuple[str, str]]:
    """(domain, evaluation/length) of all that every seed has."""
    first = arm.cells[0][1].units
    for domain, own in first.items():
        for figure in own:
            if all(figure in finished.units.get(domain, {}) for _, finished in arm.cells):
                yield domain, figure


def _units(arm: Arm, domain: str, figure: str) -> list[Units]:
    return [finished.units[domain][figure] for _, finished in arm.cells]


def _other(arms: Sequence[Arm], method: str, scaling: str | None, budget: str | None) -> Arm | None:
    return next((arm for arm in arms if arm.choice == (method, scaling, budget)), None)


def _mean(units: Sequence[Units]) -> Mean:
    """Over seeds and examples: of losses in nats per token, or of scores."""
    sums, sizes = _arrays(units)
    return crossed_mean(sums, sizes)


def _arrays(units: Sequence[Units]) -> tuple[Any, Any]:
    key = "nll" if "nll" in units[0] else "score"
    assert all(one["example"] == units[0]["example"] for one in units), "all seeds are measured on the same examples"
    sums = np.array([one[key] for one in units], dtype=np.float64)
    sizes = np.array(units[0].get("tokens", np.ones(sums.shape[1])), dtype=np.float64)
    return sums, sizes


def _difference(arm: Arm, other: Arm, domain: str, figure: str) -> Mean | None:
    """Of `arm` from `other`, on the examples both have, seed by seed; None where one has no such figure.

    An arm without seeds (the untouched model) stands beside each seed of the other.
    """
    sides = []
    for side in (arm, other):
        if any(figure not in finished.units.get(domain, {}) for _, finished in side.cells):
            return None
        sides.append({cell.seed: finished.units[domain][figure] for cell, finished in side.cells})
    seeds = [seed for seed in sides[0] if seed in sides[1]] if None not in sides[1] else list(sides[0])
    if not seeds:
        return None
    pairs = [(sides[0][seed], sides[1].get(seed, next(iter(sides[1].values())))) for seed in seeds]
    mine, sizes = _arrays([own for own, _ in pairs])
    theirs, others = _arrays([own for _, own in pairs])
    if pairs[0][0]["example"] != pairs[0][1]["example"] or (sizes != others).any():
        return None
    return crossed_mean(mine - theirs, sizes)


def _compared(arm: Arm, other: Arm, domain: str, figure: str) -> Row | None:
    difference = _difference(arm, other, domain, figure)
    return None if difference is None else _with_interval(difference, True)


def _with_interval(mean: Mean, ratio: bool) -> Row:
    transform = math.exp if ratio else float
    interval = mean.interval
    return {
        "value": transform(mean.value),
        "interval": None if interval is None else [transform(bound) for bound in interval],
    }


def _shown(mean: Mean, units: Mapping[str, Any]) -> float:
    return math.exp(mean.value) if "nll" in units else mean.value


def _shown_interval(mean: Mean, units: Sequence[Units]) -> list[float] | None:
    """95 %. Of scores also wide enough for their number (Wilson), since equal scores say nothing about variance."""
    interval = mean.interval
    if "nll" in units[0]:
        return None if interval is None else [math.exp(bound) for bound in interval]
    trials = len(units) * len(units[0]["score"])
    low, high = wilson(mean.value * trials, trials)
    if interval is not None:
        low, high = min(low, max(0.0, interval[0])), max(high, min(1.0, interval[1]))
    return [low, high]
