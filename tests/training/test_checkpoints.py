"""What happens to checkpoints that are damaged, cut off, or have no room; and models that diverge."""

import errno
import json
import signal
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback

from skipwise import PoSE, UserError, WindowCollator
from skipwise.training.callbacks import StopOnSignal, TrainLog
from skipwise.training.checkpoints import MANIFEST, damage, newest_checkpoint, publish
from skipwise.training.config import TrainConfig
from skipwise.training.trainer import train, training_arguments
from tests.picomodels import pico_llama
from tests.training.examples import CPU, LENGTHS, examples

CONFIG = TrainConfig(
    max_steps=6, learning_rate=1e-3, per_device_train_batch_size=2, save_steps=2, warmup_steps=2, logging_steps=1
)


def run(model: PreTrainedModel, output: Path, *callbacks: TrainerCallback, said: list[str] | None = None) -> bool:
    return train(
        model=model,
        arguments=training_arguments(CONFIG, output, seed=0, dtype=torch.float32, device=CPU),
        dataset=examples(CONFIG.max_steps * CONFIG.per_device_train_batch_size),
        collator=WindowCollator(PoSE(), LENGTHS, mark_text=True),
        eval_dataset=None,
        callbacks=list(callbacks),
        teacher=None,
        log=([] if said is None else said).append,
    ).finished


class StopAfter(TrainerCallback):
    """End after a step, as if killed: nothing is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """The weights at the end of a training that nothing happened to."""
    model = pico_llama()
    assert run(model, tmp_path_factory.mktemp("undisturbed"))
    return [weight.detach() for weight in model.parameters()]


def assert_undisturbed(model: PreTrainedModel, expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(weight, other) for weight, other in zip(model.parameters(), expected, strict=True))


def files_of(checkpoint: Path) -> list[str]:
    return sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())


def test_the_manifest_names_every_file(tmp_path: Path) -> None:
    run(pico_llama(), tmp_path, StopAfter(3))
    (checkpoint,) = tmp_path.iterdir()
    hashes = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert sorted([*hashes, MANIFEST]) == files_of(checkpoint)
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(hashes)
    assert damage(checkpoint) is None


@pytest.mark.parametrize("harm", ["cut", "flip", "remove"])
def test_whatever_happens_to_a_file_is_seen(tmp_path: Path, harm: str) -> None:
    (tmp_path / "new" / "deep").mkdir(parents=True)
    (tmp_path / "new" / "weights").write_bytes(bytes(range(200)))
    (tmp_path / "new" / "deep" / "state").write_bytes(b"0123456789")
    publish(tmp_path / "new", tmp_path / "checkpoint-1")
    assert damage(tmp_path / "checkpoint-1") is None
    for name in files_of(tmp_path / "checkpoint-1"):
        path = tmp_path / "checkpoint-1" / name
        content = path.read_bytes()
        if harm == "remove":
            path.unlink()
        else:
            path.write_bytes(content[:-1] if harm == "cut" else content[:5] + bytes([content[5] ^ 1]) + content[6:])
        # A manifest may lose its last line break and still be read.
        assert (damage(tmp_path / "checkpoint-1") is None) == (name == MANIFEST and harm == "cut")
        path.write_bytes(content)


def test_of_damaged_checkpoints_the_one_before_is_used(tmp_path: Path, undisturbed: list[torch.Tensor]) -> None:
    """And the end is the same. Seen to fail when damage was not looked for."""
    run(pico_llama(), tmp_path, StopAfter(5))
    weights = tmp_path / "checkpoint-4" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    said: list[str] = []
    model = pico_llama()
    assert run(model, tmp_path, said=said)
    assert len(said) == 1
    assert "checkpoint-4 is damaged (it has another model.safetensors than was written)" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6", "damaged-checkpoint-4"]
    assert_undisturbed(model, undisturbed)


def test_what_was_cut_off_while_written_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "unfinished" / "checkpoint-12").mkdir(parents=True)
    for step in (2, 10):
        (tmp_path / f"new-{step}").mkdir()
        (tmp_path / f"new-{step}" / "state").write_text("")
        publish(tmp_path / f"new-{step}", tmp_path / f"checkpoint-{step}")
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) == tmp_path / "checkpoint-10"
    assert newest_checkpoint(tmp_path / "none", said.append) is None
    assert not said


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, undisturbed: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(value: Any, path: Any) -> None:
        if "checkpoint-4" in str(path) and str(path).endswith("rng_state.pth"):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(value, path)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(UserError, match=r"checkpoint-4 cannot be written .*No space left .*--resume"):
            run(pico_llama(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    model = pico_llama()
    assert run(model, tmp_path)
    assert_undisturbed(model, undisturbed)


class Spoil(TrainerCallback):
    """Before a step set a weight, or make a gradient infinite."""

    def __init__(self, step: int, weight: float | None) -> None:
        self.step, self.weight = step, weight

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.step - 1 and self.weight is not None:
            model.lm_head.weight.data.mul_(self.weight)
        elif state.global_step == self.step - 1:
            model.lm_head.weight.register_hook(lambda gradient: gradient / 0.0)


@pytest.mark.parametrize(
    ("weight", "what"),
    [(float("nan"), "the loss is nan"), (1e4, "the loss is "), (None, "the norm of the gradients is")],
)
def test_a_model_that_diverges_is_not_saved(tmp_path: Path, weight: float | None, what: str) -> None:
    """The message names the step and its windows. Seen to fail without either check."""
    with pytest.raises(UserError, match=rf"In step 4 {what}.*piece \d+ of source 0, piece \d+ of source 0\.") as raised:
        run(pico_llama(), tmp_path, Spoil(4, weight))
    numbers = {int(word) for word in str(raised.value).replace(",", " ").split() if word.isdigit()}
    assert {int(examples(12)[index]["visit"][1]) for index in (6, 7)} <= numbers
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_log_has_every_step_once(tmp_path: Path) -> None:
    """Steps after the checkpoint were logged, and come again; the last line was cut off."""
    log = tmp_path / "train.jsonl"
    run(pico_llama(), tmp_path / "checkpoints", StopAfter(3), TrainLog(log, 1))
    with log.open("a") as file:
        file.write('{"step": 4, "lo')
    run(pico_llama(), tmp_path / "checkpoints", TrainLog(log, 1))
    steps = [line["step"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_launchers_may_send_the_signal_twice() -> None:
    """To the group and to the process, say. Seen to end the process when the second one was not taken."""
    before = signal.getsignal(signal.SIGTERM)
    stop, nothing = StopOnSignal(), cast("Any", None)
    stop.on_train_begin(nothing, nothing, nothing)
    try:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert stop.stopped
    finally:
        stop.on_train_end(nothing, nothing, nothing)
    assert signal.getsignal(signal.SIGTERM) is before
