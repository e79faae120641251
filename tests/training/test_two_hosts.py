"""Two hosts with their own addresses, made of network namespaces; one of them dies in the middle."""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.processes import Started, in_namespace, started
from tests.ranks import extension

# Name, end of the cable, address. Names are of this process alone: others may run the same test.
HOSTS = (
    (f"skipwise-a-{os.getpid()}", f"ska{os.getpid()}", "10.77.0.1"),
    (f"skipwise-b-{os.getpid()}", f"skb{os.getpid()}", "10.77.0.2"),
)


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def hosts() -> Iterator[None]:
    """A cable between two namespaces."""
    if shutil.which("ip") is None:
        pytest.skip("the program ip (iproute2) is not installed")
    take_down()
    try:
        for name, _, _ in HOSTS:
            made = ip("netns", "add", name)
            if made.returncode:
                pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
        made = ip("link", "add", HOSTS[0][1], "type", "veth", "peer", "name", HOSTS[1][1])
        if made.returncode:
            pytest.skip(f"no cable (veth) can be made here: {made.stderr.strip()}")
        for name, cable, address in HOSTS:
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        take_down()


def take_down() -> None:
    for name, _, _ in HOSTS:
        kill_host(name)
        ip("netns", "del", name)


def kill_host(name: str) -> None:
    """Every process of a host, at once."""
    for number in ip("netns", "pids", name).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(number), 9)


def start(rank: int, output: Path, *arguments: str) -> AbstractContextManager[Started]:
    """One host's part of a run, with the variables that torchrun sets there."""
    name, cable, _ = HOSTS[rank]
    meeting = {"MASTER_ADDR": HOSTS[0][2], "MASTER_PORT": "29731", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    own = {"RANK": str(rank), "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": cable}
    return started(in_namespace, [name, *arguments], output, meeting | own)


def steps_logged(run: Path) -> list[int]:
    lines = map(json.loads, (run / "train.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "loss" in line]


def test_a_host_dies_and_the_run_goes_on(tmp_path: Path, hosts: None) -> None:
    """The other one says so and ends; the same commands with --resume go on from the last checkpoint."""
    config = extension(tmp_path, max_steps=40, save_steps=4)
    run = tmp_path / "run"
    command = ["extend", str(config), "--output", str(run)]
    with start(0, tmp_path / "first", *command) as first, start(1, tmp_path / "second", *command) as second:
        first.wait_until(lambda: any(run.glob("checkpoints/checkpoint-*")) or not second.running)
        assert second.running, second.printed
        kill_host(HOSTS[1][0])
        assert first.wait() == 75
        assert "another process of this run, or its host, is gone" in " ".join(first.printed.split())
        assert "skipwise/cli/main.py" not in first.printed  # as in a traceback
    left = {path.name for path in (run / "checkpoints").iterdir() if path.name.startswith("checkpoint-")}
    assert left
    command.append("--resume")
    with start(0, tmp_path / "first", *command) as first, start(1, tmp_path / "second", *command) as second:
        assert [first.wait(), second.wait()] == [0, 0], first.printed + second.printed
    assert steps_logged(run) == list(range(1, 41))
    assert (run / "model" / "model.safetensors").exists()
