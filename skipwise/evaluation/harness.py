"""Tasks of lm-evaluation-harness (the extra `skipwise[harness]`) in our rows."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from skipwise.errors import UserError, nearest
from skipwise.evaluation.figures import Example, Figure
from skipwise.evaluation.intervals import Z
from skipwise.evaluation.specs import Harness, parse_task
from skipwise.evaluation.unit import Key, Setting, Subject, Unit

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def harness_units(subject: Subject, spec: Harness, setting: Setting) -> Iterator[Unit]:
    """A unit per task."""
    for text in spec.tasks:
        yield Unit(
            name=f"harness/{text}",
            context_lengths=(None,),
            data="lm-eval",
            metric="acc",
            size=None,
            measure=partial(_measure, subject, spec, setting, text),
            figures=partial(harness_figures, task=text),
        )


def _measure(
    subject: Subject, spec: Harness, setting: Setting, text: str, done: set[Key], lengths: Sequence[int | None]
) -> Iterator[Example]:
    """The examples of a task, and one that holds its figures as the harness computes them."""
    if (None, text) in done:
        return
    try:
        import lm_eval
    except ImportError as error:
        raise UserError(
            "harness needs lm-evaluation-harness. Install skipwise[harness].", code="package_not_installed"
        ) from error
    manager = task_manager(spec.include_path)
    name, shots = parse_task(text)
    if name not in manager.all_tasks:
        raise UserError(f"harness.tasks: {name!r} is not known.{nearest(name, manager.all_tasks)}", code="unknown_task")
    results = _explained(
        text,
        lm_eval.simple_evaluate,
        model=harness_model()(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=spec.batch_size),
        tasks=[name],
        num_fewshot=shots,
        limit=spec.limit,
        task_manager=manager,
        apply_chat_template=subject.chat,
        random_seed=setting.seed,
        numpy_random_seed=setting.seed,
        torch_random_seed=setting.seed,
        fewshot_random_seed=setting.seed,
        log_samples=True,
        verbosity="ERROR",
    )
    assert results is not None, "only ranks above 0 get nothing"
    yield from (sample for sample in _samples(text, results["samples"]) if (None, sample["example"]) not in done)
    yield {"context_length": None, "example": text, "task": text, "figures": _figures(text, results)}


@cache
def harness_model() -> Any:
    """The harness's own model class, changed as its docstring says."""
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):  # type: ignore[misc]
        """Puts one token in front of a text whose likelihood is wanted.

        A tokenizer that begins texts with a token itself would put a second one there, which would be scored.
        """

        def loglikelihood_rolling(self, *arguments: Any, **keywords: Any) -> list[float]:
            before = vars(self)["add_bos_token"]
            self.add_bos_token = False
            try:
                likelihoods: list[float] = super().loglikelihood_rolling(*arguments, **keywords)
            finally:
                self.add_bos_token = before
            return likelihoods

    return Model


@cache
def task_manager(include_path: str | None) -> "TaskManager":
    """The harness's index of its thousands of tasks, and of those in another directory; it takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _explained(task: str, run: Callable[..., Any], **keywords: Any) -> Any:
    """`run(...)`; that its data cannot be had is no mistake of ours."""
    import datasets

    try:
        return run(**keywords)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        code = error.code if isinstance(error, UserError) else "harness_task_failed"
        raise UserError(f"harness task {task} cannot be run: {str(error).splitlines()[0]}", code=code) from error


def _samples(text: str, samples: dict[str, list[dict[str, Any]]]) -> Iterator[Example]:
    """One line per document, scored by its main metric where that is a number in [0, 1].

    The main metric is `acc_norm` where a task has it, as in the tables of others, else the first one.
    """
    for task, lines in samples.items():
        for line in lines:
            values = {metric: line[metric] for metric in line["metrics"] if isinstance(line.get(metric), int | float)}
            metric = "acc_norm" if "acc_norm" in values else next(iter(values), "")
            if metric and 0 <= values[metric] <= 1:
                yield {
                    "context_length": None,
                    "example": f"{text}/{task}:{line['doc_id']}",
                    "task": text,
                    "prompt": line["prompt_hash"][:16],
                    **values,
                    "score": float(values[metric]),
                    "metric": metric,
                }


def _figures(text: str, results: dict[str, Any]) -> list[Figure]:
    """A figure per task (and group of tasks) and metric, with the harness's own standard error."""
    figures = []
    for task, values in results["results"].items():
        samples = int(results["n-samples"].get(task, {}).get("effective", 0))
        samples = samples or sum(one["effective"] for one in results["n-samples"].values())
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not isinstance(value, int | float) or not filter_name or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            error = float(error) if isinstance(error, int | float) else None
            own = text if task == text.partition(":")[0] else f"{text}/{task}"
            figures.append(
                {
                    "evaluation": f"harness/{own}",
                    "metric": metric if filter_name == "none" else f"{metric} ({filter_name})",
                    "value": float(value),
                    "stderr": error,
                    **_interval(metric, float(value), error),
                    "num_samples": samples,
                }
            )
    return figures


def _interval(metric: str, value: float, error: float | None) -> Figure:
    if error is None:
        return {"interval_low": None, "interval_high": None}
    low, high = value - Z * error, value + Z * error
    if metric.startswith("acc") or metric == "exact_match":
        low, high = max(0.0, low), min(1.0, high)
    return {"interval_low": low, "interval_high": high}


def harness_figures(examples: Sequence[Example], task: str) -> list[Figure]:
    """What the harness computed for a task."""
    return [figure for example in examples if example["example"] == task for figure in example["figures"]]
