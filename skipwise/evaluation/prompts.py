"""Prompts: through the chat template or not, and cut to fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from skipwise.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encode(Protocol):
    """Tokens of a prompt and of how the answer begins."""

    def __call__(self, prompt: str, answer: str = "") -> list[int]:
        """`answer` is what the model is made to have said already; it follows the prompt."""
        ...


def encoder(tokenizer: PreTrainedTokenizerBase, chat: bool) -> Encode:
    """How prompts become tokens: as plain text, or as the user's turn of a chat.

    Raises:
        UserError: when a chat is asked for and the tokenizer has no template for it.
    """
    if chat and not tokenizer.chat_template:
        raise UserError(
            "chat needs a tokenizer with a chat template, but this one has none. Leave chat out.",
            code="no_chat_template",
        )

    def encode(prompt: str, answer: str = "") -> list[int]:
        """See `Encode`."""
        if not chat:
            return _without_end(tokenizer, tokenizer(prompt + answer, verbose=False)["input_ids"])
        turn = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        # The template writes the special tokens itself; the answer begins a line of its own.
        ids: list[int] = tokenizer(f"{turn}{answer.lstrip()}", add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return encode


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens, as it is, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _without_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Some tokenizers end every text; a prompt goes on."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def largest_fitting(size: Callable[[int], int], limit: int) -> int:
    """The largest n >= 0 with `size(n) <= limit`, for a size that grows with n; 0 if even that does not fit.

    >>> largest_fitting(lambda n: 3 * n + 7, 100)
    31
    """
    high = 1
    while size(high) <= limit:
        high *= 2
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= limit else (low, middle)
    return low
