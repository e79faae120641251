"""Attention of a piece of text to a long cache: 1,024 keys at a time, all keys at once, and PyTorch's kernel.

    python benchmarks/long_attention.py

A layer of SmolLM2-135M (9 heads, 3 of keys, of 64 dimensions) in bfloat16: the last 512 tokens of 32k and of 128k. All
keys at once means few rows at once, so that no more scores exist than otherwise. Prints ratios to what Skipwise does,
and writes them, with the times, to benchmarks/results/long-attention.json.
"""

import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from skipwise.lengths import format_length
from skipwise.models import attention
from skipwise.runs.environment import describe_environment
from skipwise.utils.files import write_json

PIECE, HEADS, KEY_HEADS, DIMENSIONS = 512, 9, 3, 64
KEYS = (32768, 131072)
REPEATS = 3


def seconds(work: Callable[[], object]) -> float:
    """The best of some runs."""
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


@torch.no_grad()
def measure(keys: int) -> dict[str, float]:
    """Seconds of each way."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, n, DIMENSIONS) for heads, n in ((HEADS, PIECE), (KEY_HEADS, keys), (KEY_HEADS, keys))]
    query, key, value = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    mask = torch.ones(1, 1, PIECE, keys, dtype=torch.bool).tril(keys - PIECE)

    def ours(block_keys: int) -> float:
        with patch.object(attention, "BLOCK_KEYS", block_keys):
            return seconds(lambda: attention.causal_attention(query, key, value, DIMENSIONS**-0.5))

    return {
        "skipwise": ours(attention.BLOCK_KEYS),
        "all keys at once": ours(keys),
        "sdpa": seconds(lambda: scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)),
    }


def main() -> None:
    """Measure, print, write."""
    results = {keys: measure(keys) for keys in KEYS}
    ways = list(results[KEYS[0]])
    table = Table("keys", *(f"{way}, over skipwise" for way in ways[1:]))
    for keys, taken in results.items():
        table.add_row(format_length(keys), *(f"{taken[way] / taken['skipwise']:.2f}" for way in ways[1:]))
    Console().print(table)
    write_json(
        Path(__file__).parent / "results" / "long-attention.json",
        {"environment": describe_environment(), "seconds": results},
    )


if __name__ == "__main__":
    main()
