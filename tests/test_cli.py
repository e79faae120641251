"""The real command, end to end, and what it says to wrong input."""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from skipwise.cli import run
from skipwise.evaluation.specs import EVALUATIONS
from skipwise.models.convert import CONVERSIONS
from skipwise.positions import SAMPLERS
from skipwise.rope import ROPE_SCALINGS
from skipwise.sections import name_of
from skipwise.terminal import errors
from tests.commands import rows_of, skipwise
from tests.conftest import byte_tokenizer, pico_llama


def test_extend_end_to_end(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    output = skipwise("extend", config_file, "--output", run)
    assert "64 -> 512 tokens" in output
    assert "attention reaches across a skip" in output
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "resolved.yaml",
        "environment.json",
        "report.html",
        "parts.json",
        "rope.json",
        "plan.json",
        "data.json",
        "train.jsonl",
        "timings.json",
        "results.jsonl",
        "examples",
        "model",
    }
    logged = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    losses = [line for line in logged if "loss" in line]
    assert [line["step"] for line in losses] == [1, 4]  # the first and the last
    assert all(line["tokens_per_second"] > 0 and line["peak_memory"] > 1e8 for line in losses)
    rows = rows_of(run)
    pooled = {(row.stage, row.evaluation, row.context_length): row for row in rows if row.depth is None}
    assert len(pooled) == 3 * 6
    assert pooled["original", "perplexity", 256].status == "beyond_window"
    assert pooled["extended", "perplexity", 256].status == "ok"
    assert pooled["extended", "passkey", 64].status == "failed"  # the prompt alone is longer
    assert pooled["extended", "passkey", 64].value is None
    assert "failed: A passkey prompt needs at least" in output
    assert "part 3 of 4: train" in output
    report = (run / "report.html").read_text()
    assert "not finished" not in report and " so far on " not in report
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert model.config.max_position_embeddings == 512
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert model.config.use_cache
    base = pico_llama()
    assert not torch.equal(model.lm_head.weight, base.lm_head.weight)
    assert skipwise("extend", config_file, "--output", run, code=2).count("--resume") == 1


def test_a_finished_run_resumes_to_the_same_rows(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "Nothing to resume" in skipwise("extend", config_file, "--output", run, "--resume")
    lines = (run / "results.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["stage"] != "extended"]
    (run / "results.jsonl").write_text("\n".join(kept) + "\n")
    weights = (run / "model" / "model.safetensors").read_bytes()
    assert "Nothing to resume" not in skipwise("extend", config_file, "--output", run, "--resume")
    # Rows that failed are tried again and so come last.
    assert sorted((run / "results.jsonl").read_text().splitlines()) == sorted(lines)
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    other = skipwise("extend", config_file, "--output", run, "--resume", "--seed", 7, code=2)
    assert "another configuration: seed was 0 and is 7." in other
    assert "context window" not in other  # no plan of what will not be done


def test_an_interrupted_run_saves_and_resumes(config_file: Path, tmp_path: Path) -> None:
    """SIGTERM in the middle of training: exit code 75, then the same weights as without it."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--steps", 60, "--set", "evaluate=[]", "--set", "stages=[]", "--set", "train.save_steps=1000"]
    skipwise("extend", config_file, "--output", whole, *options)
    command = [sys.executable, "-m", "skipwise", "extend", config_file, "--output", parts, *options]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (parts / "train.jsonl").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate()[0].decode()
    assert process.returncode == 75, output
    assert "--resume" in output
    assert not (parts / "model").exists()
    assert len(list((parts / "checkpoints").glob("checkpoint-*"))) == 1
    skipwise("extend", config_file, "--output", parts, *options, "--resume")
    files = [path / "model" / "model.safetensors" for path in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (whole / "report.html").is_file()  # though nothing was measured


@pytest.mark.parametrize("method", ["randpos", "plain", "interpolate", "full"])
def test_methods(config_file: Path, tmp_path: Path, method: str) -> None:
    run = tmp_path / method
    evaluate = "[{name: perplexity, context_lengths: [64, 256], documents: 2}]"
    steps = [] if method == "interpolate" else ["--steps", 1]
    skipwise("extend", config_file, "--output", run, "--method", method, *steps, "--set", f"evaluate={evaluate}")
    stages = {row.stage for row in rows_of(run)}
    assert stages == {"original", "interpolated"} | (set() if method == "interpolate" else {"extended"})
    assert AutoModelForCausalLM.from_pretrained(run / "model").config.max_position_embeddings == 512


def test_a_model_whose_attention_is_cut_is_not_trained(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 2: the probe stops the run before anything is spent. Seen to fail when `Workbench.check` did not probe."""
    from skipwise import UserError, workbench
    from skipwise.config_files import parse_config, read_yaml
    from skipwise.extension import extend

    def cut(*_: object, **__: object) -> None:
        raise UserError("attention is cut")

    monkeypatch.setattr(workbench, "probe_attention", cut)
    config = parse_config(read_yaml(config_file))
    with pytest.raises(UserError, match="attention is cut"):
        extend(config, tmp_path / "run", given="", console=Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_options_reach_the_model(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them was seen to fail without the line that hands it on."""
    from skipwise import workbench
    from skipwise.config_files import merge, parse_config, read_yaml
    from skipwise.extension import extend
    from skipwise.training import trainer

    done = []
    monkeypatch.setattr(workbench, "recompute_activations", lambda model, mode: done.append(mode))
    monkeypatch.setattr(workbench, "use_liger", lambda model: done.append("liger"))
    monkeypatch.setattr(workbench, "usable_speedups", lambda config, model, device: (config, ["a line"]))
    monkeypatch.setattr(trainer, "compiled_layers", lambda model: nullcontext(done.append("compiled")))
    console = Console(record=True, quiet=False, file=io.StringIO())
    for options in ({"gradient_checkpointing": "selective", "use_liger_kernel": True}, {"torch_compile": True}):
        values = merge(read_yaml(config_file), {"train": {**options, "max_steps": 1}, "stages": []})
        values = merge(values, {"model": {"attn_implementation": "flash_attention_2"}})
        extend(parse_config(values), tmp_path / "-".join(options), given="", console=console)
    assert done == ["liger", "selective", "compiled"]
    said = console.export_text()
    assert said.count("a line") == said.count("needs a GPU") == 2


def test_echoes(config_file: Path, tmp_path: Path) -> None:
    flags = ["--set", "train.echo_share=0.7", "--set", "evaluate=[]"]
    skipwise("extend", config_file, "--output", tmp_path / "run", *flags)
    flex = ["--set", "model.attn_implementation=flex_attention", "--output", tmp_path / "flex"]
    assert "sdpa or eager" in " ".join(skipwise("extend", config_file, *flags, *flex, code=2).split())


def test_more_windows_than_can_be_ordered_are_refused(config_file: Path, tmp_path: Path) -> None:
    huge = ["--steps", 1_000_000, "--set", "train.per_device_train_batch_size=1000"]
    alone = ["--set", "evaluate=[]", "--set", "train.kl_weight=0"]
    output = skipwise("extend", config_file, *huge, *alone, "--output", tmp_path / "run", code=2)
    assert "at most 268,435,456 windows" in output and "1,000,000,000" in output


def test_processes_that_cannot_meet_are_refused(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    output = skipwise("extend", config_file, "--output", tmp_path / "run", code=2)
    assert "WORLD_SIZE is 2, but MASTER_ADDR is not set" in output
    assert not (tmp_path / "run").exists()


def test_dry_run_writes_nothing(config_file: Path, tmp_path: Path) -> None:
    output = skipwise("extend", config_file, "--output", tmp_path / "run", "--dry-run")
    for planned in ("factor 8", "passkey at 64, 512 tokens, trials: 5", "original, interpolated, extended"):
        assert planned in output
    untrained = skipwise("extend", config_file, "--output", tmp_path / "run", "--dry-run", "--steps", 0)
    assert "none: only the RoPE is rescaled" in " ".join(untrained.split())
    assert not (tmp_path / "run").exists()


def test_list_and_version() -> None:
    listed = skipwise("list")
    assert "skipwise[harness]" in listed  # no markup
    for name in ("interpolate", "builtin:python", "preset:pg19", "trackio", "self-extend", *CONVERSIONS):
        assert name in listed
    for name in ("pose", "randpos", "yarn-revised", "truncated_perplexity"):
        assert name in listed
    choices = json.loads(skipwise("list", "--json", "--quiet"))
    assert set(choices["rope"]) > {"yarn", "mixed"} and "self-extend" in choices["aids"]
    assert set(choices["methods"]) == {"interpolate", *choices["positions"]}
    assert {"positions", "evaluate", "data", "trackers", "engines", "conversions"} < set(choices)
    assert skipwise("--version").strip()


MISTAKES = [
    ("target not above the window", ["--target", "64"], "must be above the model's window of 64"),
    ("train above target", ["--train-length", "1k"], "must not exceed the target length"),
    ("fewer tokens than chunks", ["--train-length", "2", "--set", "positions.chunks=3"], "one token per chunk"),
    ("unknown sampler", ["--method", "posee"], "Did you mean 'pose'"),
    ("unknown scaling", ["--rope", "yarm"], "Did you mean 'yarn'"),
    ("unknown key", ["--set", "train.max_stps=3"], "Did you mean 'max_steps'"),
    ("unreadable data", ["--data", "nowhere.jsonl"], "does not exist"),
    ("a teacher past its window", ["--train-length", "128", "--set", "train.kl_weight=1"], "untouched model can read"),
    ("steps without training", ["--method", "interpolate", "--steps", "3"], "trains nothing"),
    ("a window too short for retrieval", ["--train-length", "16"], "training window of 32 tokens"),
    ("no document long enough", ["--train-length", "512"], "documents of at least 512 tokens, but the longest"),
]


@pytest.mark.parametrize(("flags", "message"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_wrong_input_is_one_message(
    flags: list[str], message: str, config_file: Path, tmp_path: Path, text_file: Path
) -> None:
    lines = text_file.read_text().splitlines()
    text_file.write_text("\n".join(json.dumps({"text": json.loads(line)["text"][:400]}) for line in lines))
    output = skipwise("extend", config_file, "--output", tmp_path / "run", *flags, code=2)
    assert message in " ".join(output.split())
    assert output.count("Error:") == 1
    assert not (tmp_path / "run").exists()


def test_nothing_held_out_to_watch_the_loss_on(config_file: Path, tmp_path: Path, text_file: Path) -> None:
    """One long document among short ones: what is held out is shorter than a window."""
    texts = ["the long one " * 40, *(f"short {number}" for number in range(30))]
    text_file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    flags = ["--set", "data.held_out_share=0.001", "--set", "evaluate=[]", "--output", tmp_path / "run"]
    output = skipwise("extend", config_file, *flags, "--set", "train.eval_steps=2", code=2)
    assert "eval_steps needs a held-out document as long as a training window" in " ".join(output.split())
    assert not (tmp_path / "run").exists()
    skipwise("extend", config_file, *flags)  # without it, nothing is wrong


def test_wrong_models_are_refused(config_file: Path, tmp_path: Path) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=258, n_positions=64))
    small = pico_llama(vocab_size=100)
    for name, model, message in (
        ("gpt2", gpt2, "rotary position embeddings"),
        ("vocabulary", small, "must share a vocabulary"),
    ):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
        flags = ["--set", f"model.path={tmp_path / name}", "--output", tmp_path / "run"]
        assert message in " ".join(skipwise("extend", config_file, *flags, code=2).split())
        assert not (tmp_path / "run").exists()
    for path, message in ((tmp_path / "nothing", "does not exist"), ("builtin:tny", "Did you mean 'builtin:tiny'")):
        output = skipwise("extend", config_file, "--set", f"model.path={path}", "--output", tmp_path / "run", code=2)
        assert message in " ".join(output.split())


def test_a_model_with_windowed_layers(config_file: Path, tmp_path: Path) -> None:
    """Masked by distance in training; and the line that says how far it can see at all."""
    config = MistralConfig(
        vocab_size=258,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        sliding_window=16,
        max_position_embeddings=64,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "windowed")
    byte_tokenizer().save_pretrained(tmp_path / "windowed")
    flags = ["--set", f"model.path={tmp_path / 'windowed'}", "--set", "evaluate=[]", "--output", tmp_path / "run"]
    assert "All 2 layers see only the last 16 tokens" in " ".join(skipwise("extend", config_file, *flags).split())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.sliding_window == 16


def test_a_directory_that_is_no_run_is_left_alone(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "no Skipwise run" in skipwise("extend", config_file, "--output", tmp_path / "mine", code=2)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_mistakes_are_found_before_anything_heavy_is_imported() -> None:
    """What keeps them under a second: neither torch nor transformers is loaded."""
    code = (
        "import sys; from skipwise.cli import app, run\n"
        "sys.argv = ['skipwise', 'extend', 'builtin:tiny', '--target', '4k', '--data', 'nowhere.jsonl']\n"
        "code = run(app); print('torch' in sys.modules, 'transformers' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout.split() == ["False", "False"]


def test_the_list_of_commands_imports_little() -> None:
    """What keeps it under a third of a second."""
    heavy = ("numpy", "pydantic", "yaml", "torch")
    code = (
        "import sys; from skipwise.cli import app, run\n"
        "sys.argv = ['skipwise', '--help']\n"
        f"code = run(app); print(*(name in sys.modules for name in {heavy}), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "evaluate" in done.stdout
    assert done.stderr.split() == ["False"] * len(heavy)


@pytest.mark.parametrize(
    ("command", "names"), [("extend", (*SAMPLERS, *ROPE_SCALINGS)), ("plan", SAMPLERS), ("evaluate", EVALUATIONS)]
)
def test_the_help_of_a_command_names_what_there_is(command: str, names: tuple[type, ...]) -> None:
    output = " ".join(skipwise(command, "--help").replace("│", " ").split())
    for cls in names:
        assert name_of(cls) in output


@pytest.mark.parametrize("place", [0, 1, 3, 7], ids=["before", "after its name", "between", "at the end"])
def test_quiet_says_errors_only(place: int) -> None:
    wanted = ["extend", "builtin:tiny", "--target", "512", "--data", "builtin:python", "--dry-run"]
    assert skipwise(*wanted[:place], "--quiet", *wanted[place:]) == ""
    asked = ["plan", "builtin:tiny", "--target", "512", "--json"]
    place = min(place, len(asked))
    assert json.loads(skipwise(*asked[:place], "--quiet", *asked[place:]))["target_length"] == 512
    assert "Error:" in skipwise("plan", "builtin:tiny", "--target", "128", "--quiet", code=2)


def test_without_quiet_it_says_more_and_what_comes_after_two_dashes_is_no_option() -> None:
    wanted = ["extend", "--target", "512", "--data", "builtin:python", "--dry-run", "builtin:tiny"]
    assert "context window" in skipwise(*wanted)
    assert "--quiet does not exist" in skipwise(*wanted[:-1], "--", "./--quiet", code=2)
    assert "Error:" in skipwise("plan", "--target", "512", "--", "--quiet", code=2)


@pytest.mark.parametrize("place", [0, 4])
def test_debug_says_where_an_error_was_found(place: int) -> None:
    wrong = ["plan", "builtin:tiny", "--target", "128"]
    arguments = [*wrong[:place], "--debug", *wrong[place:]]
    done = subprocess.run([sys.executable, "-m", "skipwise", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "resolve_target" in done.stderr and "Error: " in done.stderr


def test_help_shows_what_is_taken_by_default() -> None:
    """In brackets, which are markup to what prints it."""
    for command in ("extend", "plan", "coverage", "explore"):
        assert "[default:" in skipwise(command, "--help"), command


def test_an_unexpected_error_is_one_message_and_its_traceback_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def broken() -> None:
        raise RuntimeError("the wheel came off")

    assert run(broken) == 1
    said = capsys.readouterr().err
    assert "RuntimeError: the wheel came off" in said and "Traceback" not in said
    (file,) = tmp_path.iterdir()
    assert str(file) in said.replace("\n", "")
    assert "in broken" in file.read_text()
    monkeypatch.setattr(errors, "show_origin", True)
    with pytest.raises(RuntimeError, match="wheel"):
        run(broken)
