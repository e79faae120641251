"""Echo: tokens that weigh in attention as if the skipped text repeated them."""

import numpy as np
from numpy.typing import NDArray

# Tokens of one block echo together, and only for tokens further on than this: the near ones are all there.
BLOCK = 16
NEAR = 24


def echo_mask(missing: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float32]:
    """A causal attention mask under which a short window weighs as much as a long text.

    A skip gives a token the position it has in a long text, but not the thousands of tokens it would have to
    choose among there: a softmax that picks one of 250 keys may lose it among 4,000. So, in a random half of
    the window's blocks, keys at a distance count (1 + m / e)^u times, where m is the number of tokens that
    are missing before the query, e the number of keys that echo, and u^2 ~ U[0, 1): up to the attention mass of
    the text that was left out, and rather much of it than little. What is asked for often stands in the other
    half, and has to be found all the same.

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
    distance = np.subtract.outer(np.arange(n), np.arange(n))
    echoing = np.repeat(rng.random(-(-n // BLOCK)) < 0.5, BLOCK)[:n]
    count = np.sqrt(rng.random()) * np.log1p(missing / max(1, echoing.sum()))
    mask = np.where((distance > NEAR) & echoing, count[:, None], 0.0)
    return np.where(distance < 0, -np.inf, mask).astype(np.float32)
