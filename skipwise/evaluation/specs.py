"""What can be evaluated, and the row every figure ends up in. No torch, so that config can import it."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, Strict

from skipwise.errors import UserError
from skipwise.lengths import parse_length
from skipwise.sections import section

Length = Annotated[int, BeforeValidator(parse_length, json_schema_input_type=int | str), Field(ge=1)]
DocumentIds = Annotated[tuple[str, ...], Strict(False)] | None
ContextLengths = Annotated[tuple[Length, ...], Strict(False)]

# Table 3 of the PoSE paper: zero-shot, but for ARC-Challenge with 25 and HellaSwag with 10 examples.
SHORT_TASKS = ("boolq:0", "piqa:0", "winogrande:0", "truthfulqa_mc2:0", "arc_challenge:25", "hellaswag:10")

Stage = Literal["original", "interpolated", "extended"]
Status = Literal["ok", "beyond_window", "failed"]


def _check_lengths(context_lengths: tuple[int, ...]) -> None:
    if not context_lengths or min(context_lengths) < 2 or len(set(context_lengths)) < len(context_lengths):
        raise UserError(
            f"context_lengths must be different lengths of at least 2 tokens, not {list(context_lengths)}. "
            "Give for example [4096, 32768].",
            code="wrong_context_lengths",
        )


def _check_at_least_one(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"{name} must be at least 1, not {count}.", code="count_below_one")


@section
class Perplexity:
    """Sliding-window perplexity (Press et al., arXiv 2108.12409) of held-out documents.

    Every scored token is predicted exactly once, from at least `context_length - stride` tokens before it (or
    all there are), and fewer than `context_length`. Log-likelihoods are summed over all
    documents and divided by the number of scored tokens. A tokenizer's begin-of-text token stands in front of
    a document, and is context only; windows in the middle of a document have none.

    Attributes:
        context_lengths: window sizes, in tokens.
        stride: tokens the window moves at a time, at most one less than the context length; `None` for 1,024, or
            half the context length where that is less.
        documents: number of documents; which ones is drawn by the seed.
        min_document_tokens: only documents with at least this many tokens, and never fewer than the largest
            context length that any document reaches.
        document_ids: these documents (number of the source, colon, number of the document) and no others.
        final_tokens: score only this many tokens at the end of each document, which is then cut to
            the largest context length, so that all context lengths score the same tokens
            and only the context differs. `None` scores whole documents, as the paper does.
        max_document_tokens: documents are cut to this many tokens; `None` for no limit.
    """

    name: Literal["perplexity"] = "perplexity"
    context_lengths: ContextLengths
    stride: int | None = None
    documents: int = 50
    min_document_tokens: Length | None = None
    document_ids: DocumentIds = None
    final_tokens: int | None = None
    max_document_tokens: Length | None = None

    def __post_init__(self) -> None:
        _check_lengths(self.context_lengths)
        _check_at_least_one(
            stride=self.stride,
            documents=self.documents,
            final_tokens=self.final_tokens,
            max_document_tokens=self.max_document_tokens,
        )
        if self.max_document_tokens is not None and self.max_document_tokens < max(self.context_lengths):
            raise UserError(
                f"max_document_tokens must not be below the context lengths, but {self.max_document_tokens:,} < "
                f"{max(self.context_lengths):,}. Raise it, or leave it out.",
                code="document_limit_below_context",
            )


@section
class TruncatedPerplexity:
    """Perplexity of the first `context_length` tokens of each held-out document.

    One forward pass gives every length, since a causal model's predictions do not depend on what
    follows. A length that no document reaches is absent.

    Attributes:
        context_lengths: where documents are cut, in tokens.
        documents: number of documents; which ones is drawn by the seed.
        min_document_tokens, document_ids: as for `perplexity`.
    """

    name: Literal["truncated_perplexity"] = "truncated_perplexity"
    context_lengths: ContextLengths
    documents: int = 50
    min_document_tokens: Length | None = None
    document_ids: DocumentIds = None

    def __post_init__(self) -> None:
        _check_lengths(self.context_lengths)
        _check_at_least_one(documents=self.documents)


@section
class LongPPL:
    """Perplexity of the tokens that need a long context (LongPPL, Fang et al., arXiv 2410.23771).

    A token is a key token if the evaluator model finds it much likelier with the long context than with the
    last `short_context` tokens only (log-ratio above `alpha`, Equation 3), and likely in itself (log-likelihood
    with the long context above `beta`). Key tokens are chosen once, stored, and the same for all models.

    Attributes:
        context_lengths: documents are cut to this many tokens of the evaluator, which must fit into its window.
        evaluator: the model that chooses: directory, hub id or `.gguf` file.
        short_context: K, tokens of the short context at least.
        stride: tokens by which the short contexts move; they have up to `short_context + stride` tokens.
        alpha: least gain in log-likelihood (nats) that the long context must bring.
        beta: least log-likelihood (nats) with the long context.
        documents: number of documents; which ones is drawn by the seed.
        min_document_tokens, document_ids: as for `perplexity`.
    """

    name: Literal["longppl"] = "longppl"
    context_lengths: ContextLengths
    evaluator: str
    short_context: Length = 4096
    stride: int = 1024
    alpha: float = 2.0
    beta: float = -2.0
    documents: int = 10
    min_document_tokens: Length | None = None
    document_ids: DocumentIds = None

    def __post_init__(self) -> None:
        _check_lengths(self.context_lengths)
        _check_at_least_one(stride=self.stride, documents=self.documents)
        if self.short_context >= min(self.context_lengths):
            raise UserError(
                f"short_context must be below the context lengths, but {self.short_context:,} >= "
                f"{min(self.context_lengths):,}. Lower it, for example to {max(1, min(self.context_lengths) // 4):,}.",
                code="short_context_too_long",
            )


# There are so many doors.
MOST_KEYS = 16


@section
class Passkey:
    """Passkey retrieval (Mohtashami & Jaggi, arXiv 2305.16300; PoSE paper, Figure 2a).

    A five-digit key is hidden among repeated filler sentences; the greedy answer must begin with it.

    Attributes:
        context_lengths: length of prompt and answer together, in tokens.
        trials: keys per length; their depths are spread evenly over the filler.
        depth_bins: rows of the length x depth grid.
        keys_per_prompt: so many trials share a prompt, which holds a key for each of several doors from its beginning
            to its end, and is read once. Harder, since the others distract, and cheaper: for very long contexts.
    """

    name: Literal["passkey"] = "passkey"
    context_lengths: ContextLengths
    trials: int = 50
    depth_bins: int = 5
    keys_per_prompt: int = 1

    def __post_init__(self) -> None:
        _check_lengths(self.context_lengths)
        _check_at_least_one(trials=self.trials, depth_bins=self.depth_bins, keys_per_prompt=self.keys_per_prompt)
        if self.keys_per_prompt > MOST_KEYS or self.trials % self.keys_per_prompt:
            raise UserError(
                f"passkey.keys_per_prompt must be at most {MOST_KEYS} and divide trials, but is {self.keys_per_prompt} "
                f"with {self.trials} trials.",
                code="wrong_keys_per_prompt",
            )


RulerTask = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
]
RULER_TASKS: tuple[RulerTask, ...] = get_args(RulerTask)


@section
class Ruler:
    """The synthetic tasks of RULER (Hsieh et al., arXiv 2404.06654): retrieval, tracing, aggregation.

    Needles in a haystack, one or several (`niah_*`), chains of variables (`vt`), the most common words of a list
    (`cwe`), the most frequent words of a coded text (`fwe`). A score is the share of the expected answers that the
    greedy continuation contains. Rows of each task are named `ruler/<task>`; `ruler` is their mean.

    Attributes:
        context_lengths: length of prompt and longest answer together, in tokens.
        tasks: which of them.
        samples: prompts per task and length.
    """

    name: Literal["ruler"] = "ruler"
    context_lengths: ContextLengths
    tasks: Annotated[tuple[RulerTask, ...], Strict(False)] = RULER_TASKS
    samples: int = 20

    def __post_init__(self) -> None:
        _check_lengths(self.context_lengths)
        _check_at_least_one(samples=self.samples, tasks=len(self.tasks))
        if len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"ruler takes each task once, not {list(self.tasks)}.", code="duplicate_task")


@section
class QuestionAnswering:
    """Questions over long or several documents: token F1 against the best reference, as in SQuAD and LongBench.

    Attributes:
        source: JSONL, Parquet or hub dataset, with the fields of LongBench (arXiv 2308.14508): `context`
            (documents), `input` (the question) and `answers` (a list).
        context_lengths: prompt and answer together fit into this many tokens; a longer context loses its middle.
        samples: records, from the first on.
        max_new_tokens: longest answer.
        split: of a hub dataset.
        subset: of a hub dataset that has several.
        context_field, question_field, answers_field: where the records have other names.
    """

    name: Literal["question_answering"] = "question_answering"
    source: str
    context_lengths: ContextLengths
    samples: int = 50
    max_new_tokens: int = 32
    split: str = "test"
    subset: str | None = None
    context_field: str = "context"
    question_field: str = "input"
    answers_field: str = "answers"

    def __post_init__(self) -> None:
        _check_lengths(self.context_lengths)
        _check_at_least_one(samples=self.samples, max_new_tokens=self.max_new_tokens)


@section
class Summarization:
    """Summaries of long documents: F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004) against the best reference.

    Attributes:
        source: as for `question_answering`; the reference is in `answers`, a list or a text.
        context_lengths: prompt and summary together fit into this many tokens; a longer document loses its middle.
        samples: records, from the first on.
        max_new_tokens: longest summary.
        split: of a hub dataset.
        subset: of a hub dataset that has several.
        context_field, answers_field: where the records have other names.
    """

    name: Literal["summarization"] = "summarization"
    source: str
    context_lengths: ContextLengths
    samples: int = 50
    max_new_tokens: int = 256
    split: str = "test"
    subset: str | None = None
    context_field: str = "context"
    answers_field: str = "answers"

    def __post_init__(self) -> None:
        _check_lengths(self.context_lengths)
        _check_at_least_one(samples=self.samples, max_new_tokens=self.max_new_tokens)


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

    name: Literal["harness"] = "harness"
    tasks: Annotated[tuple[str, ...], Strict(False)] = SHORT_TASKS
    limit: int | None = None
    include_path: str | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        _check_at_least_one(limit=self.limit, batch_size=self.batch_size, tasks=len(self.tasks))
        for task in self.tasks:
            parse_task(task)

    @property
    def context_lengths(self) -> tuple[None]:
        """These tasks have no length of their own."""
        return (None,)


EvaluationSpec = (
    Perplexity | TruncatedPerplexity | LongPPL | Passkey | Ruler | QuestionAnswering | Summarization | Harness
)
EVALUATIONS: tuple[type[EvaluationSpec], ...] = get_args(EvaluationSpec)


@dataclass(frozen=True)
class EvalResult:
    """One figure, as one tidy row.

    Attributes:
        stage: `original`, `interpolated` (new RoPE, no training) or `extended`.
        evaluation: name of the evaluation; of a task of a suite, `suite/task`.
        data: what it was measured on.
        context_length: tokens; None for tasks that have no length of their own.
        depth: where in the context, in [0, 1]; None when pooled or not applicable.
        metric: `perplexity`, `bits_per_byte`, `accuracy`, `score`, `f1`, `rouge1`, ...
        value: the figure; None when status is `failed`.
        stderr: its standard error, in the units of `value`.
        interval_low, interval_high: 95 % interval.
        num_samples: what the figure is a mean over: tokens, bytes or prompts.
        status: `ok`, `beyond_window` (longer than the model's own window: measured all the same, or
            not measurable) or `failed`.
        reason: why, unless `ok`.
        model: path or id of the model.
    """

    stage: Stage
    evaluation: str
    data: str
    context_length: int | None
    depth: float | None
    metric: str
    value: float | None
    stderr: float | None
    interval_low: float | None
    interval_high: float | None
    num_samples: int
    status: Status
    reason: str | None
    model: str

    def as_row(self) -> dict[str, Any]:
        """A plain dictionary, ready for JSON."""
        return asdict(self)
