"""Two hosts with their own addresses, made of network namespaces; one of them dies in the middle."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.test_ranks import ROOT, extension

HOSTS = (("skipwise-a", "skipa", "10.77.0.1"), ("skipwise-b", "skipb", "10.77.0.2"))
PORT = "29731"


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


def start(rank: int, *arguments: str) -> subprocess.Popen[str]:
    """One host's part of a run, as its user would start it there."""
    name, cable, _ = HOSTS[rank]
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1"]
    meeting = ["--master_addr", HOSTS[0][2], "--master_port", PORT]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": cable}
    return subprocess.Popen(
        ["ip", "netns", "exec", name, sys.executable, *torchrun, *meeting, "-m", "skipwise", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def steps_logged(run: Path) -> list[int]:
    lines = map(json.loads, (run / "train.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "loss" in line]


def test_a_host_dies_and_the_run_goes_on(tmp_path: Path, hosts: None) -> None:
    """The other one says so and ends; the same commands with --resume go on from the last checkpoint."""
    config = extension(tmp_path, max_steps=40, save_steps=4)
    run = tmp_path / "run"
    command = ["extend", str(config), "--output", str(run)]
    both = [start(rank, *command) for rank in (0, 1)]
    deadline = time.monotonic() + 240
    while not list(run.glob("checkpoints/checkpoint-*")):
        assert time.monotonic() < deadline
        for one in both:
            assert one.poll() is None, one.communicate()[0]
        time.sleep(0.05)
    kill_host(HOSTS[1][0])
    said = both[0].communicate(timeout=120)[0]
    both[1].communicate()
    assert both[0].returncode != 0
    assert "another process of this run, or its host, is gone" in " ".join(said.split())
    assert "skipwise/cli.py" not in said  # there is a traceback, but of torchrun's
    left = {path.name for path in (run / "checkpoints").iterdir() if path.name.startswith("checkpoint-")}
    assert left
    again = [start(rank, *command, "--resume") for rank in (0, 1)]
    outputs = [one.communicate(timeout=300)[0] for one in again]
    assert [one.returncode for one in again] == [0, 0], outputs
    assert steps_logged(run) == list(range(1, 41))
    assert (run / "model" / "model.safetensors").exists()
