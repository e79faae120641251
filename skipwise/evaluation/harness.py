"""Tasks of lm-evaluation-harness (the extra `skipwise[harness]`) in our rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Strict

from skipwise.errors import UserError, nearest
from skipwise.evaluation.measurement import EvaluationContext, Key, Measurement, ModelUnderTest
from skipwise.evaluation.settings import Traits, check_at_least_one
from skipwise.evaluation.statistics import Example, Result, Z
from skipwise.utils.sections import section

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


# Table 3 of the PoSE paper: zero-shot, but for ARC-Challenge with 25 and HellaSwag with 10 examples.
SHORT_TASKS = ("boolq:0", "piqa:0", "winogrande:0", "truthfulqa_mc2:0", "arc_challenge:25", "hellaswag:10")


def parse_task(text: str) -> tuple[str, int | None]:
    """`"arc_challenge:25"` -> `("arc_challenge", 25)`: a task and its number of examples in the prompt.

    Without a number it is the one that the task's own definition says.
    """
    name, _, shots = text.partition(":")
    if not name or (shots and not shots.isdigit()):
        raise UserError(
            f"A task of the harness is a name or name:number-of-examples, not {text!r}. Give boolq:0.",
            code="malformed_task",
        )
    return name, int(shots) if shots else None


@section
class Harness:
    """Tasks of lm-evaluation-harness, at the length they have. Needs the extra `skipwise[harness]`.

    Attributes:
        tasks: names of tasks, each with its number of examples in the prompt: `boolq`, or `arc_challenge:25`.
            The default is the suite of the PoSE paper's Table 3.
        limit: only so many documents per task; `None` for all.
        include_path: a directory with tasks of your own (YAML).
        batch_size: prompts at once.
    """

    traits: ClassVar[Traits] = Traits(
        metric="acc", counted="tasks", results_by="tasks", package="lm_eval", without_effect=frozenset({"batch_size"})
    )
    name: Literal["harness"] = "harness"
    tasks: Annotated[tuple[str, ...], Strict(False)] = SHORT_TASKS
    limit: int | None = None
    include_path: str | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_at_least_one(limit=self.limit, batch_size=self.batch_size, tasks=len(self.tasks))
        for task in self.tasks:
            parse_task(task)

    @property
    def context_lengths(self) -> tuple[None]:
        """These tasks have no length of their own."""
        return (None,)

    def texts_read(self) -> None:
        """Not known: the tasks decide."""
        return

    def measurements(self, tested: ModelUnderTest, context: EvaluationContext) -> Iterator[Measurement]:
        """One measurement for each task."""
        for text in self.tasks:
            yield Measurement(
                name=f"harness/{text}",
                context_lengths=(None,),
                data="lm-eval",
                metric=self.traits.metric,
                size=None,
                measure=partial(_measure, tested, self, context, text),
                results=partial(harness_results, task=text),
            )


def _measure(
    tested: ModelUnderTest,
    spec: Harness,
    context: EvaluationContext,
    text: str,
    done: set[Key],
    lengths: Sequence[int | None],
) -> Iterator[Example]:
    """The examples of a task, and one that holds its results as the harness computes them."""
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
    report = _explained(
        text,
        lm_eval.simple_evaluate,
        model=harness_model()(pretrained=tested.model, tokenizer=tested.tokenizer, batch_size=spec.batch_size),
        tasks=[name],
        num_fewshot=shots,
        limit=spec.limit,
        task_manager=manager,
        apply_chat_template=tested.chat,
        random_seed=context.seed,
        numpy_random_seed=context.seed,
        torch_random_seed=context.seed,
        fewshot_random_seed=context.seed,
        log_samples=True,
        verbosity="ERROR",
    )
    assert report is not None, "only ranks above 0 get nothing"
    yield from (sample for sample in _samples(text, report["samples"]) if (None, sample["example"]) not in done)
    yield {"context_length": None, "example": text, "task": text, "figures": _results(text, report)}


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
def task_manager(include_path: str | None) -> TaskManager:
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


def _results(text: str, report: dict[str, Any]) -> list[Result]:
    """A result per task (and group of tasks) and metric, with the harness's own standard error."""
    results = []
    for task, values in report["results"].items():
        samples = int(report["n-samples"].get(task, {}).get("effective", 0))
        samples = samples or sum(one["effective"] for one in report["n-samples"].values())
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not isinstance(value, int | float) or not filter_name or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            error = float(error) if isinstance(error, int | float) else None
            own = text if task == text.partition(":")[0] else f"{text}/{task}"
            results.append(
                {
                    "evaluation": f"harness/{own}",
                    "metric": metric if filter_name == "none" else f"{metric} ({filter_name})",
                    "value": float(value),
                    "stderr": error,
                    **_interval(metric, float(value), error),
                    "num_samples": samples,
                }
            )
    return results


def _interval(metric: str, value: float, error: float | None) -> Result:
    if error is None:
        return {"interval_low": None, "interval_high": None}
    low, high = value - Z * error, value + Z * error
    if metric.startswith("acc") or metric == "exact_match":
        low, high = max(0.0, low), min(1.0, high)
    return {"interval_low": low, "interval_high": high}


def harness_results(examples: Sequence[Example], task: str) -> list[Result]:
    """What the harness computed for a task."""
    return [result for example in examples if example["example"] == task for result in example["figures"]]
