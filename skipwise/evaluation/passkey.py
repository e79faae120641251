"""Passkey retrieval: a number hidden in a long text, asked for at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from skipwise.errors import UserError
from skipwise.evaluation.measurement import EvaluationContext, Key, Measurement, ModelUnderTest
from skipwise.evaluation.prompts import Encode, decode, encoder, largest_fitting
from skipwise.evaluation.settings import ContextLengths, Texts, Traits, check_at_least_one, check_lengths
from skipwise.evaluation.statistics import Example, Result, share_result
from skipwise.utils.files import short_hash
from skipwise.utils.sections import section

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Wording of Mohtashami & Jaggi (arXiv 2305.16300), as in Figure 2a of the PoSE paper.
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = " The pass key{of} is {key}. Remember it. {key} is the pass key{of}."
QUESTION = " What is the pass key{of}?"
ANSWER = " The pass key{of} is"
# Of several keys in a prompt.
DOORS = "red blue green white black brown golden silver small large old new left right first last".split()


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

    traits: ClassVar[Traits] = Traits(metric="accuracy", counted="trials")
    name: Literal["passkey"] = "passkey"
    context_lengths: ContextLengths
    trials: int = 50
    depth_bins: int = 5
    keys_per_prompt: int = 1

    def __post_init__(self) -> None:
        check_lengths(self.context_lengths)
        check_at_least_one(trials=self.trials, depth_bins=self.depth_bins, keys_per_prompt=self.keys_per_prompt)
        if self.keys_per_prompt > MOST_KEYS or self.trials % self.keys_per_prompt:
            raise UserError(
                f"passkey.keys_per_prompt must be at most {MOST_KEYS} and divide trials, but is {self.keys_per_prompt} "
                f"with {self.trials} trials.",
                code="wrong_keys_per_prompt",
            )

    def texts_read(self) -> list[Texts]:
        """A prompt for each trial, or for as many as share one.

        Prompts with one key are sorted by its place, and each is read from where it differs from the one before.
        """
        share = 0.5 if self.keys_per_prompt == 1 else 1.0
        return [Texts(length, self.trials // self.keys_per_prompt, share) for length in self.context_lengths]

    def measurements(self, tested: ModelUnderTest, context: EvaluationContext) -> Iterator[Measurement]:
        """One measurement for each context length; an example is a trial."""
        for length in self.context_lengths:
            yield Measurement(
                name=self.name,
                context_lengths=(length,),
                data="passkey prompts",
                metric="accuracy",
                size=self.trials,
                measure=partial(_measure, tested, self, context.seed, length),
                results=partial(passkey_results, depth_bins=min(self.depth_bins, self.trials)),
            )


@dataclass(frozen=True)
class Fact:
    """A key in a prompt.

    Attributes:
        key: its digits.
        depth: where it stands, 0 at the beginning and 1 at the end of the filler.
        door: which of several it is; None for the only one.
    """

    key: str
    depth: float
    door: str | None = None

    def write(self, template: str) -> str:
        """`NEEDLE`, `QUESTION` or `ANSWER` for this key."""
        of = "" if self.door is None else f" of the {self.door} door"
        return template.format(of=of, key=self.key)


@dataclass(frozen=True)
class Trial:
    """One prompt with its answer.

    Attributes:
        ids: tokens of prompt and answer.
        answer: how many of them, at the end, are the answer.
        depth: where the key stands, 0 at the beginning and 1 at the end of the filler.
        key: the digits.
        prompt: hash of the text.
    """

    ids: list[int]
    answer: int
    depth: float
    key: str
    prompt: str


def passkey_text(repeats: int, facts: Sequence[Fact]) -> str:
    """The prompt with `units` repetitions of the filler and facts in the order of their depths, up to the question."""
    text, placed = TASK, 0
    for fact in facts:
        before = round(fact.depth * repeats)
        text += FILLER * (before - placed) + fact.write(NEEDLE)
        placed = before
    return text + FILLER * (repeats - placed)


def filler_repeats(encode: Encode, context_length: int, keys: int = 1) -> int:
    """The largest number of filler repetitions with which prompt and answer fit.

    Raises:
        UserError: when they do not fit even without filler.
    """
    facts = [Fact("12345", (i + 0.5) / keys, _door(i, keys)) for i in range(keys)]

    def size(repeats: int) -> int:
        text = passkey_text(repeats, facts) + facts[0].write(QUESTION)
        return len(encode(text, f"{facts[0].write(ANSWER)} {facts[0].key}"))

    if size(0) > context_length:
        raise UserError(
            f"A passkey prompt needs at least {size(0)} tokens with this tokenizer, but the context length is "
            f"{context_length}. Evaluate longer contexts.",
            code="context_too_short",
        )
    return largest_fitting(size, context_length)


def _door(number: int, keys: int) -> str | None:
    return None if keys == 1 else DOORS[number]


def make_trials(encode: Encode, context_length: int, trials: int, seed: int, keys_per_prompt: int = 1) -> list[Trial]:
    """Trials of one length: random keys at depths spread evenly; the same for the same seed.

    Args:
        keys_per_prompt: so many trials share a prompt, and ask for one of its keys each.
    """
    repeats = filler_repeats(encode, context_length, keys_per_prompt)
    rng = np.random.default_rng(np.random.SeedSequence((seed, context_length)))
    keys = ["".join(map(str, rng.integers(0, 10, size=5))) for _ in range(trials)]
    prompts = _prompts(keys, keys_per_prompt)
    while True:  # keys whose digits do not merge are longer than the one that was measured with
        made = [make_trial(encode, repeats, facts, asked) for facts in prompts for asked in facts]
        surplus = max(len(trial.ids) for trial in made) - context_length
        if surplus <= 0:
            return made
        if repeats == 0:
            raise UserError(
                f"A passkey prompt needs {surplus} tokens more than the context length of {context_length} with this "
                "tokenizer. Evaluate longer contexts.",
                code="context_too_short",
            )
        repeats -= 1


def _prompts(keys: list[str], keys_per_prompt: int) -> list[list[Fact]]:
    """The facts of each prompt: a single key somewhere, or several from its beginning to its end."""
    if keys_per_prompt == 1:
        return [[Fact(key, (i + 0.5) / len(keys))] for i, key in enumerate(keys)]
    groups = [keys[start : start + keys_per_prompt] for start in range(0, len(keys), keys_per_prompt)]
    return [[Fact(key, (i + 0.5) / len(group), DOORS[i]) for i, key in enumerate(group)] for group in groups]


def make_trial(encode: Encode, repeats: int, facts: Sequence[Fact], asked: Fact) -> Trial:
    """Tokenise one prompt and its answer, together, as a text is read.

    The answer begins where the tokens part from those of the prompt alone, whatever the tokenizer merges.

    Raises:
        UserError: when the tokenizer cannot represent the prompt.
    """
    text, answer = passkey_text(repeats, facts) + asked.write(QUESTION), asked.write(ANSWER)
    ids, prompt = encode(text, f"{answer} {asked.key}"), encode(text, answer)
    shared = next((i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), min(len(ids), len(prompt)))
    return Trial(ids=ids, answer=len(ids) - shared, depth=asked.depth, key=asked.key, prompt=short_hash(text))


def check_representable(tokenizer: PreTrainedTokenizerBase, encode: Encode) -> None:
    """Raise `UserError` for a tokenizer that loses the digits of a key."""
    key = "13579 02468"
    fact = Fact(key, 0.5)
    trial = make_trial(encode, 0, [fact], fact)
    written = decode(tokenizer, trial.ids)
    if written.count(key) < 3:
        raise UserError(
            "A passkey prompt must survive the tokenizer, but this one loses words or digits of it: "
            f"it reads {written[-60:]!r}. Evaluate with the tokenizer that belongs to the model.",
            code="tokenizer_changes_text",
        )


def _measure(
    tested: ModelUnderTest, spec: Passkey, seed: int, length: int, done: set[Key], lengths: Sequence[int | None]
) -> Iterator[Example]:
    encode = encoder(tested.tokenizer, tested.chat)
    check_representable(tested.tokenizer, encode)
    trials = make_trials(encode, length, spec.trials, seed, spec.keys_per_prompt)
    wanted = [(length, str(number)) not in done for number in range(len(trials))]
    for number, written in greedy_answers(tested.model, trials, wanted):
        trial = trials[number]
        yield {
            "context_length": length,
            "example": str(number),
            "prompt": trial.prompt,
            "depth": trial.depth,
            "expected": trial.key,
            "prediction": decode(tested.tokenizer, written).strip(),
            "score": int(written == trial.ids[-trial.answer :]),
        }


def greedy_answers(
    model: PreTrainedModel, trials: Sequence[Trial], wanted: Sequence[bool]
) -> Iterator[tuple[int, list[int]]]:
    """(index of a trial, what greedy decoding writes up to its first miss), for each trial that is wanted.

    One pass over prompt and answer decides a trial: greedy decoding writes the key exactly if every token of it is the
    first choice after the right ones before it. Trials are in the order of their depths or share a prompt, so that
    each shares its beginning with the next.
    """
    from skipwise.evaluation.inference import score_endings

    for number, scores in score_endings(model, [(trial.ids, trial.answer) for trial in trials], wanted):
        chosen, answer = scores.greedy.tolist(), trials[number].ids[-trials[number].answer :]
        miss = next((i for i, (a, b) in enumerate(zip(chosen, answer, strict=True)) if a != b), len(answer))
        yield number, chosen[: miss + 1]  # later ones come after right tokens that it would not have written


def count_retrieved(model: PreTrainedModel, trials: Sequence[Trial]) -> int:
    """How many keys a model finds."""
    answers = greedy_answers(model, trials, [True] * len(trials))
    return sum(written == trials[number].ids[-trials[number].answer :] for number, written in answers)


def passkey_results(examples: Sequence[Example], depth_bins: int) -> list[Result]:
    """Accuracy at one length: pooled, and by depth."""
    by_depth = [[one for one in examples if int(one["depth"] * depth_bins) == number] for number in range(depth_bins)]
    return [
        share_result(examples),
        *(share_result(own, (number + 0.5) / depth_bins) for number, own in enumerate(by_depth) if own),
    ]
