"""From documents to batches: spans of tokens, and the collator that draws their positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from skipwise.data.features import start_in, tokens_of
from skipwise.data.retrieval import RetrievalDocuments
from skipwise.data.sentences import Sentences
from skipwise.data.store import Documents
from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.positions import Document, Plain, PositionSampler, echo_mask, example_rng
from skipwise.utils.distributed import rank

Spans = NDArray[np.int64]
# Streams of randomness of one example that must not be the same one.
_ORDER, _RETRIEVAL = 2**31, 2**31 + 1


def cut_spans(documents: Documents, needed: int, used: int, join: bool, shortest: int = 0) -> Spans:
    """Cut documents into the pieces that windows are drawn from.

    Args:
        needed: shortest piece, in tokens.
        used: longest piece, in tokens; a longer document gives several.
        join: run neighbouring documents together (their end-of-text tokens between them) first.
        shortest: documents below this are left out, even if pieces could be cut from them.

    Returns:
        int64[m, 2]: begin and end of each piece in `documents.tokens`.

    >>> documents = Documents(np.arange(30), np.array([0, 20]), np.array([19, 24]))
    >>> cut_spans(documents, needed=4, used=8, join=False).tolist()
    [[0, 8], [8, 16], [20, 24]]
    """
    pieces = []
    for begin, end in intervals(documents, join):
        if end - begin < shortest:
            continue
        starts = np.arange(begin, end - needed + 1, used)
        pieces.append(np.stack([starts, np.minimum(starts + used, end)], axis=1))
    return np.concatenate(pieces) if pieces else np.empty((0, 2), dtype=np.int64)


def with_answers(documents: Documents, spans: Spans) -> Spans:
    """Of conversations the pieces in which the assistant speaks, since there is no loss in others; of texts all."""
    if documents.scored is None:
        return spans
    spoken = np.array([documents.scored[begin:end].any() for begin, end in spans], dtype=bool)
    kept: Spans = spans[spoken]
    return kept


def intervals(documents: Documents, join: bool) -> Spans:
    """int64[n, 2]: begin and end of each document, or of each run of neighbours."""
    if not join or not len(documents):
        return np.stack([documents.starts, documents.stops], axis=1)
    # Neighbours have at most one token between them, that of the end of a text.
    first = np.concatenate([[True], documents.starts[1:] - documents.stops[:-1] > 1])
    last = np.concatenate([first[1:], [True]])
    return np.stack([documents.starts[first], documents.stops[last]], axis=1)


@dataclass(frozen=True)
class Source:
    """Documents with the pieces they were cut into, and their weight in the mixture."""

    documents: Documents
    spans: Spans
    weight: float


class TrainingExamples(Dataset[dict[str, Any]]):
    """Every example of a run, in order: example i is the same whatever worker or rank asks for it.

    Sources are mixed by weight; each goes through its pieces in a new random order per epoch.

    Args:
        sources: at least one, each with at least one span.
        num_examples: steps times windows per step.
        seed: of the mixture and the orders.
        begin: token ids put in front of every piece: what the tokenizer begins a text with.
        retrieval: synthetic documents to mix in.
        retrieval_share: their share of the examples.
        retrieval_length: their length in tokens.
    """

    def __init__(
        self,
        sources: list[Source],
        num_examples: int,
        seed: int,
        begin: Sequence[int] = (),
        retrieval: RetrievalDocuments | None = None,
        retrieval_share: float = 0.0,
        retrieval_length: int = 0,
    ) -> None:
        self.sources, self.seed = sources, seed
        self.begin = np.array(begin, dtype=np.int64)
        self.retrieval, self.retrieval_length = retrieval, retrieval_length
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}
        weights = np.array([source.weight for source in sources], dtype=np.float64)
        shares = np.append(weights / weights.sum() * (1 - retrieval_share), retrieval_share)
        rng = np.random.default_rng(np.random.SeedSequence((seed, num_examples, _ORDER)))
        self.source_of = rng.choice(len(shares), size=num_examples, p=shares)
        self.visit_of = np.zeros(num_examples, dtype=np.int64)
        for source in range(len(shares)):
            mine = self.source_of == source
            self.visit_of[mine] = np.arange(mine.sum())

    def __len__(self) -> int:
        return len(self.source_of)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Tokens of one piece; `visit` names the random stream its positions are drawn from."""
        number, visit = int(self.source_of[index]), int(self.visit_of[index])
        if number == len(self.sources):
            assert self.retrieval is not None
            rng = example_rng(self.seed, _RETRIEVAL, visit, source=number)
            tokens, scored = self.retrieval.draw(self.retrieval_length, rng)
            return {"input_ids": tokens, "scored": scored, "visit": (0, visit, number)}
        source = self.sources[number]
        epoch, place = divmod(visit, len(source.spans))
        span = int(self._order(number, epoch)[place])
        tokens = np.concatenate([self.begin, source.documents.read(*source.spans[span])])
        feature = {"input_ids": tokens, "visit": (epoch, span, number)}
        if source.documents.scored is not None:
            said = source.documents.scored[slice(*source.spans[span])]
            feature["answers"] = np.concatenate([np.zeros(len(self.begin), bool), said])
        return feature

    def _order(self, number: int, epoch: int) -> NDArray[np.int64]:
        """The order of a source's pieces in one epoch; only the latest is kept."""
        known_epoch, order = self._orders.get(number, (-1, np.empty(0, np.int64)))
        if known_epoch != epoch:
            rng = np.random.default_rng(np.random.SeedSequence((self.seed, number, epoch, _ORDER)))
            order = rng.permutation(len(self.sources[number].spans))
            self._orders[number] = (epoch, order)
        return order


@dataclass(frozen=True)
class WindowCollator:
    """Draws a window from each document and makes a batch: fresh positions at every visit.

    Works in any training loop. A Hugging Face `Trainer` needs `remove_unused_columns=False`, or it takes away the
    columns that a model's forward pass does not name before the collator sees them.

    Features need `input_ids`, at least `sampler.tokens_needed(lengths)` of them without padding; of a longer text a
    window begins at a random token, another one at every visit. `labels` of -100 have no loss, zeros of
    `attention_mask` are padding and left out, and zeros of TRL's `completion_mask` and `assistant_masks` have no loss.
    Several texts in one feature (packing), or inputs that are no text, are refused. Optional are `scored` (bool per
    token: only these have a loss, and no text between them is cut out), `answers` (the same of a conversation, whose
    text may be cut) and `visit` (epoch, index, source: the random stream to draw from). Without `visit` the draw comes
    from torch's generator, which `DataLoader` seeds anew for every worker and epoch, and from the rank of the process;
    a batch for evaluation is then another one at every call.

    The attention mask is always there, usually all ones: transformers reads a jump in `position_ids`
    without a mask as the start of another packed sequence, and cuts the attention there.

    Attributes:
        sampler: the position sampler.
        lengths: original, train and target length.
        seed: of the windows of features with a `visit`.
        untouched_share: share of windows that keep ordinary positions.
        whole_batches: all windows of a batch keep ordinary positions, or none, for models that take other frequencies
            where the largest position of a batch is beyond the original window.
        echo_share: share of the windows with skips in which tokens echo (see `echo_mask`). Then the mask is
            one of scores, which sdpa and eager attention take, but not flash and flex attention.
        sentences: what tokens say about sentences (`sentences_of`), for the sampler that skips between them.
        mark_text: add what `WindowTrainer` takes, and a model's own forward pass does not: `text_runs_on`,
            bool[batch, window]: whether the text up to a token has no gap; `visit`, int64[batch, 3], of the features.
    """

    sampler: PositionSampler
    lengths: Lengths
    seed: int = 0
    untouched_share: float = 0.0
    echo_share: float = 0.0
    mark_text: bool = False
    whole_batches: bool = False
    sentences: Sentences | None = None

    def __post_init__(self) -> None:
        if self.sampler.needs_sentences and self.sentences is None:
            raise UserError(
                f"{self.sampler.name} skips between sentences, which WindowCollator must know, but sentences is None. "
                "Give it sentences=skipwise.sentences_of(tokenizer).",
                code="sentences_missing",
            )

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Tensors `input_ids`, `attention_mask`, `position_ids`, `labels`, each int64[batch, window].

        In a batch with echoes the mask is float32[batch, 1, window, window], added to the attention scores.
        """
        streams = [self._rng(feature) for feature in features]
        untouched = [rng.random() < self.untouched_share for rng in streams]
        if self.whole_batches:
            untouched = [untouched[0]] * len(features)
        rows, echoes = zip(*map(self._row, features, streams, untouched, range(len(features))), strict=True)
        batch = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}
        if any(echo is not None for echo in echoes):
            size = batch["input_ids"].shape[1]
            masks = [np.triu(np.full((size, size), -np.inf), 1) if echo is None else echo for echo in echoes]
            mask = torch.from_numpy(np.stack(masks).astype(np.float32)[:, None])
        else:
            mask = torch.ones_like(batch["input_ids"])
        return {**batch, "attention_mask": mask}

    def _row(
        self, feature: dict[str, Any], rng: np.random.Generator, untouched: bool, number: int
    ) -> tuple[dict[str, NDArray[Any]], NDArray[np.float32] | None]:
        """Ids, positions and labels of one window, and its mask if it echoes."""
        text = tokens_of(feature, number)
        tokens, answers = text.ids, text.scored
        if "answers" in feature:
            answers = np.asarray(feature["answers"], dtype=bool)
        sampler = self._untouched if untouched else self.sampler
        if "scored" in feature:
            # Such a document is one window long, and cutting pieces out would cut out what is asked for.
            sampler = sampler.contiguous()
        lengths = self.lengths
        needed = sampler.tokens_needed(lengths)
        if len(tokens) < needed:
            raise UserError(
                f"{sampler.name} needs documents of at least {needed:,} tokens, but feature {number} of a batch has "
                f"{len(tokens):,}. Filter them out, or lower the train length.",
                code="documents_too_short",
            )
        used = max(needed, sampler.tokens_used(lengths))
        begin = start_in(len(tokens), used, answers, rng)
        piece = slice(begin, begin + used)
        tokens, answers = tokens[piece], None if answers is None else answers[piece]
        if answers is not None:  # skips between turns, where the sampler looks for sentences
            boundaries = np.flatnonzero(answers[:-1] & ~answers[1:]) + 1
        else:
            boundaries = np.empty(0, np.int64) if self.sentences is None else self.sentences.boundaries(tokens)
        window = sampler.sample(Document(len(tokens), boundaries), lengths, rng)
        ids = tokens[window.token_index]
        everything = np.ones(len(tokens), dtype=bool) if answers is None else answers
        scored = np.asarray(feature["scored"])[piece] if "scored" in feature else everything
        labels = np.where(scored[window.token_index], ids, -100)
        missing = window.position_ids - np.arange(len(ids))
        echo = echo_mask(missing, rng) if missing.any() and rng.random() < self.echo_share else None
        row = {"input_ids": ids, "position_ids": window.position_ids, "labels": labels}
        if self.mark_text:
            row["visit"] = np.array(feature.get("visit", (-1, -1, -1)))
            row["text_runs_on"] = window.token_index - window.token_index[0] == np.arange(len(ids))
        return row, echo

    @property
    def _untouched(self) -> PositionSampler:
        """Ordinary positions, in windows as long as all others of the batch."""
        return Plain() if self.sampler.has_skips else self.sampler

    def _rng(self, feature: dict[str, Any]) -> np.random.Generator:
        if "visit" in feature:
            epoch, index, source = feature["visit"]
            return example_rng(self.seed, epoch, index, source)
        # Trainers seed all processes alike, and a worker of a DataLoader does not know the rank of its process.
        process = max(rank(), vars(self).get("_rank", 0))
        return np.random.default_rng((int(torch.randint(2**62, ()).item()), process))

    def __getstate__(self) -> dict[str, Any]:
        """What a worker of a `DataLoader` gets: also the rank of the process that starts it."""
        return {**vars(self), "_rank": rank()}
