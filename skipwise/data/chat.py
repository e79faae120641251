"""Conversations as documents: written with the tokenizer's chat template, with the loss on what the assistant says."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from skipwise.data.sources import Conversation, MessagesError
from skipwise.errors import UserError

# Some templates write the day into every conversation, and a store must not depend on when it was made.
DATE = "01 Jan 2025"


def begin_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens this tokenizer puts in front of every text; often none."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first and first[0] == tokenizer.bos_token_id else []


def conversation(messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Conversation:
    """A conversation in the form of the template, and where in it the assistant speaks.

    The token that begins every text is left out where the tokenizer puts it there itself: windows get it later.

    Raises:
        UserError: when the tokenizer has no template, or cannot say where its tokens stand in a text.
        MessagesError: when the template does not take these messages, or writes something else than is said.
    """
    if tokenizer.chat_template is None or getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(
            "Conversations are written with the chat template of a fast tokenizer, but this one has none. Train on "
            "text (data.text_field), or choose an instruct model.",
            code="no_chat_template",
        )
    try:
        text = str(tokenizer.apply_chat_template(list(messages), tokenize=False, date_string=DATE))
    except (TemplateError, TypeError, KeyError, ValueError, IndexError) as error:
        raise MessagesError(f"the chat template does not take it ({error})", code="chat_template_failed") from error
    if begin_of_text(tokenizer):
        text = text.removeprefix(str(tokenizer.bos_token))
    answers, place = [], 0
    for message in messages:
        said = message["content"].strip()
        begin = text.find(said, place)
        if begin < 0 and message["role"] == "assistant":
            raise MessagesError(
                "the chat template writes something else than the assistant says", code="chat_template_changes_answer"
            )
        if begin < 0:  # a template may leave out or change what others say
            continue
        place = begin + len(said)
        if message["role"] == "assistant" and said:
            answers.append((begin, place))
    return Conversation(text, tuple(answers))


def scored_tokens(
    offsets: Sequence[tuple[int, int]], ids: Sequence[int], answers: Sequence[tuple[int, int]], special: frozenset[int]
) -> list[bool]:
    """Which tokens the assistant says: those of its text, and the special token that ends its turn.

    Args:
        offsets: (begin, end) of each token in the text.
        ids: of the tokens.
        answers: (begin, end) of what it says, in order.
        special: ids of special tokens.

    >>> scored_tokens([(0, 4), (4, 8), (8, 10), (10, 14)], [5, 6, 7, 1], [(4, 8)], frozenset({1}))
    [False, True, False, True]
    """
    scored = [False] * len(ids)
    token = 0
    for begin, end in answers:
        while token < len(ids) and offsets[token][1] <= begin:
            token += 1
        while token < len(ids) and offsets[token][0] < end:
            scored[token] = True
            token += 1
        ending = token
        while ending < len(ids) and ending < token + 2 and ids[ending] not in special:
            ending += 1  # some templates write white space before it
        if ending < len(ids) and ids[ending] in special:
            scored[ending] = True
    return scored
