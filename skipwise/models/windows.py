"""The windows of a model: the one it was pretrained with and the one it has now, from all that its files say. No torch.

The same number means two things in published configs. With `linear` scaling, `max_position_embeddings` is the extended
window in most (transformers' convention) and the original one in others (FastChat's); with `llama3`, the factor of
Llama 3.2 is not the share of the two windows. So every command asks here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skipwise.errors import UserError
from skipwise.models.families import family_of

# The layers whose rotary table is extended, in models that have one for each kind of layer. Windowed layers meet no
# distance beyond their window, and keep theirs.
FULL, SLIDING = "full_attention", "sliding_attention"
ORIGINAL = "original_max_position_embeddings"
# Where configs of different families say the window, best first.
WINDOW_KEYS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "n_ctx")
# Where some say a larger one beside it.
OTHER_KEYS = ("model_max_length", "max_sequence_length", "max_seq_len", "seq_length")
# A tokenizer without a limit has a number like 1e30.
UNLIMITED = 10**9
# Lengths are whole numbers, and factors are often rounded.
ROUNDED = 0.01
# No published RoPE model was pretrained with a shorter window.
SHORTEST = 2048
# Types whose frequencies depend on the original window, which readers take for the window where it is not written.
BY_ORIGINAL = ("yarn", "longrope", "llama3")


@dataclass(frozen=True)
class Windows:
    """Both windows of a model, in tokens.

    Attributes:
        original: of pretraining.
        current: the one it has now; larger when it was extended before.
        warning: why two readings are possible, with both of them; None where the files say enough.
    """

    original: int
    current: int
    ambiguity: str | None = None

    def certain(self, path: str) -> "Windows":
        """These, unless there is a warning.

        Raises:
            UserError: with both readings.
        """
        if self.ambiguity is not None:
            raise UserError(f"{path}: {self.ambiguity}", code="window_ambiguous")
        return self


def full_table(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """The RoPE parameters of layers that see all of the text, where each kind of layer has its own."""
    nested = parameters.get(FULL)
    return nested if isinstance(nested, Mapping) else parameters


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The RoPE parameters of layers that see all of the text, from a config of any version; with `rope_type`.

    transformers lets `rope_scaling` win where both are there.
    """
    rope = dict(full_table(config.get("rope_scaling") or config.get("rope_parameters") or {}))
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    return {**rope, "rope_type": "longrope" if kind == "su" else kind}


def windows_of(
    config: Mapping[str, Any],
    given: Mapping[str, Any] | None = None,
    tokenizer_limit: int | None = None,
    original: int | None = None,
) -> Windows:
    """Both windows of a model.

    Args:
        config: of the language model, as its class completes it; or as written, where there is no such class.
        given: the same as written in `config.json`, without defaults; by default `config`.
        tokenizer_limit: `model_max_length` of its tokenizer, in tokens.
        original: the original window as the user says it, which goes before what the files say.

    Raises:
        UserError: when the config says no window.
    """
    given = config if given is None else given
    claimed = next((int(config[key]) for key in WINDOW_KEYS if config.get(key)), None)
    if claimed is None:
        raise UserError(
            "The config.json says no window (max_position_embeddings). Choose another model.",
            code="model_window_missing",
        )
    others = [int(given[key]) for key in OTHER_KEYS if given.get(key) and int(given[key]) < UNLIMITED]
    rope = rope_of(config)
    written = rope_of(given) if given.get("rope_scaling") or given.get("rope_parameters") else rope
    factor = float(rope.get("factor") or 1.0)
    chunks = given.get("dual_chunk_attention_config") or {}
    first = original or given.get(ORIGINAL) or written.get(ORIGINAL) or chunks.get(ORIGINAL)
    if rope["rope_type"] not in ("linear", *BY_ORIGINAL):
        now = max(claimed, *others, 0)
        return Windows(int(first or now), now)
    known = family_of(str(config.get("model_type"))).pretrained
    if rope["rope_type"] == "linear" and known is not None and known <= claimed:
        return Windows(original or known, claimed)
    if first is not None or factor == 1.0:
        first = int(first or claimed)
        return Windows(first, _extended(rope["rope_type"], first, claimed, factor))
    kept = Windows(claimed, round(claimed * factor))
    raised = Windows(round(claimed / factor), claimed)
    limits = [*others, tokenizer_limit or 0]
    if any(math.isclose(limit, kept.current, rel_tol=ROUNDED) for limit in limits):
        return kept
    if any(math.isclose(limit, claimed, rel_tol=ROUNDED) for limit in others):
        return raised
    by_original = rope["rope_type"] in BY_ORIGINAL
    if not by_original and (raised.original >= SHORTEST or claimed < SHORTEST):
        return raised
    ambiguity = (
        f"its config has a {rope['rope_type']} factor of {factor:g} and a window of {claimed:,} tokens "
        f"(max_position_embeddings), and does not say which window came before. Either it was pretrained with "
        f"{claimed:,} and has {kept.current:,} now, or with {raised.original:,} and has {claimed:,} now. Say which: "
        f"--original {claimed} or --original {raised.original}."
    )
    # Programs compute the frequencies of the first reading; of linear scaling, those of both are the same.
    taken = kept if by_original else raised
    return Windows(taken.original, taken.current, ambiguity)


def _extended(rope_type: str, original: int, claimed: int, factor: float) -> int:
    """The window of a model that was extended before."""
    by_factor = round(original * factor)
    if rope_type in ("llama3", "longrope"):  # whose factor need not be the share of the windows
        return claimed if claimed > original else max(claimed, by_factor)
    # Some leave max_position_embeddings where it was before the extension.
    return max(claimed, by_factor)
