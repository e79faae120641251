"""Conversations as documents: written with the tokenizer's chat template, with the loss on what the assistant says."""

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from skipwise.data.sources import Conversation, MessagesError
from skipwise.errors import UserError

# Some templates write the day into every conversation, and a store must not depend on when it was made.
DATE = "01 Jan 2025"
# As transformers looks for it: a template that says itself what the assistant generates.
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def begin_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens this tokenizer puts in front of every text; often none."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first and first[0] == tokenizer.bos_token_id else []


def conversation(messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Conversation:
    """A conversation in the form of the template, and where in it the assistant speaks.

    The template itself says where: by its `{% generation %}` blocks if it has any; else by what it writes for the
    conversation up to an answer and through it; and where it writes an earlier turn otherwise than the last one, by
    where another answer would stand. A span begins after the generation prompt and ends with the token that ends the
    turn.

    The token that begins every text is left out where the tokenizer puts it there itself: windows get it later.

    Raises:
        UserError: when the tokenizer has no template, or cannot say where its tokens stand in a text.
        MessagesError: when the template does not take these messages, or an answer is not in what it writes.
    """
    if tokenizer.chat_template is None or getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(
            "Conversations are written with the chat template of a fast tokenizer, but this one has none. Train on "
            "text (data.text_field), or choose an instruct model.",
            code="no_chat_template",
        )
    try:
        written = _marked_by_template(messages, tokenizer) or _Rendering(messages, tokenizer).conversation()
    except MessagesError:
        raise
    except Exception as error:  # a template is a program, and says in its own way what it does not take
        raise MessagesError(f"the chat template does not take it ({error})", code="chat_template_failed") from error
    if not written.answers:
        raise MessagesError("the chat template writes no answer of the assistant", code="chat_template_drops_answer")
    begin = str(tokenizer.bos_token)
    if not begin_of_text(tokenizer) or not written.text.startswith(begin):
        return written
    size = len(begin)
    return Conversation(written.text[size:], tuple((start - size, stop - size) for start, stop in written.answers))


def _marked_by_template(messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Conversation | None:
    """By the blocks of a template that marks what the assistant generates; None of others."""
    template = tokenizer.get_chat_template()
    if not GENERATION.search(template):
        return None
    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    variables: dict[str, Any] = {**tokenizer.special_tokens_map, "date_string": DATE}
    rendered: Any = render_jinja_template(
        conversations=[given], chat_template=template, return_assistant_tokens_mask=True, **variables
    )
    (text,), (spans,) = rendered
    return Conversation(text, tuple((start, stop) for start, stop in spans if start < stop))


class _Rendering:
    """What a template writes for a conversation, compared with what it writes for parts and variants of it."""

    def __init__(self, messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
        self.messages, self.tokenizer = list(messages), tokenizer
        self.text = self._render(self.messages)
        self.prompted = self._part(len(self.messages), prompt=True) != self.text
        # Characters that stand in no conversation, and that no template looks for.
        self.stand_in = next(mark for mark in map(chr, range(0xE000, 0xF8FF)) if mark not in self.text)
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        if tokenizer.bos_token != tokenizer.eos_token:
            added.discard(str(tokenizer.bos_token))
        self.ends = tuple(sorted(added, key=len, reverse=True))

    def conversation(self) -> Conversation:
        """The text, and the span of every answer that says something."""
        said = [
            number
            for number, message in enumerate(self.messages)
            if message["role"] == "assistant" and (message["content"].strip() or message.get("tool_calls"))
        ]
        return Conversation(self.text, tuple(self._span(number) for number in said))

    def _span(self, number: int) -> tuple[int, int]:
        """Of one answer, with the end of its turn."""
        # A template without a generation prompt writes the same before an answer and before anybody else's turn.
        before = self._part(number, prompt=True) if self.prompted else None
        begin = len(before) if before is not None and self.text.startswith(before) else None
        through = self.text if number + 1 == len(self.messages) else self._part(number + 1)
        if begin is not None and through is not None and self.text.startswith(through) and len(through) > begin:
            stop = begin + len(self.text[begin : len(through)].rstrip())
        else:
            start, stop = self._place(number)
            begin = start if begin is None else begin
        return begin, stop if self.messages[number].get("tool_calls") else self._end(stop)

    def _place(self, number: int) -> tuple[int, int]:
        """Where the content of a message stands: where the text is another one with another content."""
        changed = [*self.messages]
        changed[number] = {**changed[number], "content": self.stand_in}
        other = self._render(changed)
        before, _, after = other.partition(self.stand_in)
        if other.count(self.stand_in) != 1:
            raise MessagesError(
                f"the chat template writes message {number + 1}, an answer, {other.count(self.stand_in)} times",
                code="chat_template_drops_answer",
            )
        if not (self.text.startswith(before) and self.text.endswith(after) and len(before + after) <= len(self.text)):
            raise MessagesError(
                f"what the chat template writes around message {number + 1}, an answer, depends on its content, so "
                "that its place in the text is not known",
                code="chat_template_changes_answer",
            )
        return len(before), len(self.text) - len(after)

    def _end(self, stop: int) -> int:
        """The end of the token that ends a turn, if one follows; some templates write white space before it."""
        if self.text.endswith(self.ends, 0, stop):
            return stop
        rest = stop + len(self.text[stop:]) - len(self.text[stop:].lstrip())
        found = next((end for end in self.ends if self.text.startswith(end, rest)), "")
        return rest + len(found) if found else stop

    def _render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, date_string=DATE)
        )

    def _part(self, count: int, prompt: bool = False) -> str | None:
        """The first messages; None where the template does not take them alone."""
        try:
            return self._render(self.messages[:count], prompt)
        except Exception:  # as above
            return None


def scored_tokens(offsets: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens the assistant says: those that share a character with an answer.

    Args:
        offsets: (begin, end) of each token in the text.
        answers: (begin, end) of what it says, in order.

    >>> scored_tokens([(0, 4), (4, 8), (8, 10), (10, 14)], [(4, 8), (11, 12)])
    [False, True, False, True]
    """
    scored = [False] * len(offsets)
    token = 0
    for begin, end in answers:
        while token < len(offsets) and offsets[token][1] <= begin:
            token += 1
        while token < len(offsets) and offsets[token][0] < end:
            scored[token] = True
            token += 1
    return scored
