"""Echo: tokens before a skip that weigh in attention as if the text left out repeated them."""

import numpy as np
from numpy.typing import NDArray

# Keys echo in whole blocks.
BLOCK = 16


def echo_mask(missing: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float32]:
    """A causal attention mask under which a window with skips weighs as much as the text it stands for.

    A skip gives a token the position it has in a long text, but not the thousands of far tokens among which it
    would have to choose there: a softmax that picks one of 250 keys may lose it among 4,000, and a head that
    averages over what is near has never had to leave out what is far. So, in a random half of the window's
    blocks, keys across a skip of m tokens count (1 + m / e)^u times, where e is the number of echoing keys across
    a skip, and u^2 ~ U[0, 1). For u = 1 and two chunks they have the attention mass of the text left out. What is
    asked for often stands in the other half, and has to be found all the same. Keys without a skip between them
    and the query count once, as they do in a long text. So does the first token: a text begins only once, and much
    attention rests there.

    Args:
        missing: int64[n], how many tokens each token lacks before it: `position_ids - arange(n)`.
        rng: the only source of randomness.

    Returns:
        float32[n, n] to add to the attention scores, query by key: -inf above the diagonal, 0 or the
        logarithm of the count on and below it.

    >>> echo_mask(np.array([0, 0]), np.random.default_rng(0)).tolist()
    [[0.0, -inf], [0.0, 0.0]]
    """
    n = len(missing)
    echoing = np.repeat(rng.random(-(-n // BLOCK)) < 0.5, BLOCK)[:n]
    echoing[0] = False
    u = np.sqrt(rng.random())
    mask = np.triu(np.full((n, n), -np.inf, dtype=np.float32), 1)
    # Of chunks, whose tokens all have the same keys across a skip.
    starts = np.flatnonzero(np.diff(missing, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        across = np.flatnonzero(echoing[:start])
        mask[start:stop, across] = u * np.log1p((missing[start] - missing[across]) / max(1, len(across)))
    return mask
