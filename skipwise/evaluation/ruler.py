"""The synthetic tasks of RULER: prompts with known answers, and how they are scored.

Tasks, parameters, wording (misspellings included, since they are tokens) and scoring follow Hsieh et al. (arXiv
2404.06654) and what they released, in the form for base models. Different are: the haystack is the user's text, and
needles stand anywhere with equal chance; what else differs stands at each task. Every prompt is made from a random
generator of its own and a number of units (sentences, needles or words), so that it can be made as long as the context
allows, to the unit; the official generators go in steps (of ten words or sentences), and give all prompts of a length
the same number.
"""

from __future__ import annotations

import math
import re
import string
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import count, islice, pairwise
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

import numpy as np
from pydantic import Strict

from skipwise.errors import UserError
from skipwise.evaluation.measurement import EvaluationContext, Key, Measurement, ModelUnderTest
from skipwise.evaluation.passkey import FILLER
from skipwise.evaluation.prompts import Encode, decode, encoder, largest_fitting
from skipwise.evaluation.settings import ContextLengths, Texts, Traits, check_at_least_one, check_lengths
from skipwise.evaluation.statistics import Example, Result, score_result
from skipwise.utils.files import short_hash
from skipwise.utils.sections import section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

    traits: ClassVar[Traits] = Traits(metric="score", counted="samples")
    name: Literal["ruler"] = "ruler"
    context_lengths: ContextLengths
    tasks: Annotated[tuple[RulerTask, ...], Strict(False)] = RULER_TASKS
    samples: int = 20

    def __post_init__(self) -> None:
        check_lengths(self.context_lengths)
        check_at_least_one(samples=self.samples, tasks=len(self.tasks))
        if len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"ruler takes each task once, not {list(self.tasks)}.", code="duplicate_task")

    def texts_read(self) -> list[Texts]:
        """Prompts of all tasks."""
        return [Texts(length, self.samples * len(self.tasks)) for length in self.context_lengths]

    def measurements(self, tested: ModelUnderTest, context: EvaluationContext) -> Iterator[Measurement]:
        """One measurement for each context length; an example is one prompt of one task."""
        for length in self.context_lengths:
            yield Measurement(
                name=self.name,
                context_lengths=(length,),
                data=context.held_out.name,
                metric="score",
                size=len(self.tasks) * self.samples,
                measure=partial(_measure, tested, self, context, length),
                results=partial(ruler_results, tasks=self.tasks),
            )


NOISE = FILLER.strip()
Rng = np.random.Generator


@dataclass(frozen=True)
class Prompt:
    """One prompt of a task.

    Attributes:
        text: what is asked.
        answer: how the answer begins; the model goes on from there.
        expected: what its continuation should contain.
    """

    text: str
    answer: str
    expected: tuple[str, ...]


# The first n sentences of the haystack.
Haystack = Callable[[int], list[str]]
# Made from a generator, a number of units, the haystack, and the context length, which sets some parameters.
Make = Callable[[Rng, int, Haystack, int], Prompt]


@dataclass(frozen=True)
class Task:
    """A task of the suite.

    Attributes:
        make: the prompt of so many units.
        max_new_tokens: longest answer.
    """

    make: Make
    max_new_tokens: int


# --- needles in a haystack ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needles:
    """What distinguishes the tasks of this kind (Table 5).

    Attributes:
        haystack: `noise` (one sentence repeated), `text`, or `needles` (others like those asked for).
        keys, values: kind of each: `words`, `numbers` or `uuids`.
        num_keys: needles with different keys.
        num_values: needles per key.
        num_queries: keys asked for.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


def needle_prompt(kind: Needles, rng: Rng, count: int, haystack: Haystack, length: int) -> Prompt:
    """Needles at random places of a haystack of `units` sentences."""
    keys = [_draw(kind.keys, rng) for _ in range(max(kind.num_keys, kind.num_queries))]
    values = [[_draw(kind.values, rng) for _ in range(kind.num_values)] for _ in keys]
    needles = [_needle(kind, key, value) for key, own in zip(keys, values, strict=True) for value in own]
    match kind.haystack:
        case "noise":
            sentences, between = [NOISE] * count, "\n"
        case "text":
            sentences, between = haystack(count), " "
        case _:
            sentences = [_needle(kind, _draw(kind.keys, rng), _draw(kind.values, rng)) for _ in range(count)]
            between = "\n"
    asked = [int(number) for number in rng.choice(len(keys), size=kind.num_queries, replace=False)]
    query = _listed([keys[number] for number in asked])
    expected = tuple(value for number in asked for value in values[number])
    one = len(expected) == 1
    what = kind.values[:-1] if one else kind.values
    text = (
        f"{'A' if one else 'Some'} special magic {what} {'is' if one else 'are'} hidden within the following text. "
        f"Make sure to memorize it. I will quiz you about the {what} afterwards.\n"
        f"{between.join(_scatter(needles, sentences, rng))}\n"
        f"What {'is' if one else 'are all'} the special magic {what} for {query} mentioned in the provided text?"
    )
    answer = f" The special magic {what} for {query} mentioned in the provided text {'is' if one else 'are'}"
    return Prompt(text, answer, expected)


def _needle(kind: Needles, key: str, value: str) -> str:
    return f"One of the special magic {kind.values} for {key} is: {value}."


def _draw(kind: str, rng: Rng) -> str:
    match kind:
        case "numbers":
            return str(rng.integers(10**6, 10**7))
        case "uuids":
            return str(uuid.UUID(bytes=rng.bytes(16), version=4))
        case _:
            adjectives, nouns, _ = word_lists()
            return f"{adjectives[rng.integers(len(adjectives))]}-{nouns[rng.integers(len(nouns))]}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"


def _scatter(needles: list[str], sentences: list[str], rng: Rng) -> list[str]:
    """Needles in a random order at random places between the sentences."""
    places = np.sort(rng.integers(0, len(sentences) + 1, size=len(needles)))
    result: list[str] = []
    start = 0
    for place, number in zip(places, rng.permutation(len(needles)), strict=True):
        result += [*sentences[start:place], needles[number]]
        start = int(place)
    return result + sentences[start:]


# --- variable tracking -------------------------------------------------------------------------------------------

HOPS = 4
# Sentences of the solved example, or fewer where that would be much of the context.
EXAMPLE_SENTENCES, SHORT_EXAMPLE_SENTENCES, SHORT_CONTEXT = 10, 5, 2048


def variable_prompt(rng: Rng, count: int, haystack: Haystack, length: int) -> Prompt:
    """A chain of assignments strewn over noise, after one solved example.

    The prompt ends with a space, and the example has two there, so that both are the same tokens. The official example
    has as many sentences, in steps of five, as fit into 500 tokens: ten with the tokenizer of Llama. Here it has that
    many with every tokenizer, and five below 2,048 tokens of context, where the official one is a third of it or more.
    """
    shown = EXAMPLE_SENTENCES if length >= SHORT_CONTEXT else SHORT_EXAMPLE_SENTENCES
    example, prompt = _chain(rng, shown, letters=3), _chain(rng, count, letters=5)
    solved = f"{example.text}{example.answer} {' '.join(example.expected)}"
    return Prompt(f"{solved}\n\n{prompt.text}", prompt.answer, prompt.expected)


def _chain(rng: Rng, count: int, letters: int) -> Prompt:
    names = ["".join(rng.choice(list(string.ascii_uppercase), size=letters)) for _ in range(HOPS + 1)]
    value = str(rng.integers(10**4, 10**5))
    steps = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(names))]
    # In the order of the chain, each before another sentence where there are enough; the official generator makes
    # sentences shorter where there are not.
    places = np.sort(rng.choice(count, size=len(steps), replace=count < len(steps)))
    parts: list[str] = []
    for number in range(count):
        parts += [step for step, place in zip(steps, places, strict=True) if place == number]
        parts.append(f"{NOISE}\n")
    text = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        + " ".join(parts)
        + f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
    )
    answer = (
        f" Answer: According to the chain(s) of variable assignment in the text above, {len(names)} variables are "
        f"assgined the value {value}, they are: "
    )
    return Prompt(text, answer, tuple(names))


# --- aggregation -------------------------------------------------------------------------------------------------

COMMON_WORDS = 10
# Riemann zeta of 2: what the frequencies of all coded words add up to.
ZETA_2 = math.pi**2 / 6
# Other words in the example, how often its common and its other words appear, the same for the list: below 4,096
# tokens, and from there.
COMMON_SHORT, COMMON_LONG = (10, (3, 1), (6, 1)), (30, (10, 3), (30, 3))


def common_words_prompt(rng: Rng, count: int, haystack: Haystack, length: int) -> Prompt:
    """A numbered list in which ten words appear often and `units` others seldom, after an example.

    The official generator has at most as many words as its list, about 5,500; here pairs of words follow, so that a
    long context is filled. And it begins with no other word, here with one, so that "most common" means something.
    """
    others, example_times, times = COMMON_SHORT if length < 4096 else COMMON_LONG
    example, prompt = _word_list(rng, others, example_times), _word_list(rng, count, times)
    solved = f"{example.text}{example.answer} {_numbered(example.expected)}"
    return Prompt(f"{solved}\n{prompt.text}", prompt.answer, prompt.expected)


def _word_list(rng: Rng, count: int, times: tuple[int, int]) -> Prompt:
    words = _different_words(rng, COMMON_WORDS + count)
    common, rare = words[:COMMON_WORDS], words[COMMON_WORDS:]
    listed = rng.permutation(np.array(common * times[0] + rare * times[1]))
    text = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{_numbered(listed.tolist())}\n"
        f"Question: What are the {COMMON_WORDS} most common words in the above list?"
    )
    answer = f" Answer: The top {COMMON_WORDS} words that appear most often in the list are:"
    return Prompt(text, answer, tuple(common))


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def _different_words(rng: Rng, number: int) -> list[str]:
    """Adjectives, nouns and verbs; pairs of them where there are not enough."""
    single = rng.permutation(np.array(sorted({word for words in word_lists() for word in words}))).tolist()
    words: dict[str, None] = dict.fromkeys(single[:number])
    while len(words) < number:
        words[_draw("words", rng)] = None
    return list(words)


def coded_words_prompt(rng: Rng, count: int, haystack: Haystack, length: int) -> Prompt:
    """A text of about `units` coded words whose frequencies fall with the square of their rank; the first is noise.

    Nothing is expected where the third and the fourth word are too few to be told apart (the official generator asks
    all the same), and there are at least five words (the official one has a fiftieth of the length). The answer has
    its place within the length, which the official one fills with the text alone.
    """
    ranks = np.arange(1, max(5, length // 50) + 1)
    times = (count / ranks**2.0 / ZETA_2).astype(int)
    coded = ["..."] + ["".join(rng.choice(list(string.ascii_lowercase), size=6)) for _ in ranks[1:]]
    text = rng.permutation(np.repeat(coded, times))
    return Prompt(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        f"appeared coded words. {' '.join(text)}\nQuestion: Do not provide any explanation. Please ignore the dots "
        "'....'. What are the three most frequently appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
        tuple(coded[1:4]) if times[3] > times[4] else (),
    )


# --- the suite ---------------------------------------------------------------------------------------------------

TASKS: dict[RulerTask, Task] = {
    "niah_single_1": Task(partial(needle_prompt, Needles("noise")), 128),
    "niah_single_2": Task(partial(needle_prompt, Needles("text")), 128),
    "niah_single_3": Task(partial(needle_prompt, Needles("text", values="uuids")), 128),
    "niah_multikey_1": Task(partial(needle_prompt, Needles("text", num_keys=4)), 128),
    "niah_multikey_2": Task(partial(needle_prompt, Needles("needles")), 128),
    "niah_multikey_3": Task(partial(needle_prompt, Needles("needles", keys="uuids", values="uuids")), 128),
    "niah_multivalue": Task(partial(needle_prompt, Needles("text", num_values=4)), 128),
    "niah_multiquery": Task(partial(needle_prompt, Needles("text", num_queries=4)), 128),
    "vt": Task(variable_prompt, 30),
    "cwe": Task(common_words_prompt, 120),
    "fwe": Task(coded_words_prompt, 50),
}


@cache
def word_lists() -> tuple[list[str], list[str], list[str]]:
    """Adjectives, nouns and verbs."""
    from wonderwords import RandomWord

    words = RandomWord()
    adjectives, nouns, verbs = (
        sorted({word for word in words.filter(include_categories=[kind]) if " " not in word})
        for kind in ("adjective", "noun", "verb")
    )
    return adjectives, nouns, verbs


def make_prompt(task: RulerTask, index: int, encode: Encode, length: int, seed: int, haystack: Haystack) -> Prompt:
    """The prompt number `index` of a task, as long as it can be with its answer in `length` tokens.

    Raises:
        UserError: when even the smallest does not fit.
    """
    own = TASKS[task]
    entropy = (seed, length, zlib.crc32(task.encode()), index)

    def make(count: int) -> Prompt:
        return own.make(np.random.default_rng(np.random.SeedSequence(entropy)), count, haystack, length)

    def size(count: int) -> int:
        prompt = make(count)
        return len(encode(prompt.text, prompt.answer)) + own.max_new_tokens

    if size(1) > length:
        raise UserError(
            f"ruler task {task} needs at least {size(1):,} tokens with this tokenizer, not {length:,}.",
            code="context_too_short",
        )
    prompt = make(largest_fitting(size, length))
    if not prompt.expected:
        raise UserError(
            f"ruler task {task} needs more room than {length:,} tokens for its answer to be certain.",
            code="context_too_short",
        )
    return prompt


def check_representable(tokenizer: PreTrainedTokenizerBase, encode: Encode, prompt: Prompt) -> None:
    """Raise `UserError` for a tokenizer that loses what is asked for."""
    text = decode(tokenizer, encode(prompt.text, prompt.answer))
    lost = [answer for answer in prompt.expected if answer not in text]
    if lost:
        raise UserError(
            f"A prompt must survive the tokenizer, but this one loses {lost[0]!r}. "
            "Evaluate with the tokenizer that belongs to the model.",
            code="tokenizer_changes_text",
        )


def contained(prediction: str, expected: Sequence[str]) -> float:
    """RULER's `string_match_all`: the share of the expected answers that stand in the prediction, in any case.

    >>> contained("It is ALPHA, not gamma.", ["alpha", "beta"])
    0.5
    """
    return sum(answer.lower() in prediction.lower() for answer in expected) / len(expected)


def sentences_of(tested: ModelUnderTest, context: EvaluationContext) -> Haystack:
    """The sentences of the held-out documents, one document after the other, again and again if need be."""
    sentences: list[str] = []
    source = _read_sentences(tested, context)

    def first(number: int) -> list[str]:
        sentences.extend(islice(source, max(0, number - len(sentences))))
        return sentences[:number]

    return first


def _read_sentences(tested: ModelUnderTest, context: EvaluationContext) -> Iterator[str]:
    documents = context.held_out.documents
    for round_ in count():
        found = False
        for number in np.random.default_rng((context.seed, round_)).permutation(len(documents)):
            text = decode(tested.tokenizer, documents[number].read().tolist())
            for sentence in re.split(r"(?<=[.!?])\s+|\n+", text):
                if sentence.strip():
                    found = True
                    yield sentence.strip()
        if not found:
            raise UserError(
                "ruler needs text for its haystacks, but there are no documents. Give --data.", code="no_documents"
            )


def _measure(
    tested: ModelUnderTest,
    spec: Ruler,
    context: EvaluationContext,
    length: int,
    done: set[Key],
    lengths: Sequence[int | None],
) -> Iterator[Example]:
    encode, haystack = encoder(tested.tokenizer, tested.chat), sentences_of(tested, context)
    for task in spec.tasks:
        for index in range(spec.samples):
            if (length, f"{task}:{index}") in done:
                continue
            try:
                prompt = make_prompt(task, index, encode, length, context.seed, haystack)
            except UserError as error:
                context.log(f"no ruler/{task} at {length:,} tokens: {error}", stay=True)
                break
            check_representable(tested.tokenizer, encode, prompt)
            yield {
                "context_length": length,
                "example": f"{task}:{index}",
                "task": task,
                "prompt": short_hash(prompt.text + prompt.answer),
                "expected": list(prompt.expected),
                **_answered(tested, encode, prompt, TASKS[task].max_new_tokens),
            }


def _answered(tested: ModelUnderTest, encode: Encode, prompt: Prompt, max_new_tokens: int) -> Example:
    """Prediction and score; writing ends where all that is expected has been written."""

    from skipwise.evaluation.inference import continue_greedily

    read = partial(decode, tested.tokenizer)
    ids = encode(prompt.text, prompt.answer)
    written = continue_greedily(
        tested.model, ids, max_new_tokens, lambda tokens: contained(read(tokens), prompt.expected) == 1.0
    )
    return {"prediction": read(written).strip(), "score": contained(read(written), prompt.expected)}


def ruler_results(examples: Sequence[Example], tasks: Sequence[str]) -> list[Result]:
    """Mean score of each task, and over all tasks if none is missing."""
    by_task = {task: [example for example in examples if example["task"] == task] for task in tasks}
    rows = [{"evaluation": f"ruler/{task}", **score_result("score", own)} for task, own in by_task.items() if own]
    if not rows:
        raise UserError(
            "no task of ruler fits into this context length. Evaluate longer contexts.", code="context_too_short"
        )
    return [score_result("score", examples), *rows] if len(rows) == len(tasks) else rows
