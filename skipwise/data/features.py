"""What a feature of a training loop carries: its tokens without padding, and which of them have a loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipwise.errors import UserError

# What `labels` of transformers says of a token without a loss.
IGNORED = -100
# Masks of TRL: 1 where a token is of a completion, or of the assistant's.
LOSS_MASKS = ("completion_mask", "assistant_masks")
# Inputs beside the text, without which its placeholders mean nothing.
OTHER_INPUTS = ("pixel_values", "image_grid_thw", "input_features", "encoder_outputs")
# Marks of several texts in one feature, whose attention must not cross from one to another.
PACKED = ("seq_idx", "cu_seq_lens_q", "cu_seqlens", "seq_lengths")


@dataclass(frozen=True)
class Tokens:
    """The text of a feature.

    Attributes:
        ids: int64[n], without padding.
        scored: bool[n], which tokens have a loss; None for all of them.
    """

    ids: NDArray[np.int64]
    scored: NDArray[np.bool_] | None


def tokens_of(feature: Mapping[str, Any], number: int) -> Tokens:
    """The tokens of a feature that a window is drawn from, and which of them have a loss.

    Zeros of `attention_mask` at either end are padding and left out. A token has a loss where `labels` (if there are
    any) are not -100, and `completion_mask` and `assistant_masks` are 1.

    Args:
        feature: with `input_ids`, as in a Hugging Face `Trainer` or TRL.
        number: its place in the batch, for messages.

    Raises:
        UserError: for columns that contradict each other, for several texts in one feature, and for inputs that are no
            text.
    """
    ids = np.asarray(feature["input_ids"], dtype=np.int64)
    if ids.ndim != 1:
        raise _wrong(number, "feature_not_a_list", f"input_ids must be a list of token ids, not of shape {ids.shape}")
    for name in (*OTHER_INPUTS, *PACKED):
        if feature.get(name) is not None:
            what = "holds several packed texts" if name in PACKED else "is more than text"
            raise _wrong(number, "feature_not_one_text", f"a window is drawn from one text, but by {name} it {what}")
    columns = {
        name: _as_long(feature[name], ids, name, number)
        for name in ("attention_mask", "position_ids", "labels", *LOSS_MASKS)
        if feature.get(name) is not None
    }
    text = np.flatnonzero(columns.pop("attention_mask", np.ones(len(ids), dtype=np.int64)))
    if not len(text) or text[-1] - text[0] + 1 != len(text):
        what = "zeros of attention_mask are padding at its ends, but there are some between tokens or nothing else"
        raise _wrong(number, "mask_has_holes", what)
    ids = ids[text]
    columns = {name: values[text] for name, values in columns.items()}
    if (np.diff(columns.pop("position_ids", np.arange(len(ids)))) != 1).any():
        what = "a window is drawn from one text, but its position_ids are of several (packing) or skip already"
        raise _wrong(number, "feature_not_one_text", what)
    if "labels" in columns:
        labels = columns["labels"]
        columns["labels"] = (labels != IGNORED).astype(np.int64)
        if (labels != ids)[labels != IGNORED].any():
            raise _wrong(number, "labels_not_tokens", "labels must be its input_ids, or -100 where there is no loss")
    return Tokens(ids, np.all(list(columns.values()), axis=0) if columns else None)


def start_in(length: int, needed: int, scored: NDArray[np.bool_] | None, rng: np.random.Generator) -> int:
    """Where in a text to begin a window of `needed` tokens: anywhere, so that over many visits all of it is used.

    Where some tokens have no loss, only windows count that hold one that has; the first token of a window is not
    predicted.

    Args:
        length: tokens of the text, at least `needed`.
        scored: bool[length], or None for all.
    """
    if length <= needed:
        return 0
    starts = np.arange(length - needed + 1)
    if scored is not None and scored.any():
        before = np.concatenate([[0], np.cumsum(scored)])
        learning = starts[before[starts + needed] - before[starts + 1] > 0]
        starts = learning if len(learning) else starts
    return int(rng.choice(starts))


def _as_long(values: Any, ids: NDArray[np.int64], name: str, number: int) -> NDArray[np.int64]:
    found = np.asarray(values, dtype=np.int64)
    if found.shape != ids.shape:
        what = f"{name} must have a value for each of its {len(ids):,} tokens, but has {found.size:,}"
        raise _wrong(number, "lengths_differ", what)
    return found


def _wrong(number: int, code: str, what: str) -> UserError:
    return UserError(f"Feature {number} of a batch cannot be used: {what}.", code=code)
