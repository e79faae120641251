"""LongRecipe: skips where sentences begin (arXiv 2409.00509)."""

from typing import ClassVar, Literal

import numpy as np

from skipwise.lengths import Lengths
from skipwise.positions.pose import sorted_uniform
from skipwise.positions.window import Distances, Document, Window
from skipwise.utils.sections import section


@section
class LongRecipe:
    """Every sentence of the window is a chunk with a skip of its own, so that no sentence is torn apart.

    As in the authors' code: the S sentences are put into distinct ones of Lt - Lw + S places, the first at the
    beginning, which makes all ordered lists of skips equally likely. Then the first U{1, ..., (Lw + 1) / 2} tokens of
    the window get ordinary positions, whatever their sentences. A window without a boundary has no skip.

    Sentences end with a line break, or with `.`, `!` or `?` and white space behind it (`data/sentences.py`); the
    authors split at five tokens of Llama 3. They also drop sentences without digits at random, and choose tokens by a
    model's change of mind about them; which text to train on is left to the data here.

    With `start: sentence` it is a variant of ours: no ordinary beginning, and skips that are independent and uniform,
    in order.

    Attributes:
        start: `contiguous` for the authors' form, `sentence` for ours.
    """

    has_skips: ClassVar[bool] = True
    needs_sentences: ClassVar[bool] = True
    name: Literal["longrecipe"] = "longrecipe"
    start: Literal["contiguous", "sentence"] = "contiguous"

    def check(self, lengths: Lengths) -> None:
        """Any lengths will do."""

    def window_length(self, lengths: Lengths) -> int:
        """Lw."""
        return lengths.train

    def tokens_needed(self, lengths: Lengths) -> int:
        """Lw: the text runs on."""
        return lengths.train

    def tokens_used(self, lengths: Lengths) -> int:
        """Lw."""
        return lengths.train

    def sample(self, document: Document, lengths: Lengths, rng: np.random.Generator) -> Window:
        """Draw a skip for each sentence."""
        boundaries = np.asarray(document.boundaries, dtype=np.int64)
        boundaries = boundaries[(boundaries > 0) & (boundaries < lengths.train)]
        count, most = len(boundaries) + 1, lengths.target - lengths.train
        ids = np.arange(lengths.train, dtype=np.int64)
        sizes = np.diff(boundaries, prepend=0, append=lengths.train)
        if self.start == "sentence":
            return Window(token_index=ids, position_ids=ids + sorted_uniform(count, most, rng).repeat(sizes))
        places = np.sort(rng.choice(most + count, size=count, replace=False)) - np.arange(count)
        places[0] = 0
        positions = ids + places.repeat(sizes)
        first = int(rng.integers(1, (lengths.train + 1) // 2, endpoint=True))
        positions[:first] = ids[:first]
        return Window(token_index=ids, position_ids=positions)

    def contiguous(self) -> "LongRecipe":
        """Itself: the text runs on."""
        return self

    def distances(self, lengths: Lengths) -> Distances:
        """None: the distribution has no simple form."""
        return Distances()
