"""Echo: tokens that weigh in attention as if the skipped text repeated them."""

import numpy as np
from numpy.typing import NDArray

# Keys echo in whole blocks. The nearest tokens before a query never do: of them it lacks none.
BLOCK = 16
NEAR = 24


def echo_mask(missing: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float32]:
    """A causal attention mask under which a short window weighs as much as a long text.

    A skip gives a token the position it has in a long text, but not the thousands of tokens it would have to
    choose among there: a softmax that picks one of 250 keys may lose it among 4,000. So, in a random half of
    the window's blocks, keys count (1 + m / e)^u times, where m is the number of tokens that are missing before
    the query, e the number of keys that echo, and u^2 ~ U[0, 1). At the end of the window and for u = 1 the keys
    together have the attention mass of the text that was left out. What is asked for often stands in the other
    half, and has to be found all the same. The first token does not echo: a text begins only once, and much
    attention rests there.

    Args:
        missing: int64[n], how many tokens each token lacks before it: `position_ids - arange(n)` in a
            window with skips.
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
    log_count = np.sqrt(rng.random()) * np.log1p(missing / max(1, echoing.sum()))
    mask = np.zeros((n, n), dtype=np.float32)
    for query in range(n):  # row by row: whole matrices of distances would need several times the memory
        mask[query, query + 1 :] = -np.inf
        far = slice(0, max(0, query - NEAR))
        mask[query, far][echoing[far]] = log_count[query]
    return mask
