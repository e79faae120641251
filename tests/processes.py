"""Commands in processes of their own, forked from one that has imported everything.

An interpreter that imports torch and transformers takes seconds; a fork takes none. A process started here is a real
one: it has its own group, can be killed, and is killed when the test ends.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
CLONE_NEWNET = 0x40000000  # from Linux's sched.h
# A test that waits for longer has found a process that hangs.
PATIENCE = 300.0
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.preload"])


def command(arguments: list[str]) -> None:
    """`skipwise ARGUMENTS`, to the end of the process."""
    from skipwise.cli import main as cli

    sys.argv = ["skipwise", *arguments]
    cli.main()


@dataclass
class Started:
    """A process that runs.

    Attributes:
        output: the file with all that it prints.
    """

    process: ForkServerProcess
    output: Path

    @property
    def printed(self) -> str:
        """All it has printed so far."""
        return self.output.read_text(encoding="utf-8") if self.output.exists() else ""

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.is_alive()

    def wait(self) -> int:
        """Its exit code: negative for the signal that ended it."""
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.kill()
            raise AssertionError(f"the process hangs:\n{self.printed[-4000:]}")
        assert self.process.exitcode is not None
        return self.process.exitcode

    def signal(self, number: int) -> None:
        """Send a signal to the process alone."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for what the process does; fail where it ends before that, or hangs."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.running, f"the process has ended:\n{self.printed[-4000:]}"
            assert time.monotonic() < deadline, f"the process hangs:\n{self.printed[-4000:]}"
            time.sleep(0.02)

    def kill(self) -> None:
        """Kill it with all that it has started, in groups of their own as well."""
        assert self.process.pid is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it may not have its group yet
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


@contextmanager
def started(
    run: Callable[[list[str]], None], arguments: list[str], output: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Started]:
    """A process that runs a function of a module; it is killed at the end of the block.

    Args:
        run: gets the arguments.
        output: a file for what it prints; what is there stays.
        environment: variables besides those of this process.
    """
    variables = {**os.environ, **(environment or {})}
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)  # so that the fork server, if it starts now, finds the tests
    process = _forks.Process(target=_begin, args=(run, arguments, str(output), variables, str(Path.cwd())))
    try:
        process.start()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    one = Started(process, output)
    try:
        yield one
    finally:
        one.kill()


def _begin(
    run: Callable[[list[str]], None], arguments: list[str], output: str, variables: dict[str, str], directory: str
) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(directory)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from skipwise.cli import terminal
    from skipwise.utils.distributed import is_first

    terminal.console.quiet = not is_first()  # as it is when this module is imported
    run(arguments)


@contextmanager
def ranks(count: int, run: Callable[[list[str]], None], arguments: list[str], output: Path) -> Iterator[list[Started]]:
    """Processes of one training, with the variables that torchrun sets.

    Args:
        count: of processes.
        run: gets the arguments.
        output: what rank 0 prints; the others add `.1` and so on to its name.
    """
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    meeting["LOCAL_WORLD_SIZE"] = str(count)
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                started(
                    run,
                    arguments,
                    output if rank == 0 else output.with_name(f"{output.name}.{rank}"),
                    {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {},
                )
            )
            for rank in range(count)
        ]


class Fork:
    """A forked command with the methods of `subprocess.Popen` that a study uses."""

    def __init__(self, arguments: list[str], output: Path) -> None:
        self.started = started(command, arguments, output)
        self.one = self.started.__enter__()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return None if self.one.running else self.wait()

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        if self.returncode is None:
            self.returncode = self.one.wait()
            self.started.__exit__(None, None, None)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """As `os.kill`."""
        self.one.signal(number)


def in_namespace(arguments: list[str]) -> None:
    """`command` in the network of another host; the first argument is the name of its namespace."""
    name, *others = arguments
    with Path("/run/netns", name).open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {name}")
    command(others)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
