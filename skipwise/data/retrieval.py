"""Synthetic retrieval documents: facts hidden in text, and asked for later.

A model tuned on prose alone forgets how to retrieve, because hardly any token of prose depends on a
single far one. The wording here has nothing in common with the evaluated passkey prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Encode = Callable[[str], list[int]]
Tokens = NDArray[np.int64]
Scored = NDArray[np.bool_]
Fact = tuple[list[int], list[int], list[int]]  # tokens of statement, question and answer

# Facts in one document, and questions about them.
MAX_FACTS = 4

_ADJECTIVES = """amber ancient azure blank brass broken calm central clever copper coral crimson distant dusty
eastern empty faint fallen frozen gentle golden grand hidden hollow inner ivory jade late lower lucky main marble
narrow new noble northern old olive outer pale plain polar private public purple quiet rapid remote royal rusty
sandy second secret sharp silent silver simple slow small southern spare steel stone sturdy third upper velvet
western wide wild wooden""".split()
_NOUNS = """account badge bridge cabin camera circuit closet compass cottage counter door drawer elevator engine
factory furnace gallery garden gate hangar harbor island kettle ladder lantern library locker market meter mirror
museum needle network office orchard paddle pantry parcel platform pocket printer pump radio reactor river router
saddle safe satellite server shelf shutter signal sluice station stove studio ticket tower tractor tunnel turbine
valley vault vessel wagon warehouse window workshop""".split()
_KINDS = """channel code combination count identifier index level limit number quota rank reading score sequence
serial setting token total value weight""".split()
# (statement, question): k is what is asked for, v its value; the question's last words stand in the statement.
_TEMPLATES = (
    ("The {k} was set to {v}.", "As said before, the {k} was set to"),
    ("Note: {k} = {v}.", "Look it up: {k} ="),
    ("{k}: {v}.", "Now repeat. {k}:"),
    ("They chose {v} for the {k}; the {k} became {v}.", "Hence the {k} became"),
    ("Our {k} equals {v}, so write down {v}.", "In short, our {k} equals"),
    ("Record for {k} -> {v}.", "Once more, record for {k} ->"),
    ("For the {k} use {v}.", "Question: for the {k} use"),
    ("Somebody wrote that the {k} reads {v}.", "Again, the {k} reads"),
    ("My {k} has always been {v}, always {v}.", "To sum up, my {k} has always been"),
    ("{v} belongs to the {k}. Indeed the {k} stays {v}.", "To conclude, the {k} stays"),
    ("Now the {k} is {v}, nothing else.", "Say it again: now the {k} is"),
    ("Whoever asks for the {k} is told {v}. Such a {k} is {v}.", "Somebody asks. Such a {k} is"),
)
_FILLER = """Trains run late on Sundays.
Rain falls on old stone.
A cat sleeps near the stove.
Nobody counted the boats.
Bread is sold at noon.
The wind turned cold again.
Leaves gather by the fence.
He closed the shop early.
Two roads meet at the mill.
Clouds drift above the hills.
She mended the blue coat.
Paper burns faster than wood.
The clock in the hall stopped.
Children ran down the lane.
Milk is left at the gate.
The lamp flickered twice.
Birds left before winter.
Old maps hang on the wall.
The river is wide here.
Her answer is always late.
The bridge is closed today.
Supper is on the table.
Everything is quiet again.""".splitlines()


@dataclass(frozen=True)
class RetrievalDocuments:
    """Draws retrieval documents of exactly one window.

    Attributes:
        encode: text to token ids, without special tokens.
        bos: token ids a text begins with; often empty.
        special: token ids that never occur in a text, and so not in random spans.
        vocabulary_size: token ids are below this.
        prose: `prose(rng, n)` gives int64[n] tokens of real text for filler.
        copies_share: share of documents that repeat a span instead of asking for a fact.
    """

    encode: Encode
    bos: list[int]
    special: frozenset[int]
    vocabulary_size: int
    prose: Callable[[np.random.Generator, int], Tokens]
    copies_share: float = 0.25

    def draw(self, length: int, rng: np.random.Generator) -> tuple[Tokens, Scored]:
        """One document.

        Args:
            length: tokens in the document; at least 32.
            rng: the only source of randomness.

        Returns:
            `(tokens, scored)`: int64[length], and bool[length], true for the tokens that can be known
            from what stands before; the loss belongs there and nowhere else.
        """
        if rng.random() >= self.copies_share:
            for _ in range(8):  # a short window may not hold many long facts
                document = self._facts(length, rng)
                if document is not None:
                    return document
        return self._copy(length, rng) if rng.random() < 0.5 else self.cycle(length, rng)

    def _facts(self, length: int, rng: np.random.Generator) -> tuple[Tokens, Scored] | None:
        """Facts of one wording strewn in filler, some asked for after their statement; None when they do not fit."""
        count = int(rng.integers(1, MAX_FACTS + 1))
        facts = self._templated(count, rng) if rng.random() < 0.3 else self._free(count, rng)
        asked = rng.permutation(count)[: rng.integers(1, MAX_FACTS + 1)]
        size = sum(len(stated) for stated, _, _ in facts) + sum(len(facts[i][1] + facts[i][2]) for i in asked)
        room = length - len(self.bos) - size
        if room < 0:
            return None
        # Often the end of a question stands all over the filler, with other words after it.
        decoy = near_miss(*facts[0][:2], rng) if rng.random() < 0.7 else []
        filler = self._filler(room, rng, decoy).tolist()
        places = rng.integers(0, room, size=count, endpoint=True)
        # The end gives the longest distance, but a model only ever asked at the end learns to answer only there.
        asked_at = [room if rng.random() < 0.5 else int(rng.integers(places[i], room, endpoint=True)) for i in asked]
        pieces = [(place, fact[0], False) for place, fact in zip(places, facts, strict=True)]
        for i, place in zip(asked, asked_at, strict=True):
            pieces += [(place, facts[i][1], False), (place, facts[i][2], True)]
        tokens, scored, done = list(self.bos), [False] * len(self.bos), 0
        for place, piece, is_answer in [*sorted(pieces, key=lambda piece: piece[0]), (room, [], False)]:
            tokens += filler[done:place] + piece
            scored += [False] * (place - done) + [is_answer] * len(piece)
            done = int(place)
        return np.array(tokens, dtype=np.int64), np.array(scored)

    def _templated(self, count: int, rng: np.random.Generator) -> list[Fact]:
        """Facts in English, all of one template, so that only the key tells them apart."""
        statement, question = _TEMPLATES[rng.integers(len(_TEMPLATES))]
        space = str(rng.choice(["\n", " "]))
        pairs = [(_key(rng), _value(rng)) for _ in range(count)]
        return [
            (
                self.encode(" " + statement.format(k=key, v=value)),
                self.encode(space + question.format(k=key)),
                self.encode(f" {value}."),
            )
            for key, value in pairs
        ]

    def _free(self, count: int, rng: np.random.Generator) -> list[Fact]:
        """Facts in no fixed words: a key and joining words from the text, a value, text around them.

        Whoever learned a dozen templates by heart fails on the next one; these are always new.
        """

        def text(least: int, most: int) -> list[int]:
            return [int(token) for token in self.prose(rng, int(rng.integers(least, most + 1)))]

        join, after, lead = text(1, 3), text(0, 6), text(0, 8)
        facts = []
        for _ in range(count):
            key = text(1, 4) if rng.random() < 0.7 else self.encode(" " + _key(rng))
            # Were it always a number, the kind of token would give half of the answer away.
            value = self.encode(" " + _value(rng)) if rng.random() < 0.6 else text(2, 6)
            facts.append((text(0, 4) + key + join + value + after, lead + key + join, value))
        return facts

    def _copy(self, length: int, rng: np.random.Generator) -> tuple[Tokens, Scored]:
        """A span in filler, and the same span again at the end."""
        span = int(rng.integers(8, (length - len(self.bos)) // 2, endpoint=True))
        text = self._random_tokens(span, rng) if rng.random() < 0.5 else self.prose(rng, span)
        room = length - len(self.bos) - 2 * span
        before = int(rng.integers(0, room, endpoint=True))
        parts = [self.bos, self._filler(before, rng), text, self._filler(room - before, rng), text]
        # The first tokens of the second copy come as a surprise.
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]), np.arange(
            length
        ) >= length - span + 3

    def cycle(self, length: int, rng: np.random.Generator) -> tuple[Tokens, Scored]:
        """A short span of random tokens over and over; the result is that of `draw`."""
        span = int(rng.integers(4, length // 4, endpoint=True))
        cycle = np.resize(self._random_tokens(span, rng), length - len(self.bos))
        tokens = np.concatenate([np.asarray(self.bos, dtype=np.int64), cycle])
        return tokens, np.arange(length) > len(self.bos) + span

    def _filler(self, length: int, rng: np.random.Generator, decoy: Sequence[int] = ()) -> Tokens:
        """Real text, a piece of it over and over, or a few sentences over and over.

        Args:
            length: tokens wanted.
            rng: the only source of randomness.
            decoy: tokens to strew into it: what follows them there is not the answer to anything.
        """
        kind = rng.random()
        if kind < 0.4:
            unit = self.prose(rng, length)
        elif kind < 0.7:
            unit = self.prose(rng, int(rng.integers(8, 65)))
        else:
            chosen = rng.choice(_FILLER, size=rng.integers(1, 7), replace=False)
            unit = np.array(self.encode("".join(f" {sentence}" for sentence in chosen)), dtype=np.int64)
        if len(decoy) and len(unit) > len(decoy):
            unit = unit.copy()
            places = len(unit) - len(decoy)
            for place in rng.integers(0, places, size=1 + rng.binomial(places, rng.uniform(0.0, 0.15))):
                unit[place : place + len(decoy)] = decoy
        return np.resize(unit, length)

    def _random_tokens(self, count: int, rng: np.random.Generator) -> Tokens:
        """Any tokens, few different ones, or numbers: of few, one alone does not tell which comes next."""
        kind = rng.random()
        if kind < 0.3:
            return np.array(self.encode(" " + " ".join(_number(rng) for _ in range(count)))[:count], dtype=np.int64)
        pool = np.setdiff1d(rng.integers(0, self.vocabulary_size, size=count + 16), list(self.special))
        if kind < 0.6:
            pool = rng.choice(pool, size=rng.integers(3, 13))
        return rng.choice(pool, size=count)


def near_miss(stated: Sequence[int], question: Sequence[int], rng: np.random.Generator) -> list[int]:
    """One or two tokens a question ends with, but not all that it shares with the statement (unless that is one).

    >>> near_miss([7, 1, 2, 9], [5, 1, 2], np.random.default_rng(0))
    [2]
    """
    shared = 1
    while shared < len(question) and _occurs(question[-shared - 1 :], stated):
        shared += 1
    return list(question[-min(int(rng.integers(1, 3)), max(1, shared - 1)) :])


def _occurs(part: Sequence[int], whole: Sequence[int]) -> bool:
    return any(list(whole[i : i + len(part)]) == list(part) for i in range(len(whole) - len(part) + 1))


def _key(rng: np.random.Generator) -> str:
    """`"copper lantern code"`, sometimes shorter."""
    words = [rng.choice(_NOUNS)]
    if rng.random() < 0.8:
        words.insert(0, rng.choice(_ADJECTIVES))
    if rng.random() < 0.8:
        words.append(rng.choice(_KINDS))
    return " ".join(words)


def _value(rng: np.random.Generator) -> str:
    """A number, sometimes two or three words."""
    if rng.random() < 0.85:
        return _number(rng)
    return " ".join(rng.choice(_NOUNS + _ADJECTIVES, size=rng.integers(2, 4)))


def _number(rng: np.random.Generator) -> str:
    """Three to seven digits."""
    return "".join(map(str, rng.integers(0, 10, size=rng.choice([3, 4, 5, 5, 5, 6, 7]))))
