"""Several processes of one training, with gloo on a CPU, as torchrun starts them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from skipwise.models.locate import model_location
from skipwise.utils.distributed import rank, world_size
from tests.processes import PATIENCE, ROOT, command, free_port, ranks
from tests.ranks import extension, losses, report, windows_of_steps, work

ENGINES = ROOT / "configs" / "engines"


def extend(count: int, *arguments: object) -> tuple[list[int], list[str]]:
    """`skipwise extend` in so many processes: exit codes, and what they printed."""
    output = Path(str(arguments[-1])).with_suffix(".printed")
    output.unlink(missing_ok=True)
    with ranks(count, command, ["extend", *map(str, arguments)], output) as all_ranks:
        codes = [one.wait() for one in all_ranks]
        return codes, [one.printed for one in all_ranks]


def launched(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A launcher as its user starts it; all that it starts ends with it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        printed = process.communicate(timeout=PATIENCE)
        return subprocess.CompletedProcess(process.args, process.returncode, *printed)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return work(tmp_path_factory.mktemp("alone"), 1)


def test_two_processes_train_like_one(tmp_path: Path, alone: Path) -> None:
    """The same windows in every step, the same losses, the same weights but for rounding."""
    two = work(tmp_path / "two", 2)
    assert windows_of_steps(two, 2) == windows_of_steps(alone, 1)
    assert_same_training(two, alone)
    assert all((two / f"left-{rank}").exists() for rank in (0, 1))


@pytest.mark.parametrize(
    ("engine", "says", "interrupted"),
    [
        ("fsdp", "FSDP2", True),
        ("zero1", "DeepSpeed ZeRO-1", False),
        ("zero2", "DeepSpeed ZeRO-2", False),
        ("zero3", "DeepSpeed ZeRO-3", True),
        ("zero3-offload", "DeepSpeed ZeRO-3", False),
    ],
)
def test_every_engine_trains_like_one_process(
    tmp_path: Path, alone: Path, engine: str, says: str, interrupted: bool
) -> None:
    """Also when it was stopped and resumed; and it is what it says. Losses and weights are those of one process."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    two = tmp_path / "two"
    if interrupted:
        work(two, 2, "--engine", engine, "--stop", "3")
        assert [report(two, rank)["finished"] for rank in (0, 1)] == [False, False]
    work(two, 2, "--engine", engine)
    assert len(report(two, 0)["drawn"]) == (2 if interrupted else 6)  # of 6 steps; it was stopped after the fourth
    assert report(two, 0)["said"][-1] == f"training on cpu: {says} on 2 processes"
    assert_same_training(two, alone)


def test_products_in_bfloat16_are_the_same_with_every_engine(tmp_path: Path) -> None:
    """Engines have ways of their own to compute in bfloat16, which round weights, or the loss to steps of 1/32."""
    pytest.importorskip("deepspeed")
    alone = work(tmp_path / "alone", 1, "--dtype", "bfloat16")
    for engine in ("fsdp", "zero3"):
        two = work(tmp_path / engine, 2, "--dtype", "bfloat16", "--engine", engine)
        assert losses(two) == pytest.approx(losses(alone), rel=1e-3)
        weights = [torch.load(one / "weights.pt", weights_only=True) for one in (alone, two)]
        for name, weight in weights[0].items():
            assert weights[1][name].dtype == torch.float32
            # An optimizer's step is as large for a gradient that is nothing but rounding.
            assert float((weights[1][name] - weight).abs().mean()) < 1e-4


def test_says_aloud_that_a_cpu_has_no_fsdp(tmp_path: Path) -> None:
    """Accelerate copies the model to every process instead, without a word."""
    two = work(tmp_path / "two", 2, "--engine", "fsdp-on-cpu")
    assert "DDP on 2 processes (FSDP was asked for" in report(two, 0)["said"][-1]


def assert_same_training(two: Path, alone: Path) -> None:
    assert losses(two) == pytest.approx(losses(alone), rel=1e-4)
    weights = [torch.load(one / "weights.pt", weights_only=True) for one in (alone, two)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5)


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path: Path, alone: Path) -> None:
    """They resume to the same end. Seen to hang when every process decided for itself."""
    two = work(tmp_path / "two", 2, "--stop", "3")
    ends = [report(two, rank)["finished"] for rank in (0, 1)]
    assert ends == [False, False]
    assert sorted(path.name for path in (two / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    work(two, 2)
    assert len(report(two, 0)["drawn"]) == 2
    assert_same_training(two, alone)


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--config_file", str(ENGINES / "fsdp2.yaml"), "--num_processes", "2"]
DEEPSPEED = ["deepspeed.launcher.runner", "--num_accelerators", "2", "--no_local_rank"]


@pytest.mark.parametrize(
    ("launcher", "port", "module", "engine", "says"),
    [
        (TORCHRUN, "--master_port", "-m", None, "DDP on 2 processes"),
        (ACCELERATE, "--main_process_port", "-m", None, "DDP on 2 processes (FSDP was asked for"),
        (DEEPSPEED, "--master_port", "--module", "zero3.json", "DeepSpeed ZeRO-3 on 2 processes"),
    ],
    ids=["torchrun", "accelerate", "deepspeed"],
)
def test_a_whole_run_under_a_launcher(
    tmp_path: Path, launcher: list[str], port: str, module: str, engine: str | None, says: str
) -> None:
    """The model that is written is a plain one, whatever trained it. (A CPU has no FSDP, and the run says so.)"""
    if engine:
        pytest.importorskip("deepspeed")
    file = extension(tmp_path, deepspeed=str(ENGINES / engine) if engine else None)
    output = tmp_path / "run"
    done = launched(*launcher, port, str(free_port()), module, "skipwise", "extend", str(file), "--output", str(output))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"training on cpu: {says}" in " ".join(done.stdout.split())
    before = AutoModelForCausalLM.from_pretrained(model_location("builtin:tiny")).state_dict()
    after = AutoModelForCausalLM.from_pretrained(output / "model").state_dict()
    assert before.keys() == after.keys()
    moved = [float((after[name] - before[name]).abs().max()) for name in before]
    # Every weight was trained, and is still itself. (In bfloat16 a norm of 1 would not have moved.)
    assert all(0 < one < 1e-4 for one in moved)
    assert (output / "results.jsonl").exists()


def test_what_one_process_refuses_ends_all_of_them(tmp_path: Path) -> None:
    """Under a launcher, with one message."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").touch()
    done = launched(*TORCHRUN, "-m", "skipwise", "extend", str(extension(tmp_path)), "--output", str(tmp_path / "run"))
    assert done.returncode != 0
    assert done.stderr.count("[output_kind_mismatch]") == 1


def test_adapters_on_a_sharded_model(tmp_path: Path) -> None:
    """What is written is a plain model, in which they are added to the weights beside which they were."""
    pytest.importorskip("peft")
    pytest.importorskip("deepspeed")
    zero3 = str(ENGINES / "zero3.json")
    file, output = extension(tmp_path, lora={"r": 4}, learning_rate=1e-3, deepspeed=zero3), tmp_path / "run"
    codes, printed = extend(2, file, "--output", output)
    assert codes == [0, 0], printed
    before = AutoModelForCausalLM.from_pretrained(model_location("builtin:tiny")).state_dict()
    after = AutoModelForCausalLM.from_pretrained(output / "model").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj" in name}


def test_a_whole_run_in_two_processes(tmp_path: Path) -> None:
    """One plan, one log, one model."""
    file = extension(tmp_path)
    output = tmp_path / "run"
    codes, printed = extend(2, file, "--output", output)
    assert codes == [0, 0], printed
    assert [said.count("context window") for said in printed] == [1, 0]
    assert len(losses(output)) == 2
    assert json.loads((output / "plan.json").read_text())["train_tokens"] == 2 * 2 * 256


def test_processes_that_have_met_by_hand_know_their_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """After `mp.spawn` the environment says nothing, and all ranks drew the same windows."""
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (rank(), world_size()) == (5, 8)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert (rank(), world_size()) == (0, 1)
    finally:
        torch.distributed.destroy_process_group()
    assert rank() == 5
