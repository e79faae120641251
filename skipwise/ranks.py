"""Which of several processes of one run this is: launchers (torchrun, deepspeed) say so in the environment."""

import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from skipwise.errors import UserError

if TYPE_CHECKING:
    import torch

# One process evaluates while the others wait, which may take hours.
PATIENCE = timedelta(days=30)


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this one, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the one that speaks and writes."""
    return rank() == 0


def join_processes(device: "torch.device") -> None:
    """Let the processes of a run find each other; from here on each has its own device.

    Raises:
        UserError: when the environment speaks of several, and not of where they meet.
    """
    from accelerate import PartialState

    if world_size() > 1:
        if "MASTER_ADDR" not in os.environ:
            raise UserError(
                f"WORLD_SIZE is {world_size()}, but MASTER_ADDR is not set. Start the command with torchrun "
                "--nproc_per_node N -m skipwise, or without WORLD_SIZE."
            )
        PartialState(cpu=device.type == "cpu", timeout=PATIENCE)


def joined() -> bool:
    """Whether the processes have found each other."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def wait_for_all() -> None:
    """Go on when every process is here."""
    if world_size() > 1:
        import torch

        torch.distributed.barrier()


def from_first(value: Any) -> Any:
    """What the first process has, for all."""
    if world_size() == 1:
        return value
    import torch

    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def any_of(value: bool, device: "torch.device") -> bool:
    """Whether it is so for at least one process."""
    if world_size() == 1:
        return value
    import torch

    flag = torch.tensor(int(value), device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def leave_processes() -> None:
    """End the connection; without it a process may abort when it exits."""
    if world_size() > 1 and joined():
        import torch

        torch.distributed.destroy_process_group()
