"""The documents that models are measured on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skipwise.data.store import Documents
from skipwise.data.windows import intervals


@dataclass(frozen=True)
class HeldOutDocument:
    """One document, read when it is needed.

    Attributes:
        id: the same for every model: number of the source and of the document in it.
        documents, start, stop: where its tokens are.
        begin: the tokenizer's begin-of-text tokens, in front of the text; often none.
    """

    id: str
    documents: Documents
    start: int
    stop: int
    begin: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.begin) + self.stop - self.start

    def read(self, limit: int | None = None) -> NDArray[np.int64]:
        """int64[n]: its first `limit` tokens, or all."""
        stop = self.stop if limit is None else min(self.stop, self.start + limit)
        tokens = np.concatenate([np.array(self.begin, dtype=np.int64), self.documents.read(self.start, stop)])
        return tokens[:limit]


@dataclass(frozen=True)
class HeldOut:
    """Documents to score, and what to call them."""

    name: str
    documents: list[HeldOutDocument]


def held_out_documents(parts: Sequence[Sequence[Documents]], join: bool, begin: list[int]) -> list[HeldOutDocument]:
    """Every document of every source.

    Args:
        parts: the documents of each source.
        join: run neighbouring documents together.
        begin: the tokenizer's begin-of-text tokens.
    """
    return [
        HeldOutDocument(f"{source}:{number}", documents, int(start), int(stop), tuple(begin))
        for source, own in enumerate(parts)
        for number, (documents, start, stop) in enumerate(
            (documents, *span) for documents in own for span in intervals(documents, join)
        )
    ]


def choose_documents(
    documents: Sequence[HeldOutDocument],
    context_lengths: Sequence[int],
    count: int,
    seed: int,
    at_least: int | None = None,
    ids: Sequence[str] | None = None,
) -> tuple[list[HeldOutDocument], list[int]]:
    """The documents to score, and the context lengths they reach.

    Every length is measured on the same documents: `count` of those with at least as many tokens as the largest
    length that any document reaches, drawn by the seed. Nothing is padded.

    Args:
        at_least: leave out documents with fewer tokens.
        ids: of the documents to take, as far as they are long enough; nothing is drawn then.
    """
    if ids is not None:
        documents, count = [document for document in documents if document.id in set(ids)], len(ids)
    long = [document for document in documents if len(document) >= (at_least or 0)]
    longest = max(map(len, long), default=0)
    reached = [length for length in sorted(context_lengths) if length <= longest]
    if not reached:
        return [], []
    enough = [document for document in long if len(document) >= reached[-1]]
    if len(enough) > count:
        drawn = np.random.default_rng(seed).choice(len(enough), size=count, replace=False)
        enough = [enough[number] for number in sorted(drawn)]
    return enough, reached
