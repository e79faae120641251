"""From finished cells to results: methods by domain and length, beside full length, the original, the reference."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipwise.errors import UserError
from skipwise.evaluation.statistics import MOST_NATS, Mean, crossed_mean, holm, paired_shares, wilson
from skipwise.lengths import Lengths
from skipwise.study.cell import Contributions, Finished
from skipwise.study.config import UNTOUCHED, Cell, Choice, Development, StudyConfig, deciding_result

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

    @property
    def kind(self) -> str:
        """What is done, whatever it is called."""
        return self.cells[0][0].kind

    def contributions(self, domain: str, result: str) -> dict[int | None, Contributions]:
        """By seed, where every seed has the result; else empty."""
        own = {cell.seed: finished.contributions[domain].get(result) for cell, finished in self.cells}
        return {} if None in own.values() else own  # type: ignore[return-value]


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
    """The learning rate of each method: that with the lowest mean loss, or the highest mean score, over all domains.

    A rate that failed for a seed is out.

    Returns:
        For each choice its `arm`, `method`, `scaling`, `budget`, `learning_rate`, `at_edge` (whether a rate beyond the
        grid might be better) and `tried`: (rate, result) pairs.

    Raises:
        UserError: when all rates of a method failed.
    """
    result = "/".join(map(str, deciding_result(development, target)))
    rows = []
    for arm in arms_of(finished):
        by_rate: dict[float, list[Finished]] = {}
        for cell, own in arm.cells:
            assert cell.learning_rate is not None
            by_rate.setdefault(cell.learning_rate, []).append(own)
        values = {rate: _over_domains(own, development.domains, result) for rate, own in sorted(by_rate.items())}
        whole = {rate: value for rate, value in values.items() if value is not None}
        if not whole:
            raise UserError(
                f"No learning rate of {arm.name} gave {result} in development. See its cells, and try lower ones.",
                code="no_development_figure",
            )
        loss = any(
            "nll" in own.contributions[name].get(result, ()) for _, own in arm.cells for name in development.domains
        )
        tried = [(rate, _exp(value) if loss else value) for rate, value in whole.items()]
        best = (min if loss else max)(tried, key=lambda pair: pair[1])
        method, scaling, budget = arm.choice
        rows.append(
            {
                **{"arm": arm.name, "method": method, "scaling": scaling, "budget": budget},
                "learning_rate": best[0],
                "at_edge": len(by_rate) > 1 and best[0] in (min(by_rate), max(by_rate)),
                "tried": tried,
            }
        )
    return rows


def _over_domains(finished: Sequence[Finished], domains: Sequence[str], result: str) -> float | None:
    """The mean over domains of what their documents and the seeds give; None where one of them failed."""
    means = []
    for name in domains:
        contributions = [own.contributions[name].get(result) for own in finished]
        if None in contributions:
            return None
        means.append(_mean([one for one in contributions if one]).value)
    return sum(means) / len(means)


def summarise(
    study: StudyConfig, lengths: Lengths, finished: Sequence[tuple[Cell, Finished]], rates: Sequence[Row]
) -> Row:
    """All results of a study.

    Per domain, evaluation and length the arms, each with its value and 95 % interval; the ratio of its perplexity to
    that of full length at equal steps (`over_full`) and, inside the original window, to that of the untouched model
    (`original_window_ratio`); and the paired difference from the reference: of scores as they are, of perplexities as
    a ratio. The p values of all differences at one evaluation and length, over all domains, are one family (Holm).

    Raises:
        UserError: when cells were measured on different documents.
    """
    _check_same_documents(finished)
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
        "seeds": sorted({cell.seed for cell, _ in finished if cell.seed is not None}),
        "planned_seeds": list(study.seeds),
        "learning_rates": list(rates),
        "figures": rows,
        "failed": [
            {"cell": cell.name, "domain": domain, "figure": result, "reason": reason}
            for cell, own in finished
            for domain, results in own.failed.items()
            for result, reason in results.items()
        ],
    }


def mean_losses(finished: Sequence[tuple[Cell, Finished]]) -> dict[str, list[tuple[int, float]]]:
    """By arm, the mean training loss of its seeds by step; arms that are not trained have none."""
    found = {}
    for arm in arms_of(finished):
        by_step: dict[int, list[float]] = {}
        for _, own in arm.cells:
            for step, loss in own.losses:
                by_step.setdefault(step, []).append(loss)
        if by_step:
            found[arm.name] = [(step, sum(losses) / len(losses)) for step, losses in sorted(by_step.items())]
    return found


def _check_same_documents(finished: Sequence[tuple[Cell, Finished]]) -> None:
    first: dict[str, tuple[str, Any]] = {}
    for cell, own in finished:
        for domain, documents in own.documents.items():
            name, known = first.setdefault(domain, (cell.name, documents))
            if known != documents:
                raise UserError(
                    f"All cells must be measured on the same documents, but those of {domain} were others for {name} "
                    f"than for {cell.name}. Bring the data back, and remove the files of the cells that are wrong.",
                    code="documents_differ",
                )


def _rows(arm: Arm, arms: Sequence[Arm], study: StudyConfig, lengths: Lengths) -> Iterator[Row]:
    method, scaling, budget = arm.choice
    for domain, own in arm.cells[0][1].contributions.items():
        for result in own:
            evaluation, _, length = result.rpartition("/")
            by_seed = arm.contributions(domain, result)
            if not by_seed:  # failed for a seed
                continue
            contributions = list(by_seed.values())
            mean, loss = _mean(contributions), "nll" in contributions[0]
            row: Row = {
                **{"domain": domain, "evaluation": evaluation, "context_length": int(length), "arm": arm.name},
                **{"method": method, "scaling": scaling, "budget": budget, "seeds": len(contributions)},
                **{"value": _shown(mean, contributions[0]), "interval": _shown_interval(mean, contributions)},
            }
            full = _like(arm, [other for other in arms if other.kind == "full" and other.choice[2] != "tokens"])
            if loss and full is not None:
                row["over_full"] = _difference(arm, full, domain, result)[0]
            original = next((other for other in arms if other.kind == UNTOUCHED), None)
            if loss and original not in (None, arm) and int(length) <= lengths.original:
                assert original is not None
                row["original_window_ratio"] = _difference(arm, original, domain, result)[0]
            reference = _like(arm, [other for other in arms if other.choice[0] == study.reference])
            if reference is not None and arm.cells[0][0].seed is not None:
                row["over_reference"], row["p_value"] = _difference(arm, reference, domain, result)
            yield row


def _like(arm: Arm, others: Sequence[Arm]) -> Arm | None:
    """Of some arms the one to compare with: of the same scaling, and best of the same budget; None if it is itself."""
    same = [other for other in others if other.choice[1] in (arm.choice[1], None) or arm.choice[1] is None]
    if arm in same or not same:
        return None
    return min(same, key=lambda other: other.choice[2] != arm.choice[2])


def _mean(contributions: Sequence[Contributions]) -> Mean:
    """Over seeds and examples: of losses in nats per token, or of scores."""
    return crossed_mean(*_arrays(contributions))


def _arrays(contributions: Sequence[Contributions]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    key = "nll" if "nll" in contributions[0] else "score"
    examples = [(one["example"], one.get("tokens")) for one in contributions]
    assert all(own == examples[0] for own in examples), "the same documents give the same examples"
    sums = np.array([one[key] for one in contributions], dtype=np.float64)
    sizes = np.array(contributions[0].get("tokens", np.ones(sums.shape[1])), dtype=np.float64)
    return sums, sizes


def _difference(arm: Arm, other: Arm, domain: str, result: str) -> tuple[Row | None, float | None]:
    """Of `arm` from `other`, with its p value, paired by seed and example; None where there is none.

    An arm without seeds stands beside each seed of the other. Of losses it is a ratio.
    """
    mine, theirs = arm.contributions(domain, result), other.contributions(domain, result)
    seeds = _paired_seeds(mine, theirs)
    if not seeds:
        return None, None
    sides = [[side.get(seed, side.get(None)) for seed in seeds] for side in (mine, theirs)]
    ours, sizes = _arrays(sides[0])  # type: ignore[arg-type]
    others, _ = _arrays([*sides[1], sides[0][0]])  # type: ignore[list-item]
    gains = ours - others[:-1]
    mean = crossed_mean(gains, sizes)
    if "nll" in next(iter(mine.values())):
        interval = None if mean.interval is None else [_exp(bound) for bound in mean.interval]
        row = {"value": _exp(mean.value), "interval": interval}
    else:
        by_prompt = gains.mean(axis=0)
        low, high = paired_shares(by_prompt[by_prompt > 0].sum(), -by_prompt[by_prompt < 0].sum(), len(by_prompt))
        if mean.interval is not None:
            low, high = min(low, max(-1.0, mean.interval[0])), max(high, min(1.0, mean.interval[1]))
        row = {"value": mean.value, "interval": [low, high]}
    return row, mean.p_value if mean.stderr else None


def _paired_seeds(
    mine: Mapping[int | None, Contributions], theirs: Mapping[int | None, Contributions]
) -> list[int | None]:
    if None in mine:
        return list(theirs)
    if None in theirs:
        return list(mine)
    return [seed for seed in mine if seed in theirs]


def _exp(value: float) -> float:
    return math.exp(min(value, MOST_NATS))


def _shown(mean: Mean, contributions: Mapping[str, Any]) -> float:
    return _exp(mean.value) if "nll" in contributions else mean.value


def _shown_interval(mean: Mean, contributions: Sequence[Contributions]) -> list[float] | None:
    """95 %. Of scores also wide enough for their number (Wilson), since equal scores say nothing about variance."""
    interval = mean.interval
    if "nll" in contributions[0]:
        return None if interval is None else [_exp(bound) for bound in interval]
    trials = len(contributions) * len(contributions[0]["score"])
    low, high = wilson(mean.value * trials, trials)
    if interval is not None:
        low, high = min(low, max(0.0, interval[0])), max(high, min(1.0, interval[1]))
    return [low, high]
