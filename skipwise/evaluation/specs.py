"""All evaluations, and what holds for any of them. No torch, so that the configuration can import it.

To add an evaluation, write a class with the methods of `Evaluation` and add it to `EvaluationSpec`.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any, cast, get_args

from skipwise.data.config import SourceConfig
from skipwise.data.sources import check_source
from skipwise.errors import UserError
from skipwise.evaluation.applications import QuestionAnswering, Summarization
from skipwise.evaluation.harness import Harness
from skipwise.evaluation.longppl import LongPPL
from skipwise.evaluation.metrics import Metric, metric_of
from skipwise.evaluation.passkey import Passkey
from skipwise.evaluation.perplexity import Perplexity, TruncatedPerplexity
from skipwise.evaluation.results import ResultKey
from skipwise.evaluation.ruler import Ruler
from skipwise.evaluation.settings import DocumentEvaluation
from skipwise.models.locate import model_location
from skipwise.utils.sections import name_of

EvaluationSpec = (
    Perplexity | TruncatedPerplexity | LongPPL | Passkey | Ruler | QuestionAnswering | Summarization | Harness
)
EVALUATIONS: tuple[type[EvaluationSpec], ...] = get_args(EvaluationSpec)


def main_metric(evaluation: str) -> Metric:
    """Main metric of an evaluation by name; of a task of a suite (`suite/task`) that of the suite."""
    kinds = {name_of(kind): kind for kind in EVALUATIONS}
    return metric_of(kinds[evaluation.partition("/")[0]].traits.metric)


def check_requirements(spec: EvaluationSpec) -> None:
    """Check, without importing anything heavy, that what an evaluation needs is there.

    Raises:
        UserError: for records, another model or a package that are missing.
    """
    traits = spec.traits
    if (source := source_of(spec)) is not None:
        check_source(SourceConfig(source=source))
    if traits.other_model is not None:
        model_location(getattr(spec, traits.other_model))
    if traits.package is not None and find_spec(traits.package) is None:
        raise UserError(
            f"{spec.name} needs the package {traits.package}. Install skipwise[harness].", code="package_not_installed"
        )


def source_of(spec: EvaluationSpec) -> str | None:
    """The source of records that an evaluation reads; None without one."""
    return None if spec.traits.source is None else str(getattr(spec, spec.traits.source))


def on_documents(spec: EvaluationSpec) -> DocumentEvaluation | None:
    """The evaluation where it scores held-out documents, else None."""
    return cast(DocumentEvaluation, spec) if spec.traits.on_documents else None


def result_keys(specs: Sequence[EvaluationSpec]) -> Iterator[ResultKey]:
    """Keys of all results that are asked for."""
    for spec in specs:
        if spec.traits.results_by == "context_lengths":
            yield from ((spec.name, length) for length in spec.context_lengths)
        else:
            yield from ((f"{spec.name}/{entry}", None) for entry in getattr(spec, spec.traits.results_by))


def without_results(specs: Sequence[EvaluationSpec], known: Collection[ResultKey]) -> Iterator[EvaluationSpec]:
    """The evaluations without what is known."""
    for spec in specs:
        entries = getattr(spec, spec.traits.results_by)
        left = tuple(entry for entry, key in zip(entries, result_keys([spec]), strict=True) if key not in known)
        if left:
            changes: dict[str, Any] = {spec.traits.results_by: left}
            yield replace(spec, **changes)


def settings_by_result(specs: Sequence[EvaluationSpec]) -> Iterator[tuple[ResultKey, dict[str, Any]]]:
    """Settings that each result depends on, besides what its key says."""
    for spec in specs:
        left_out = {"context_lengths", spec.traits.results_by} | spec.traits.without_effect
        settings = {key: value for key, value in asdict(spec).items() if key not in left_out}
        yield from ((key, settings) for key in result_keys([spec]))
