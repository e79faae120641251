"""What a run ran on."""

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

_PACKAGES = ("skipwise", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "safetensors")


def describe_environment() -> dict[str, Any]:
    """Versions, hardware and command; no host name, no user, no paths."""
    import torch

    from skipwise.models.load import native_bfloat16

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return {
        "command": shlex.join(_argument(argument) for argument in sys.argv),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": None if accelerator is None else str(accelerator),
        "native_bfloat16": native_bfloat16(),
    }


def without_directories(value: str) -> str:
    """Of an absolute path the last part: the others tell nothing to anyone else, or too much.

    >>> without_directories("/home/some one/runs/one/"), without_directories("org/model")
    ('one', 'org/model')
    """
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(value).is_absolute():
            return kind(value).name
    return value


def _argument(text: str) -> str:
    """An argument, or an assignment, that may be of a path."""
    head, sign, value = text.partition("=")
    return without_directories(head) + sign + without_directories(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
