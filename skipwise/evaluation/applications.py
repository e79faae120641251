"""What long contexts are for: answering questions over documents, and summarising them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Literal

from skipwise.data.config import SourceConfig
from skipwise.data.sources import ReadReport, read_records
from skipwise.errors import UserError
from skipwise.evaluation.measurement import EvaluationContext, Key, Measurement, ModelUnderTest
from skipwise.evaluation.prompts import Encode, decode, encoder, largest_fitting
from skipwise.evaluation.settings import ContextLengths, Texts, Traits, check_at_least_one, check_lengths
from skipwise.evaluation.statistics import Example, Result, score_result
from skipwise.utils.files import short_hash
from skipwise.utils.sections import section

QUESTION = (
    "Read the documents and answer the question about them in a few words.\n\n{context}\n\nQuestion: {question}\n"
)
ANSWER = "Answer:"
DOCUMENT = "Read the document and summarise it.\n\n{context}\n\n"
SUMMARY = "Summary:"
# What stands where the middle of a context was left out.
GAP = "\n[...]\n"


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

    traits: ClassVar[Traits] = Traits(metric="f1", counted="samples", source="source")
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
        check_lengths(self.context_lengths)
        check_at_least_one(samples=self.samples, max_new_tokens=self.max_new_tokens)

    def texts_read(self) -> list[Texts]:
        """A prompt for each record."""
        return [Texts(length, self.samples) for length in self.context_lengths]

    def measurements(self, tested: ModelUnderTest, context: EvaluationContext) -> Iterator[Measurement]:
        """One measurement for each context length; an example is a question."""
        for length in self.context_lengths:
            yield Measurement(
                name=self.name,
                context_lengths=(length,),
                data=self.source,
                metric="f1",
                size=self.samples,
                measure=partial(_measure_questions, tested, self, length),
                results=lambda examples: [score_result("f1", examples)],
            )


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

    traits: ClassVar[Traits] = Traits(metric="rougeL", counted="samples", source="source", package="rouge_score")
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
        check_lengths(self.context_lengths)
        check_at_least_one(samples=self.samples, max_new_tokens=self.max_new_tokens)

    def texts_read(self) -> list[Texts]:
        """A prompt for each record."""
        return [Texts(length, self.samples) for length in self.context_lengths]

    def measurements(self, tested: ModelUnderTest, context: EvaluationContext) -> Iterator[Measurement]:
        """One measurement for each context length; an example is a document."""
        for length in self.context_lengths:
            yield Measurement(
                name=self.name,
                context_lengths=(length,),
                data=self.source,
                metric="rougeL",
                size=self.samples,
                measure=partial(_measure_summaries, tested, self, length),
                results=summary_results,
            )


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall of words, without case, punctuation and articles (SQuAD).

    >>> token_f1("The big red house.", "a red house")
    0.8
    """
    one, other = _words(prediction), _words(reference)
    shared = sum((Counter(one) & Counter(other)).values())
    return 2 * shared / (len(one) + len(other)) if shared else float(one == other)


def _words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, with stemming."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError(
            "summarization needs the package rouge-score. Install skipwise[harness].", code="package_not_installed"
        ) from error
    scores = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(reference, prediction)
    return {name: float(score.fmeasure) for name, score in scores.items()}


def fitted_context(encode: Encode, template: str, answer: str, context: str, room: int) -> str:
    """The template with its context, whose middle is left out as far as the prompt would not fit.

    Raises:
        UserError: when the prompt does not fit even without context.
    """

    def size(characters: int) -> int:
        return len(encode(template.format(context=_ends(context, characters)), answer))

    if size(0) > room:
        raise UserError(
            f"A prompt needs {size(0):,} tokens without any context, but beside max_new_tokens there is room for "
            f"{max(0, room):,}. Lower max_new_tokens, or evaluate longer contexts.",
            code="context_too_short",
        )
    if len(encode(template.format(context=context), answer)) <= room:
        return template.format(context=context)
    kept = largest_fitting(lambda characters: size(min(characters, len(context))) + characters // len(context), room)
    return template.format(context=_ends(context, kept))


def _ends(context: str, characters: int) -> str:
    """The first and the last half of so many characters of a text."""
    if characters >= len(context):
        return context
    head = characters - characters // 2
    return context[:head] + GAP + context[len(context) - characters // 2 :]


def _measure_questions(
    tested: ModelUnderTest, spec: QuestionAnswering, length: int, done: set[Key], lengths: Sequence[int | None]
) -> Iterator[Example]:
    encode = encoder(tested.tokenizer, tested.chat)
    for number, (context, question), references in _records(spec, (spec.context_field, spec.question_field)):
        if (length, str(number)) not in done:
            template = QUESTION.replace("{question}", _escaped(question))
            prompt = fitted_context(encode, template, ANSWER, context, length - spec.max_new_tokens)
            # Models without a chat template go on with the next question; the first line is the answer.
            prediction = _written(tested, encode(prompt, ANSWER), spec.max_new_tokens, until="\n")
            score = max(token_f1(prediction, reference) for reference in references)
            yield _example(length, number, prompt, references, prediction) | {"score": score}


def _measure_summaries(
    tested: ModelUnderTest, spec: Summarization, length: int, done: set[Key], lengths: Sequence[int | None]
) -> Iterator[Example]:
    encode = encoder(tested.tokenizer, tested.chat)
    for number, (context,), references in _records(spec, (spec.context_field,)):
        if (length, str(number)) not in done:
            prompt = fitted_context(encode, DOCUMENT, SUMMARY, context, length - spec.max_new_tokens)
            prediction = _written(tested, encode(prompt, SUMMARY), spec.max_new_tokens, until=None)
            best = max((rouge(prediction, reference) for reference in references), key=lambda scores: scores["rougeL"])
            yield _example(length, number, prompt, references, prediction) | best | {"score": best["rougeL"]}


def summary_results(examples: Sequence[Example]) -> list[Result]:
    """The three F-measures."""
    return [
        score_result(metric, [{"score": example[metric]} for example in examples])
        for metric in ("rouge1", "rouge2", "rougeL")
    ]


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _records(
    spec: QuestionAnswering | Summarization, texts: tuple[str, ...]
) -> Iterator[tuple[int, list[str], list[str]]]:
    """The first records of the source: (number, the texts of some fields, the references).

    Raises:
        UserError: for a record without one of the fields or with one of unknown shape, or a source without records.
    """
    source = SourceConfig(source=spec.source, split=spec.split, subset=spec.subset)
    fields = (*texts, spec.answers_field)
    found, report = False, ReadReport(0.0)  # a sample is small, and no line of it should get lost
    for number, (where, record) in enumerate(islice(read_records(source, report), spec.samples)):
        report.check()
        missing = [field for field in fields if not (isinstance(record, dict) and _given(record.get(field)))]
        if missing or not isinstance(record, dict):
            raise UserError(
                f"{spec.name} needs the fields {', '.join(fields)} in every record, but {where} lacks "
                f"{', '.join(missing)}. Name them with context_field, answers_field, ...",
                code="record_field_missing",
            )
        found = True
        yield number, [_text_of(record[field], field, where) for field in texts], _references(record, spec, where)
    report.check()
    if not found:
        raise UserError(f"{spec.source} holds no records for {spec.name}.", code="source_has_no_records")


def _given(value: object) -> bool:
    """Whether a field holds something; the number 0 is an answer."""
    return value is not None and value != "" and value != []


def _text_of(value: object, field: str, where: str) -> str:
    """The text of a context or a question, in the shapes that published sets have.

    A string; a list of paragraphs; `{"text": ...}` (Natural Questions, NarrativeQA); the titles and sentences of
    HotpotQA.
    """
    match value:
        case str(text) | {"text": str(text)}:
            return text
        case [*paragraphs] if all(isinstance(one, str) for one in paragraphs):
            return "\n\n".join(map(str, paragraphs))
        case {"title": [*titles], "sentences": [*sentences]} if len(titles) == len(sentences):
            return "\n\n".join(f"{title}\n{''.join(those)}" for title, those in zip(titles, sentences, strict=True))
    raise UserError(
        f"A text is a string, a list of strings, {{text: ...}} or HotpotQA's {{title: [...], sentences: [...]}}, but "
        f"{field} of {where} is {_shown(value)}. Name another field, or write the records in one of these shapes.",
        code="record_shape_unknown",
    )


def _references(record: dict[str, Any], spec: QuestionAnswering | Summarization, where: str) -> list[str]:
    """The reference answers of a record."""
    value = record[spec.answers_field]
    references = references_of(value)
    if not references:
        raise UserError(
            "References are a string, a list of strings, SQuAD's {text: [...]}, TriviaQA's {value: ..., aliases: "
            f"[...]}} or DROP's {{spans: [...]}}, at least one of them, but {spec.answers_field} of {where} is "
            f"{_shown(value)}. Name another field with answers_field, or leave the record out.",
            code="record_shape_unknown",
        )
    return references


def references_of(value: object) -> list[str] | None:
    """The reference answers in a field, in the shapes that published sets have; None for others.

    >>> references_of({"text": ["Paris", "in Paris"], "answer_start": [4, 1]})
    ['Paris', 'in Paris']
    >>> references_of({"value": "Paris", "aliases": ["Paris, France"]})
    ['Paris', 'Paris, France']
    """
    match value:
        case bool():
            return None
        case str() | int() | float():
            return [str(value)] if str(value).strip() else []
        case {"value": str(first), "aliases": [*others]}:
            return references_of([first, *others])
        case {"text": inner} | {"spans": inner} if not isinstance(inner, dict):
            return references_of(inner)
        case [*items] if not any(isinstance(item, list) for item in items):
            found = [references_of(item) for item in items]
            return None if None in found else list(dict.fromkeys(one for those in found for one in those or ()))
    return None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _written(tested: ModelUnderTest, ids: list[int], max_new_tokens: int, until: str | None) -> str:
    from skipwise.evaluation.inference import continue_greedily

    def read(tokens: list[int]) -> str:
        return decode(tested.tokenizer, tokens).lstrip()

    tokens = continue_greedily(
        tested.model, ids, max_new_tokens, lambda written: until is not None and until in read(written)
    )
    return read(tokens).partition(until)[0].strip() if until else read(tokens).strip()


def _example(length: int, number: int, prompt: str, references: list[str], prediction: str) -> Example:
    return {
        "context_length": length,
        "example": str(number),
        "prompt": short_hash(prompt),
        "expected": references,
        "prediction": prediction,
    }
