"""Documents of a run: pieces to train on, pieces to watch the loss on, and documents to evaluate on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from skipwise.data.chat import begin_of_text
from skipwise.data.config import DataConfig
from skipwise.data.held_out import HeldOut, held_out_documents
from skipwise.data.retrieval import RetrievalDocuments
from skipwise.data.store import Documents, TokenStore, open_sources
from skipwise.data.windows import Source, TrainingExamples, cut_spans, with_answers
from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.positions import PositionSampler

# Windows on which the loss is watched during training.
WATCHED_WINDOWS = 32
# The order of the examples takes 16 bytes each.
MOST_EXAMPLES = 2**28
# A synthetic document holds a fact, a question and an answer.
SHORTEST_RETRIEVAL = 32


@dataclass(frozen=True)
class Mixture:
    """Documents of a run.

    Attributes:
        sources: pieces to train on; only sources that have any.
        held_out_sources: pieces to watch the loss on.
        held_out: documents to evaluate on.
        begin: ids of the tokens in front of every piece.
        largest_id: largest token id in the documents.
        summary: origin and size of every source, as in `data.json`.
    """

    sources: list[Source]
    held_out_sources: list[Source]
    held_out: HeldOut
    begin: list[int]
    largest_id: int
    summary: dict[str, Any]

    def training_examples(
        self, count: int, seed: int, retrieval: RetrievalDocuments, retrieval_share: float, retrieval_length: int
    ) -> TrainingExamples:
        """Examples to train on.

        Args:
            count: number of examples.
            seed: seed of the mixture and the orders.
            retrieval: synthetic documents to mix in.
            retrieval_share: their share of the examples.
            retrieval_length: their length in tokens.

        Raises:
            UserError: for more examples than their order can be drawn for.
        """
        if count > MOST_EXAMPLES:
            raise UserError(
                f"A run has at most {MOST_EXAMPLES:,} windows, since their order is drawn at its start, but {count:,} "
                "are asked for. Lower train.max_steps or the batch.",
                code="too_many_windows",
            )
        return TrainingExamples(self.sources, count, seed, self.begin, retrieval, retrieval_share, retrieval_length)

    def watched_examples(self, seed: int) -> TrainingExamples:
        """Held-out examples to watch the loss on.

        Raises:
            UserError: when no held-out document is as long as a training window.
        """
        usable = [source for source in self.held_out_sources if len(source.spans)]
        if not usable:
            raise UserError(
                "eval_steps needs a held-out document as long as a training window, but there is none. "
                "Raise data.held_out_share, lower the train length, or leave train.eval_steps out.",
                code="held_out_documents_too_short",
            )
        return TrainingExamples(usable, WATCHED_WINDOWS, seed, self.begin)


def open_mixture(
    config: DataConfig,
    sampler: PositionSampler,
    lengths: Lengths,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    *,
    trains: bool = True,
) -> Mixture:
    """Tokenise the documents of a run, or open them where an earlier run did, and cut them into pieces.

    Args:
        config: settings of the documents.
        sampler: position sampler that draws windows from the pieces.
        lengths: original, train and target length.
        tokenizer: tokenizer of the model.
        console: console for progress.
        trains: whether there is any training. Without it no document needs to be as long as a window.

    Raises:
        UserError: when a source cannot be read or has no document that is long enough.
    """
    window = sampler.window_length(lengths)
    if config.retrieval_share and trains and window < SHORTEST_RETRIEVAL:
        raise UserError(
            f"Retrieval documents need a training window of {SHORTEST_RETRIEVAL} tokens, but it has {window}. "
            "Raise the train length, or set data.retrieval_share to 0.",
            code="window_too_short_for_retrieval",
        )
    stores = open_sources(config, tokenizer, console)
    begin = begin_of_text(tokenizer)
    sources = _cut(config, sampler, lengths, [store.train for store in stores], len(begin))
    if trains:
        _check_long_enough(config, sampler, lengths, stores, sources, len(begin), console)
    return Mixture(
        sources=[source for source in sources if len(source.spans)],
        held_out_sources=_cut(config, sampler, lengths, [store.held_out for store in stores], len(begin)),
        held_out=HeldOut(
            "held-out " + ", ".join(source.source for source in config.sources),
            held_out_documents([[store.held_out] for store in stores], config.short_documents == "join", begin),
        ),
        begin=begin,
        largest_id=max(documents.largest_id() for store in stores for documents in (store.train, store.held_out)),
        summary={"sources": [store.summary for store in stores]},
    )


def _cut(
    config: DataConfig, sampler: PositionSampler, lengths: Lengths, documents: list[Documents], begin: int
) -> list[Source]:
    """Pieces of the documents of every source; `begin` tokens are put in front of each piece later."""
    needed, used = sampler.tokens_needed(lengths) - begin, sampler.tokens_used(lengths) - begin
    shortest = max(needed, config.min_document_tokens or 0)
    join = config.short_documents == "join"
    return [
        Source(own, with_answers(own, cut_spans(own, needed, used, join, shortest)), source.weight)
        for source, own in zip(config.sources, documents, strict=True)
    ]


def _check_long_enough(
    config: DataConfig,
    sampler: PositionSampler,
    lengths: Lengths,
    stores: list[TokenStore],
    sources: list[Source],
    begin: int,
    console: Console,
) -> None:
    """Print how many documents are too short; refuse a source that has no other."""
    shortest = max(sampler.tokens_needed(lengths) - begin, config.min_document_tokens or 0)
    join = config.short_documents == "join"
    for store, source in zip(stores, sources, strict=True):
        short = 0 if join else int((store.train.lengths < shortest).sum())
        name = store.summary["source"]
        if not len(source.spans):
            raise UserError(
                f"Method {sampler.name!r} needs documents of at least {shortest:,} tokens, but the longest training "
                f"document of {name} has {int(store.train.lengths.max(initial=0)):,}. Lower --train-length, give "
                f"longer documents{'' if join else ', or set data.short_documents=join'}.",
                code="documents_too_short",
            )
        store.summary["too_short"] = short
        if short:
            console.print(f"{name}: {short:,} documents below {shortest:,} tokens are left out", highlight=False)


def retrieval_documents(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, sources: list[Source], copies_share: float = 0.25
) -> RetrievalDocuments:
    """Synthetic retrieval documents with filler from the training text.

    Args:
        tokenizer: tokenizer of the model.
        vocabulary: number of tokens that the model knows; no id is above it.
        sources: pieces to take filler from.
        copies_share: share of the documents that ask for a copy of their text instead of a fact.
    """
    weights = np.array([source.weight for source in sources])

    def prose(rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        source = sources[rng.choice(len(sources), p=weights / weights.sum())]
        begin, end = source.spans[rng.integers(len(source.spans))]
        start = rng.integers(begin, max(begin, end - count), endpoint=True)
        return np.resize(source.documents.read(int(start), int(min(start + count, end))), count)

    return RetrievalDocuments(
        encode=lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        bos=begin_of_text(tokenizer),
        special=frozenset(tokenizer.all_special_ids),
        vocabulary_size=min(len(tokenizer), vocabulary),
        prose=prose,
        copies_share=copies_share,
    )
