"""What the command line takes, refuses and prints."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from skipwise.cli.main import run
from skipwise.cli.terminal import errors
from skipwise.evaluation.specs import EVALUATIONS
from skipwise.export.convert import CONVERSIONS
from skipwise.positions import SAMPLERS
from skipwise.rope import ROPE_SCALINGS
from skipwise.utils.sections import name_of
from tests.commands import error_code, skipwise
from tests.picomodels import byte_tokenizer, pico_llama


def test_more_windows_than_can_be_ordered_are_refused(config_file: Path, tmp_path: Path) -> None:
    huge = ["--steps", 1_000_000, "--set", "train.per_device_train_batch_size=1000"]
    alone = ["--set", "evaluate=[]", "--set", "train.kl_weight=0"]
    output = skipwise("extend", config_file, *huge, *alone, "--output", tmp_path / "run", code=2)
    assert error_code(output) == "too_many_windows" and "1,000,000,000" in output


def test_processes_that_cannot_meet_are_refused(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    output = skipwise("extend", config_file, "--output", tmp_path / "run", code=2)
    assert error_code(output) == "launcher_missing"
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
    assert set(choices["rope"]) > {"yarn", "mixed"} and "self-extend" in choices["training_free"]
    assert set(choices["methods"]) == {"interpolate", *choices["positions"]}
    assert {"positions", "evaluate", "data", "trackers", "engines", "conversions"} < set(choices)
    assert skipwise("--version").strip()


MISTAKES = [
    (["--target", "64"], "target_not_above_window"),
    (["--train-length", "1k"], "train_length_above_target"),
    (["--train-length", "2", "--set", "positions.chunks=3"], "train_length_too_short"),
    (["--method", "posee"], "unknown_method"),
    (["--rope", "yarm"], "unknown_choice"),
    (["--set", "train.max_stps=3"], "unknown_key"),
    (["--data", "nowhere.jsonl"], "data_not_found"),
    (["--train-length", "128", "--set", "train.kl_weight=1"], "kl_window_exceeds_original"),
    (["--method", "interpolate", "--steps", "3"], "steps_for_untrained_method"),
    (["--train-length", "16"], "window_too_short_for_retrieval"),
    (["--train-length", "512"], "documents_too_short"),
]


# What is proposed for what was misspelt.
NEAREST = {"posee": "'pose'", "yarm": "'yarn'", "train.max_stps=3": "'max_steps'"}


@pytest.mark.parametrize(("flags", "code"), MISTAKES, ids=[code for _, code in MISTAKES])
def test_wrong_input_is_one_message(
    flags: list[str], code: str, config_file: Path, tmp_path: Path, text_file: Path
) -> None:
    lines = text_file.read_text().splitlines()
    text_file.write_text("\n".join(json.dumps({"text": json.loads(line)["text"][:400]}) for line in lines))
    output = skipwise("extend", config_file, "--output", tmp_path / "run", *flags, code=2)
    assert error_code(output) == code
    assert NEAREST.get(flags[-1], "") in output
    assert not (tmp_path / "run").exists()


def test_wrong_models_are_refused(config_file: Path, tmp_path: Path) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=258, n_positions=64))
    small = pico_llama(vocab_size=100)
    for name, model, code in (("gpt2", gpt2, "family_not_supported"), ("vocabulary", small, "vocabulary_mismatch")):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
        flags = ["--set", f"model.path={tmp_path / name}", "--output", tmp_path / "run"]
        assert error_code(skipwise("extend", config_file, *flags, code=2)) == code
        assert not (tmp_path / "run").exists()
    for path, code, hint in (
        (tmp_path / "nothing", "model_not_found", ""),
        ("builtin:tny", "unknown_builtin_model", "'builtin:tiny'"),
    ):
        output = skipwise("extend", config_file, "--set", f"model.path={path}", "--output", tmp_path / "run", code=2)
        assert error_code(output) == code and hint in output


def test_a_directory_that_is_no_run_is_left_alone(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "no Skipwise run" in skipwise("extend", config_file, "--output", tmp_path / "mine", code=2)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_mistakes_are_found_before_anything_heavy_is_imported() -> None:
    """What keeps them under a second: neither torch nor transformers is loaded."""
    code = (
        "import sys; from skipwise.cli.main import app, run\n"
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
        "import sys; from skipwise.cli.main import app, run\n"
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
    assert "resolve_lengths" in done.stderr and "Error: " in done.stderr


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
