"""Where sentences begin, seen from tokens."""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

Marks = NDArray[np.bool_]
# A full stop and the like, with what may close behind it.
_END = re.compile(r"""[.!?]["')\]]*$""")


@dataclass(frozen=True)
class Sentences:
    """What the tokens of a vocabulary say about sentences, each a bool[vocabulary].

    Attributes:
        ends: the token ends as a sentence does.
        spaced: the token begins with a space or tab.
        breaks: the token ends with a line break.
    """

    ends: Marks
    spaced: Marks
    breaks: Marks

    def boundaries(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64[k]: indices of tokens that begin a sentence: after a line break, or after an end and white space.

        A point within a word (`json.dumps`, `3.5`) is none, one of an abbreviation is taken for one.
        """
        before, after = tokens[:-1], tokens[1:]
        return np.flatnonzero(self.breaks[before] | (self.ends[before] & self.spaced[after])) + 1


def sentences_of(tokenizer: PreTrainedTokenizerBase) -> Sentences:
    """The marks of a tokenizer's vocabulary, from the text of each token behind another one."""
    size = max(tokenizer.get_vocab().values()) + 1
    # Some decoders drop white space at the beginning of a text.
    first = tokenizer("a", add_special_tokens=False)["input_ids"]
    begin = len(tokenizer.decode(first))
    texts = [text[begin:] for text in tokenizer.batch_decode([[*first, token] for token in range(size)])]
    return Sentences(
        ends=np.array([bool(_END.search(text)) for text in texts]),
        spaced=np.array([text[:1] in (" ", "\t") for text in texts]),
        breaks=np.array([text.endswith("\n") for text in texts]),
    )
