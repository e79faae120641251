"""What is written is read back by plain transformers and compared: after the first step of a training, not the last."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerFast
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from skipwise import Lengths, UserError, YaRN, YaRNRevised, set_rope_scaling
from skipwise.export.checkpoint import save_checkpoint
from skipwise.export.proof import proof_loss, prove, prove_copy
from skipwise.models.rope import rotary_tables
from skipwise.workflows import save as saving
from tests.commands import error_code, skipwise
from tests.picomodels import WINDOW, byte_tokenizer

LENGTHS = Lengths(WINDOW, WINDOW, 8 * WINDOW)


@pytest.fixture
def written(tmp_path: Path, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    set_rope_scaling(llama, YaRN(), LENGTHS)
    save_checkpoint(llama, tokenizer, tmp_path / "model", LENGTHS, card="")
    return tmp_path / "model"


def change_config(path: Path, **keys: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **keys}))


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(path / "model.safetensors")), path / "model.safetensors", {"format": "pt"})


def test_what_was_written_well_passes(written: Path, llama: PreTrainedModel) -> None:
    before = {file: file.read_bytes() for file in written.iterdir()}
    prove(written, proof_loss(llama), byte_tokenizer(), rotary_tables(llama), LENGTHS)
    assert {file: file.read_bytes() for file in written.iterdir()} == before


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a weight less": lambda path: change_weights(
        path, lambda weights: {name: own for name, own in weights.items() if "layers.0.mlp.up" not in name}
    ),
    "another weight": lambda path: change_weights(
        path, lambda weights: {**weights, "model.embed_tokens.weight": weights["model.embed_tokens.weight"] * 1.5}
    ),
    "another scaling": lambda path: change_config(
        path, rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    ),
    "a config that is none": lambda path: (path / "config.json").write_text("{") and None,
    "no tokenizer": lambda path: [file.unlink() for file in path.glob("tokenizer*")] and None,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_another_model_is_found(name: str, written: Path, llama: PreTrainedModel) -> None:
    DAMAGE[name](written)
    with pytest.raises(UserError) as caught:
        prove(written, proof_loss(llama), byte_tokenizer(), rotary_tables(llama), LENGTHS)
    assert caught.value.code == "written_model_differs"


def test_another_tokenizer_is_found(written: Path, llama: PreTrainedModel) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["words", "sample"])
    with pytest.raises(UserError, match="tokenizer"):
        prove(written, proof_loss(llama), tokenizer, rotary_tables(llama), LENGTHS)


def test_a_copy_with_another_scaling_is_found(written: Path, tmp_path: Path) -> None:
    """On the few tokens of the loss it may be the same."""
    shutil.copytree(written, tmp_path / "copy")
    prove_copy(written, tmp_path / "copy")
    config = json.loads((written / "config.json").read_text())
    changed = {**config["rope_parameters"], "rope_theta": 10500.0}
    change_config(tmp_path / "copy", rope_scaling=changed, rope_parameters=changed, rope_theta=10500.0)
    with pytest.raises(UserError) as caught:
        prove_copy(written, tmp_path / "copy")
    assert caught.value.code == "written_model_differs"


def test_a_family_that_cannot_be_written_is_found_after_one_step(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was found after the last one. Nothing of the trial is left."""
    steps = []

    def lossy(model: PreTrainedModel, tokenizer: Any, path: Path, *more: Any, **keywords: Any) -> None:
        steps.append(path)
        save_checkpoint(model, tokenizer, path, *more, **keywords)
        DAMAGE["another weight"](path)

    monkeypatch.setattr(saving, "save_checkpoint", lossy)
    run = tmp_path / "run"
    said = skipwise("extend", config_file, "--output", run, "--set", "evaluate=[]", code=2)
    assert error_code(said) == "written_model_differs" and len(steps) == 1
    logged = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()] if (
        run / "train.jsonl").exists() else []  # fmt: skip
    assert all(line["step"] <= 1 for line in logged)
    assert not list(run.glob(".proof*")) and not (run / "model").exists()


def test_an_interpolated_model_that_is_another_one_is_not_left_for_a_resumed_run(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stayed where the run's model belongs, and the same command with --resume took it and ended well."""

    def lossy(model: PreTrainedModel, tokenizer: Any, path: Path, *more: Any, **keywords: Any) -> None:
        save_checkpoint(model, tokenizer, path, *more, **keywords)
        DAMAGE["another weight"](path)

    run = tmp_path / "run"
    command = ["extend", config_file, "--output", run, "--set", "evaluate=[]", "--method", "interpolate"]
    monkeypatch.setattr(saving, "save_checkpoint", lossy)
    assert error_code(skipwise(*command, code=2)) == "written_model_differs" and not (run / "model").exists()
    assert error_code(skipwise(*command, "--resume", code=2)) == "written_model_differs"
    monkeypatch.setattr(saving, "save_checkpoint", save_checkpoint)
    skipwise(*command, "--resume")
    assert (run / "model" / "config.json").is_file() and not list(run.glob(".proof*"))


def test_a_run_with_attention_in_16_bits_is_proven_too(config_file: Path, tmp_path: Path) -> None:
    """FlashAttention does not take float32, as weights are while training: what looks at these without autocast
    ended in an error.
    """
    dtypes = set()

    def picky(module: torch.nn.Module, query: torch.Tensor, *more: Any, **keywords: Any) -> Any:
        # transformers casts for it where autocast is on.
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
        dtypes.add(dtype)
        if dtype == torch.float32:
            raise RuntimeError("only fp16 and bf16")
        return sdpa_attention_forward(module, query, *more, **keywords)

    AttentionInterface.register("picky", picky)
    AttentionMaskInterface.register("picky", sdpa_mask)
    settings = ["model.attn_implementation=picky", "model.dtype=bfloat16", "evaluate=[]"]
    more = [part for setting in settings for part in ("--set", setting)]
    said = skipwise("extend", config_file, "--output", tmp_path / "run", *more)
    assert "read back" in said and dtypes == {torch.bfloat16}


@pytest.mark.parametrize("rounded", [False, True], ids=["as it is", "rounded"])
@pytest.mark.parametrize("what", ["nothing", "another weight", "longer list"])
def test_copies_are_as_near_as_their_rounding_allows(
    what: str, rounded: bool, tmp_path: Path, llama: PreTrainedModel
) -> None:
    """Five percent of the loss were allowed where nothing is rounded, and a list for longer texts was not looked at."""
    set_rope_scaling(llama, YaRNRevised(), LENGTHS)
    source, copy = tmp_path / "model", tmp_path / "copy"
    save_checkpoint(llama, byte_tokenizer(), source, LENGTHS, card="")
    shutil.copytree(source, copy)
    if what == "another weight":  # whose loss is less than five percent away
        DAMAGE[what](copy)
    elif what == "longer list":
        rope = json.loads((copy / "config.json").read_text())["rope_parameters"]
        rope["long_factor"] = [2 * factor for factor in rope["long_factor"]]
        change_config(copy, rope_parameters=rope, rope_scaling=rope)
    if what == "longer list" or (what == "another weight" and not rounded):
        with pytest.raises(UserError) as caught:
            prove_copy(source, copy, rounded)
        assert caught.value.code == "written_model_differs"
    else:
        prove_copy(source, copy, rounded)


LORA = ["--set", "train.lora.r=2", "--set", "train.lora.lora_dropout=0.3"]  # random at every step


def test_what_transformers_does_not_write_is_said_after_one_step(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As "did not expect this", and after the last one."""
    asked = []

    def refuse(model: PreTrainedModel, path: Path, **_: Any) -> None:
        asked.append(path)
        raise RuntimeError("Some tensors share memory")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", refuse)
    said = skipwise("extend", config_file, "--output", tmp_path / "run", "--set", "evaluate=[]", code=2)
    assert error_code(said) == "model_not_written" and "Some tensors share memory" in said and len(asked) == 1


@pytest.mark.parametrize("more", [[], LORA], ids=["full", "lora"])
def test_the_proof_changes_nothing_that_is_trained(
    more: list[str], config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(saving, "prove_trained", lambda *_: None)
        said = skipwise("extend", config_file, "--output", tmp_path / name, "--set", "evaluate=[]", *more)
        assert ("read back" in said) == (name == "with")
        weights.append(load_file(tmp_path / name / "model" / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(own, weights[1][key]) for key, own in weights[0].items())
