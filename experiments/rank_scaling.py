"""One process and two, with every engine: windows, losses and weights; evidence for docs/results/reliability.md.

    python -m experiments.rank_scaling docs/results/scaling.json

A picomodel is trained for a few steps on a CPU (gloo), as in tests/training/test_ranks.py.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from skipwise.runs.environment import describe_environment
from skipwise.utils.files import write_json
from tests.ranks import losses, report, windows_of_steps, work

ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3", "zero3-offload")


def beside(two: Path, alone: Path) -> dict[str, Any]:
    """What two processes did, beside one."""
    curves = losses(two), losses(alone)
    weights = [torch.load(one / "weights.pt", weights_only=True) for one in (two, alone)]
    return {
        "engine": report(two, 0)["said"][-1].removeprefix("training on cpu: "),
        "same_windows_in_every_step": windows_of_steps(two, 2) == windows_of_steps(alone, 1),
        "losses": curves[0],
        "largest_difference_of_losses": max(abs(ours - one) / one for ours, one in zip(*curves, strict=True)),
        "largest_difference_of_weights": max(
            float((weights[0][name] - weight).abs().max()) for name, weight in weights[1].items()
        ),
    }


def main() -> None:
    """All engines, into one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        alone = work(place / "alone", 1)
        found: dict[str, Any] = {"one process": {"losses": losses(alone)}}
        for engine in ENGINES:
            found[engine] = beside(work(place / engine, 2, "--engine", engine), alone)
            print(engine, found[engine], flush=True)
    command = " ".join(["python -m experiments.rank_scaling", *sys.argv[1:]])
    write_json(output, {**found, "command": command, "environment": describe_environment()})


if __name__ == "__main__":
    main()
