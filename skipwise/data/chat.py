"""Conversations as documents: written with the tokenizer's chat template, with the loss on what the assistant says.

What is an answer is seen from the tokens: it stands between what the template writes in front of an answer and what it
writes behind one. So a conversation needs no more room than its tokens, and windows may begin and end anywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from skipwise.data.sources import MessagesError
from skipwise.errors import UserError

Message = dict[str, Any]
# Words that no template has.
_ASKED, _ANSWERED = "zebra", "quokka"


@dataclass(frozen=True)
class Turns:
    """How a template marks answers.

    Attributes:
        before: token ids in front of an answer, behind the text of the one before.
        end: token id that ends an answer; there is a loss on it.
    """

    before: tuple[int, ...]
    end: int

    def answers(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool[n]: tokens that the assistant says, its end-of-turn tokens included.

        An answer whose beginning was cut off is none.
        """
        marked = np.zeros(len(tokens), dtype=bool)
        ends = np.flatnonzero(tokens == self.end)
        for start in self._starts(tokens):
            place = int(np.searchsorted(ends, start))
            marked[start : ends[place] + 1 if place < len(ends) else len(tokens)] = True
        return marked

    def boundaries(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64[k]: indices of tokens behind the end of an answer, where the next turn begins."""
        answered = self.answers(tokens)
        ends = np.flatnonzero(answered & (tokens == self.end)) + 1
        return ends[ends < len(tokens)]

    def _starts(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64[k]: indices of the first tokens of answers."""
        size = len(self.before)
        if len(tokens) < size:
            return np.empty(0, np.int64)
        windows = np.lib.stride_tricks.sliding_window_view(tokens, size)
        return np.flatnonzero((windows == np.array(self.before)).all(axis=1)) + size


def as_text(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation in the form of the template, without the token that begins every text.

    Raises:
        UserError: when the tokenizer has no template.
        MessagesError: when it does not take these messages.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "Conversations are written with the tokenizer's chat template, but it has none. Train on text "
            "(data.text_field), or choose an instruct model."
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False)
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise MessagesError(f"the chat template does not take it ({error})") from error
    assert isinstance(text, str)
    return text.removeprefix(tokenizer.bos_token or "")


def turns_of(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """How the template of a tokenizer marks answers, found by writing a conversation with it.

    Raises:
        UserError: when answers cannot be told from the tokens.
    """
    messages = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWERED}]
    text = as_text(messages + messages, tokenizer)
    parts = text.split(_ANSWERED)
    if len(parts) != 3 or text.count(_ASKED) != 2:
        raise UserError("The chat template changes what is said, so answers cannot be told from it. Train on text.")
    behind_question = parts[0].split(_ASKED)[1]
    before = tokenizer(behind_question, add_special_tokens=False)["input_ids"]
    behind = tokenizer(parts[2], add_special_tokens=False)["input_ids"]
    if not before or not behind:
        raise UserError(
            "The chat template writes nothing in front of an answer, or nothing behind, so answers cannot be told from "
            "it. Train on text."
        )
    turns = Turns(tuple(before), behind[0])
    tokens = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    said = str(tokenizer.decode(tokens[turns.answers(tokens)], skip_special_tokens=True))
    if "".join(said.split()) != _ANSWERED * 2:
        raise UserError(
            "Answers must be told from the tokens around them, but with this chat template and tokenizer "
            f"{said!r} is what was said where it was {_ANSWERED!r}, twice. Train on text."
        )
    return turns
