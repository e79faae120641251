"""Examples to train small models on."""

from __future__ import annotations

import numpy as np
import torch

from skipwise import Lengths
from skipwise.data.store import Documents
from skipwise.data.windows import Source, TrainingExamples, cut_spans

LENGTHS = Lengths(original=64, train=32, target=256)

CPU = torch.device("cpu")


def examples(count: int) -> TrainingExamples:
    rng = np.random.default_rng(0)
    documents = Documents(rng.integers(2, 258, size=2000), np.array([0]), np.array([2000]))
    return TrainingExamples([Source(documents, cut_spans(documents, 32, 32, False), 1.0)], count, seed=0)
