"""Attention under a mask: blocks of products beside PyTorch's kernel, forward and backward, in bfloat16.

    python benchmarks/masked_attention.py

The mask is the one of a window with echoes. Writes benchmarks/results/masked-attention.json. Run it with nothing beside
it, on a CPU that multiplies bfloat16; both sides of a ratio are measured in one process.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention

from skipwise.models.attention import attend
from skipwise.positions import echo_mask
from skipwise.runs.environment import describe_environment
from skipwise.utils.files import write_json

# Batch, heads, key heads, tokens, dimensions of a head: the embedded model's step, and SmolLM2-135M's.
SHAPES = ((16, 4, 4, 256, 64), (4, 9, 3, 1024, 64), (1, 9, 3, 2048, 64), (2, 9, 3, 4096, 64))
REPEATS = 7


def seconds(run: Callable[[], torch.Tensor], inputs: list[torch.Tensor], grad: torch.Tensor) -> float:
    """Median of a forward and a backward pass."""
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        torch.autograd.grad(run(), inputs, grad)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def measure(batch: int, heads: int, key_heads: int, tokens: int, dimensions: int) -> dict[str, Any]:
    """Both ways, on one shape."""
    rng = np.random.default_rng(0)
    missing = np.where(np.arange(tokens) >= tokens // 2, 2000, 0)
    mask = torch.from_numpy(np.stack([echo_mask(missing, rng) for _ in range(batch)])[:, None])
    inputs = [
        torch.randn(batch, count, tokens, dimensions, dtype=torch.bfloat16, requires_grad=True)
        for count in (heads, key_heads, key_heads)
    ]
    grad = torch.randn(batch, tokens, heads, dimensions, dtype=torch.bfloat16)
    low = mask.bfloat16()
    module = torch.nn.Module()
    blocks = seconds(lambda: attend(module, *inputs, mask)[0], inputs, grad)
    kernel = seconds(
        lambda: scaled_dot_product_attention(*inputs, attn_mask=low, enable_gqa=True).transpose(1, 2), inputs, grad
    )
    shape = dict(
        zip(
            ("batch", "heads", "key_heads", "tokens", "dimensions"),
            (batch, heads, key_heads, tokens, dimensions),
            strict=True,
        )
    )
    return {**shape, "blocks_ms": 1000 * blocks, "kernel_ms": 1000 * kernel, "ratio": kernel / blocks}


def main() -> None:
    """All shapes, into one file."""
    torch.manual_seed(0)
    rows = [measure(*shape) for shape in SHAPES]
    for row in rows:
        Console().print(row)
    path = Path(__file__).parent / "results" / "masked-attention.json"
    write_json(
        path, {"command": "python benchmarks/masked_attention.py", "rows": rows, "environment": describe_environment()}
    )


if __name__ == "__main__":
    main()
