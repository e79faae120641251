"""The parts of the main job that need no model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import LlamaConfig

from skipwise import FullLength, Lengths, UserError
from skipwise.config.files import parse_config, to_yaml
from skipwise.config.resolve import default_evaluations, resolve
from skipwise.config.run import LengthsConfig
from skipwise.evaluation.results import EvalResult, retrieval_warnings
from skipwise.export.inspection import inspect_run
from skipwise.planning.plan import make_plan
from skipwise.report.tables import comparison_markdown, stage_columns
from skipwise.runs import directory as runs
from skipwise.runs.directory import RunDir
from skipwise.utils.files import write_text
from skipwise.workflows.extend import extend
from tests.rows import row


def run_with(passkey_after: float, perplexity_after: float) -> list[EvalResult]:
    return [
        row("original", "passkey", 256, 1.0),
        row("original", "perplexity", 256, 22.0),
        row("interpolated", "perplexity", 256, 26.0),
        row("extended", "passkey", 256, passkey_after),
        row("extended", "perplexity", 256, perplexity_after),
    ]


def test_a_fall_of_retrieval_is_a_warning_however_good_the_perplexity() -> None:
    (warning,) = retrieval_warnings(run_with(passkey_after=0.2, perplexity_after=21.0), original=256)
    assert "from 100% to 20% although perplexity there improved from 22 to 21" in warning
    assert "Lower train.learning_rate" in warning
    (for_users,) = retrieval_warnings(run_with(0.2, 21.0), original=256, remedies=False)
    assert warning.startswith(for_users) and "train." not in for_users
    (worse,) = retrieval_warnings(run_with(passkey_after=0.2, perplexity_after=25.0), original=256)
    assert "although" not in worse  # than untrained it is better, but not than untouched
    few = [
        row("original", "passkey", 256, 1.0, interval_low=0.57, interval_high=1.0),
        row("extended", "passkey", 256, 0.8, interval_low=0.38, interval_high=0.96, num_samples=5),
    ]
    assert "from 100% to 80% (of 5: it may be chance)" in retrieval_warnings(few, original=256)[0]
    farther = [row("original", "perplexity", 1024, 30.0), row("extended", "perplexity", 1024, 20.0)]
    (elsewhere,) = retrieval_warnings([*run_with(0.2, 25.0), *farther], original=256)
    assert "although" not in elsewhere  # it improved beyond the window, and not where retrieval fell
    untrained = row("interpolated", "passkey", 256, 0.2)
    (other,) = retrieval_warnings([*run_with(passkey_after=0.2, perplexity_after=25.0), untrained], original=256)
    assert "The new RoPE alone has 20%: train longer" in other
    assert retrieval_warnings(run_with(passkey_after=0.95, perplexity_after=21.0), original=256) == []
    assert retrieval_warnings(run_with(passkey_after=0.2, perplexity_after=21.0), original=128) == []


def test_steps_are_in_their_order_and_once() -> None:
    """They were numbered as the file names its stages."""
    values = {"model": {"path": "m"}, "lengths": {"target": 512}, "data": "d"}

    def steps(**changes: Any) -> tuple[str, ...]:
        return resolve(parse_config({**values, **changes}), 64, 64).steps

    every = ("evaluate original", "evaluate interpolated", "train", "evaluate extended")
    assert steps(stages=["extended", "interpolated", "original", "original"]) == every
    assert steps(train={"max_steps": 0}) == ("evaluate original", "evaluate interpolated", "write")
    assert steps(evaluate=[]) == ("train",)


def config_for(**lengths: Any) -> Any:
    return parse_config({"model": {"path": "m"}, "lengths": lengths, "data": "d"})


def lengths_for(model: Path, **lengths: Any) -> Lengths:
    """The three lengths of a run on a small model with these windows."""
    found = parse_config({"model": {"path": str(model)}, "lengths": lengths, "data": "d"})
    return inspect_run(found)[1].lengths


def small_model(directory: Path, **keys: Any) -> Path:
    """A config of a small Llama, without weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    LlamaConfig(**sizes, vocab_size=300, **keys).save_pretrained(directory)
    return directory


def test_lengths_come_from_the_model(tmp_path: Path) -> None:
    model = small_model(tmp_path, max_position_embeddings=2048)
    assert lengths_for(model, target="16k") == Lengths(2048, 2048, 16384)
    assert lengths_for(model, target="16k", train=512) == Lengths(2048, 512, 16384)


def test_the_target_is_above_the_current_window_of_a_model_extended_before(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    model = small_model(tmp_path, max_position_embeddings=131072, rope_scaling=scaling)
    with pytest.raises(UserError, match=r"above the model's window of 131,072.*65,536"):
        lengths_for(model, target="64k")
    assert lengths_for(model, target="256k").original == 8192
    assert lengths_for(model, target="256k").factor == 32


def test_default_evaluations_reach_from_the_original_window_to_the_target() -> None:
    for spec in default_evaluations(Lengths(2048, 512, 12288)):
        assert spec.context_lengths == (2048, 4096, 8192, 12288)


def test_the_target_is_above_an_original_length_that_is_given(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"above the original length, but 4,096 <= 4,096"):
        lengths_for(small_model(tmp_path, max_position_embeddings=2048), target="4k", original="4k")


@pytest.mark.parametrize("original", [1, 2, 3])
def test_default_evaluations_of_tiny_windows_can_be_made(original: int) -> None:
    assert default_evaluations(Lengths(original, 1, 8))


def test_what_depends_on_the_model_is_filled_in() -> None:
    config = config_for(target="16k", train=512)
    run = resolve(config, 2048, 2048)
    assert run.lengths == Lengths(2048, 512, 16384) and run.window_length == 512
    assert run.evaluate == default_evaluations(run.lengths)
    assert run.train.kl_weight == 1.0
    assert run.as_config().lengths == LengthsConfig(original=2048, train=512, target=16384)
    assert resolve(run.as_config(), 2048, 2048) == run
    long_windows = config.model_copy(update={"positions": FullLength()})
    assert resolve(long_windows, 2048, 2048).train.kl_weight == 0.0  # the untouched model could not read them


def test_plan_by_hand() -> None:
    train = {"max_steps": 10, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    values = {"model": {"path": "m"}, "lengths": {"target": 256, "train": 32}, "data": "d", "train": train}
    size: dict[str, Any] = {"parameters": 1000, "active": 1000, "shape": None}
    pose = make_plan(resolve(parse_config(values), 64, 64), **size)
    assert (pose.factor, pose.train_tokens, pose.attention_saving) == (4.0, 1280, 64.0)
    full = make_plan(resolve(parse_config({**values, "positions": "full"}), 64, 64), **size)
    assert (full.train_tokens, full.attention_saving) == (10240, 1.0)


def test_the_table_shows_every_stage_and_flags() -> None:
    rows = [
        row("original", "perplexity", 4096, 712.0, status="beyond_window", reason="longer"),
        row("interpolated", "perplexity", 4096, None, status="failed", reason="out of memory"),
        row("extended", "perplexity", 4096, 12.345, interval_low=12.0, interval_high=13.0),
        row("extended", "passkey", 256, 0.5, interval_low=0.4, interval_high=0.6),
        row("extended", "passkey", 256, 0.1, depth=0.5),
    ]
    table = comparison_markdown(stage_columns(rows, trained="pose"))
    assert table.splitlines() == [
        "| evaluation | context | original | interpolated | pose |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| passkey | 256 | - | - | 50% ± 10% |",
        "| perplexity | 4k | 712.00* | failed | 12.35 ± 0.50 |",
        "",
        r"\* longer than the window of that model; ± half a 95 % interval.",
    ]


def test_a_failed_figure_is_measured_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.add_results([row("original", "passkey", 256, None, status="failed"), row("original", "passkey", 512, 0.5)])
    run.add_results([row("original", "passkey", 256, 1.0)])
    assert [(r.context_length, r.value) for r in run.read_results()] == [(512, 0.5), (256, 1.0)]


def test_results_survive_a_crash_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)
    run.add_results([row("original", "passkey", 256, 1.0)])
    before = run.results.read_text()
    real: Callable[..., Any] = Path.replace

    def crash(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        run.add_results([row("extended", "passkey", 256, 1.0)])
    monkeypatch.setattr(Path, "replace", real)
    assert run.results.read_text() == before
    assert len(run.read_results()) == 1


def test_shares_stay_between_nothing_and_all() -> None:
    """`100% ± 14%` said what no share can be."""
    rows = [
        row("original", "passkey", 256, 1.0, interval_low=0.72, interval_high=1.0),
        row("original", "passkey", 512, 0.04, interval_low=0.011, interval_high=0.135, status="beyond_window"),
        row("original", "passkey", 1024, 0.5, interval_low=0.4, interval_high=0.6),
    ]
    table = comparison_markdown(stage_columns(rows))
    assert "| 100% [72, 100] |" in table and "| 4% [1, 14]* |" in table and "| 50% ± 10% |" in table


def test_an_interval_with_a_far_bound_is_shown_whole() -> None:
    near = row("original", "perplexity", 256, 20.0, interval_low=18.0, interval_high=22.0)
    far = row("original", "perplexity", 512, 146.0, interval_low=27.0, interval_high=2676.0)
    table = comparison_markdown(stage_columns([near, far]))
    assert "| 20.00 ± 2.00 |" in table
    assert "| 146.00 [27.00, 2,676.00] |" in table


def test_a_run_from_before_a_key_was_there_goes_on(tmp_path: Path) -> None:
    """Keys that came later have their defaults; another value is another run."""
    config = parse_config({"model": {"path": "builtin:tiny"}, "lengths": {"target": 512}, "data": "builtin:python"})
    resolved = to_yaml(config)
    run = RunDir(tmp_path)
    write_text(run.resolved, "".join(line for line in resolved.splitlines(True) if "messages_field" not in line))
    run.claim(resume=True, resolved=resolved)
    given = {"model": {"path": "builtin:tiny"}, "lengths": {"target": 512}, "data": "builtin:python"}
    other = to_yaml(
        parse_config(
            {**given, "train": {"max_steps": 201}, "evaluate": [{"name": "passkey", "context_lengths": [64, 128]}]}
        )
    )
    with pytest.raises(UserError) as refused:
        run.claim(resume=True, resolved=other)
    said = str(refused.value)
    assert "train.max_steps was 200 and is 201" in said
    assert "evaluate was None and is ['passkey']" in said and "evaluate[0]" not in said
    assert "\n" not in said and "learning_rate" not in said
    with pytest.raises(UserError) as refused:
        run.claim(resume=True, resolved=to_yaml(parse_config({**given, "rope": {"name": "linear"}})))
    assert "rope.name was yarn and is linear." in str(refused.value)  # and nothing of what the others have
    write_text(run.resolved, resolved.replace("train:", "train:\n  auto_find_batch_size: false\n  target_growth: 0.0"))
    run.claim(resume=True, resolved=resolved)  # with keys that there were
    write_text(run.resolved, "model: [")
    with pytest.raises(UserError, match="cannot be read as YAML"):
        run.claim(resume=True, resolved=resolved)


def test_a_run_belongs_to_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with --resume, and before anything is loaded where it is not given."""
    monkeypatch.setattr(runs, "LOCK_SECONDS", 0.0)
    values = {"model": {"path": "builtin:tiny"}, "lengths": {"target": 512}, "data": "builtin:python"}
    output = tmp_path / "run"
    output.mkdir()
    with RunDir(output).held():
        for resume in (False, True):
            with pytest.raises(UserError, match="Another process is writing to"):
                extend(parse_config(values), output, given="", console=Console(quiet=True), resume=resume)
    assert not list(output.iterdir())
    with RunDir(output).held():
        pass
