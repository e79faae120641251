"""LongRecipe: skips where sentences begin (arXiv 2409.00509)."""

from typing import Literal

import numpy as np

from skipwise.lengths import Lengths
from skipwise.positions.pose import sorted_uniform
from skipwise.positions.window import Document, Window
from skipwise.sections import section


@section
class LongRecipe:
    """Every sentence of the window is a chunk with a skip of its own, so that no sentence is torn apart.

    The skips are independent and uniform, in order. A window without a boundary has none. Sentences end with a line
    break, or with `.`, `!` or `?` and white space behind it (`data/sentences.py`). The paper also chooses which texts
    to train on, which is left to the data here.
    """

    name: Literal["longrecipe"] = "longrecipe"

    def check(self, lengths: Lengths) -> None:
        """Any lengths will do."""

    def tokens_needed(self, lengths: Lengths) -> int:
        """Lw: the text runs on."""
        return lengths.train

    def tokens_used(self, lengths: Lengths) -> int:
        """Lw."""
        return lengths.train

    def sample(self, document: Document, lengths: Lengths, rng: np.random.Generator, progress: float) -> Window:
        """Draw a skip for each sentence."""
        boundaries = np.asarray(document.boundaries, dtype=np.int64)
        boundaries = boundaries[(boundaries > 0) & (boundaries < lengths.train)]
        skips = sorted_uniform(len(boundaries) + 1, lengths.target - lengths.train, rng)
        ids = np.arange(lengths.train, dtype=np.int64)
        sizes = np.diff(boundaries, prepend=0, append=lengths.train)
        return Window(token_index=ids, position_ids=ids + skips.repeat(sizes))
