"""How fast this machine multiplies matrices."""

import statistics
import time

import torch

from skipwise.models.load import compute_dtype, default_device

# Of a typical layer: tokens, inputs, outputs.
SHAPE = (2048, 1024, 4096)
REPEATS = 20


def matmul_rate(dtype: str, shape: tuple[int, int, int] = SHAPE) -> float:
    """FLOP/s of matmuls on the device that would train: what no training exceeds.

    Args:
        dtype: `auto`, `float32` or `bfloat16`, as `model.dtype`.
        shape: rows, inputs and outputs.
    """
    device = default_device()
    rows, inputs, outputs = shape
    left, right = (
        torch.randn(size, device=device).to(compute_dtype(dtype, device))
        for size in ((rows, inputs), (outputs, inputs))
    )
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        left @ right.T
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2.0 * rows * inputs * outputs / statistics.median(seconds)
