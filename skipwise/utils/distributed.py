"""Which of several processes of one run this is: torch says so, and before they have met their launcher."""

import atexit
import os
import sys
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from skipwise.errors import UserError

if TYPE_CHECKING:
    import torch

# One process evaluates while the others wait, which may take hours.
PATIENCE = timedelta(days=30)
# In training none waits long for another; one that is silent for longer is lost.
TIMEOUT = timedelta(minutes=30)
# How gloo and sockets say it.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Socket closed")
_waiting: Any = None


def world_size() -> int:
    """How many processes there are."""
    group = _group()
    return int(os.environ.get("WORLD_SIZE", "1")) if group is None else int(group.get_world_size())


def rank() -> int:
    """The number of this one, from 0."""
    group = _group()
    return int(os.environ.get("RANK", "0")) if group is None else int(group.get_rank())


def _group() -> Any:
    """`torch.distributed` where the processes have met, as by hand after `mp.spawn`; None before, or without torch."""
    group = getattr(sys.modules.get("torch"), "distributed", None)
    return group if group is not None and group.is_available() and group.is_initialized() else None


def is_first() -> bool:
    """Whether this is the one that speaks and writes."""
    return rank() == 0


def join_processes(device: "torch.device", deepspeed: bool = False) -> None:
    """Let the processes of a run find each other; from here on each has its own device.

    Args:
        device: the kind of device they compute on.
        deepspeed: through DeepSpeed, which wants to do that itself, also for one process.

    Raises:
        UserError: when the environment speaks of several, and not of where they meet; and for DeepSpeed without a
            launcher, or not installed.
    """
    from accelerate import PartialState

    if not deepspeed and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            "DeepSpeed gets its configuration from train.deepspeed, but there is none, only Accelerate's. Set "
            "train.deepspeed (see configs/engines), and launch with distributed_type MULTI_GPU, or with torchrun.",
            code="deepspeed_configuration_missing",
        )
    if deepspeed:
        _join_with_deepspeed(device)
    elif world_size() > 1:
        if "MASTER_ADDR" not in os.environ:
            raise UserError(
                f"WORLD_SIZE is {world_size()}, but MASTER_ADDR is not set. Start the command with torchrun "
                "--nproc_per_node N -m skipwise, or without WORLD_SIZE.",
                code="launcher_missing",
            )
        PartialState(cpu=device.type == "cpu", timeout=TIMEOUT)
    if world_size() > 1:
        import torch

        global _waiting
        _waiting = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def _join_with_deepspeed(device: "torch.device") -> None:
    try:
        from deepspeed.comm import init_distributed
    except ImportError as error:
        raise UserError(
            "train.deepspeed needs DeepSpeed. Install it with: pip install 'skipwise[deepspeed]'",
            code="package_not_installed",
        ) from error
    if "RANK" not in os.environ:
        raise UserError(
            "train.deepspeed needs a launcher. Start the command as torchrun --nproc_per_node N -m skipwise, or as "
            "deepspeed --num_gpus N --module skipwise.",
            code="launcher_missing",
        )
    backend = "gloo" if device.type == "cpu" else None  # its own for everything else
    init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=TIMEOUT, verbose=False)
    if device.type != "cpu":  # it would do so when it wraps a model, which is loaded before
        import torch

        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))


def joined() -> bool:
    """Whether the processes have found each other."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def wait_for_all() -> None:
    """Go on when every process is here, however long that takes."""
    if world_size() > 1:
        import torch

        torch.distributed.barrier(_waiting)


def from_first(value: Any) -> Any:
    """What the first process has, for all."""
    if world_size() == 1:
        return value
    import torch

    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, group=_waiting)
    return values[0]


def any_of(value: bool, device: "torch.device") -> bool:
    """Whether it is so for at least one process."""
    if world_size() == 1:
        return value
    import torch

    flag = torch.tensor(int(value), device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def lost_process(error: BaseException) -> bool:
    """Whether an error means that another process of this run is gone."""
    if not joined() or world_size() == 1:
        return False
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST)


def leave_processes(code: int) -> NoReturn:
    """End this process, and first its connection with others.

    Where there were others it skips the interpreter's own end, in which a thread of gloo may abort: the
    launcher would call a finished run failed. Threads that work are waited for, and exit functions run.
    """
    if world_size() > 1 and joined():
        import torch

        torch.distributed.destroy_process_group()
        try:
            for thread in threading.enumerate():
                if not thread.daemon and thread is not threading.current_thread():
                    thread.join()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # also where nobody reads the output any more
            os._exit(code)
    sys.exit(code)
