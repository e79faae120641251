"""A model for others: what is written, what stops it, what its card says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from skipwise import Lengths, UserError, YaRN, set_rope_scaling
from skipwise.cli import main as cli
from skipwise.config.files import parse_config
from skipwise.export import publish
from skipwise.export.card import model_card
from skipwise.export.checkpoint import save_checkpoint
from skipwise.export.proof import proof_ids
from skipwise.export.publish import base_licence, check_readers
from skipwise.models.families import family_of
from skipwise.models.rope import live_rope
from tests.commands import error_code, skipwise
from tests.picomodels import LENGTHS, byte_tokenizer, pico_llama, picomodel


def run(*arguments: object) -> int:
    return cli.run(lambda: cli.app([str(one) for one in arguments], standalone_mode=False))


def finished(directory: Path, model: Path, text: Path, rope: str = "yarn") -> Path:
    """A run of one step with its results."""
    config = {
        "model": {"path": str(model)},
        "lengths": {"target": 256},
        "rope": {"name": rope},
        "data": {"source": str(text), "retrieval_share": 0.0},
        "train": {"max_steps": 1, "per_device_train_batch_size": 1, "warmup_steps": 0},
        "evaluate": [{"name": "perplexity", "context_lengths": [64, 256], "stride": 32, "documents": 1}],
        "stages": ["original", "extended"],
    }
    file = directory / f"{rope}.yaml"
    file.write_text(yaml.safe_dump(config))
    assert run("extend", file, "--output", directory / rope) == 0
    return directory / rope


@pytest.fixture
def yarn(tmp_path: Path, pico_directory: Path, text_file: Path) -> Path:
    (pico_directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    return finished(tmp_path, pico_directory, text_file)


WRONG: dict[str, tuple[list[str], str]] = {
    "tied embeddings that differ": ([], "tied_weights_differ"),
    "no number in a row that the proof does not read": ([], "weights_not_finite"),
    "too large for float16": (["--dtype", "float16"], "weights_too_large_for_dtype"),
    "quantized and another dtype": (["--dtype", "bfloat16"], "weights_quantized"),
    "half a tokenizer": ([], "tokenizer_not_readable"),
    "settings of a tokenizer": ([], "tokenizer_not_readable"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_model_is_not_exported(what: str, tmp_path: Path) -> None:
    """All of it was exported and called checked, or ended in "Skipwise did not expect this"."""
    options, code = WRONG[what]
    model = pico_llama(tie_word_embeddings=what.startswith("tied"))
    unread = next(token for token in range(258) if token not in proof_ids(model))
    with torch.no_grad():
        if what.startswith("no number"):
            model.model.embed_tokens.weight[unread] = float("nan")
        elif what.startswith("too large"):
            model.model.embed_tokens.weight[unread] = 1e6
    source = tmp_path / "model"
    model.save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    if what.startswith("tied"):
        weights = load_file(source / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
        save_file(weights, source / "model.safetensors", {"format": "pt"})
    elif what.startswith("quantized"):
        settings = {"quant_method": "fp8", "activation_scheme": "dynamic"}
        change_json(source / "config.json", quantization_config=settings)
    elif what.startswith("half"):
        text = (source / "tokenizer.json").read_text()
        (source / "tokenizer.json").write_text(text[: len(text) // 2])
        change_json(source / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    elif what.startswith("settings"):
        (source / "tokenizer_config.json").write_text("{")
    assert error_code(skipwise("export", source, tmp_path / "out", *options, code=2)) == code
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_what_is_written_opens_with_stock_transformers(yarn: Path, tmp_path: Path, dtype: str | None) -> None:
    assert run("export", yarn, tmp_path / "out", *(["--dtype", dtype] if dtype else [])) == 0
    trained = AutoModelForCausalLM.from_pretrained(yarn / "model", dtype="float32").eval()
    given = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert given.dtype == (getattr(torch, dtype) if dtype else torch.float32)
    ids = torch.arange(2, 202)[None]
    tolerance = 0.0 if dtype is None else 0.05
    before, after = trained(ids).logits, given.float()(ids).logits
    assert float((before - after).abs().max()) <= tolerance * float(before.abs().max())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 256
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_the_card_says_what_one_needs(yarn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", yarn, tmp_path / "out") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "transformers 5 opens it" in said
        and "By rule, not opened: the same RoPE is read by transformers 4, vLLM." in said
    )
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict()["license"] == "apache-2.0"
    assert card.data.to_dict().get("base_model") is None  # a directory of ours is no id of a hub
    text = card.text
    for needed in (
        *("64 to 256 tokens", "method `pose`", "| perplexity | 256 |", "vllm serve out --max-model-len 256"),
        "Trained on 1 window of 64 tokens",
        r"\* longer than the window of that model",
        *("text.jsonl", "Licence: apache-2.0", "Nothing is known of texts longer than 256 tokens"),
    ):
        assert needed in text, needed
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


def test_a_reader_that_would_compute_something_else_stops_it(
    tmp_path: Path, pico_directory: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = finished(tmp_path, pico_directory, text_file, "mixed")
    assert run("export", mixed, tmp_path / "out") == 2
    assert "vLLM would compute something else" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
    assert run("export", mixed, tmp_path / "out", "--without", "vLLM") == 0
    assert "vLLM computes something else with this model" in (tmp_path / "out" / "README.md").read_text()


def test_a_config_that_was_changed_by_hand_stops_it(
    yarn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The parity rule: against what was trained, and by the reader of old configs."""
    before = (yarn / "model" / "config.json").read_text()
    changed = json.loads(before)
    for place in ("rope_parameters", "rope_scaling"):
        changed[place]["attention_factor"] = 2.0  # everywhere, so that readers agree
    (yarn / "model" / "config.json").write_text(json.dumps(changed))
    assert run("export", yarn, tmp_path / "out") == 2
    assert "another RoPE than the model was trained with" in " ".join(capsys.readouterr().err.split())
    new_form_alone = json.loads(before)
    del new_form_alone["rope_theta"], new_form_alone["rope_scaling"]
    (yarn / "model" / "config.json").write_text(json.dumps(new_form_alone))
    assert run("export", yarn, tmp_path / "other") == 0  # the older form is added
    assert (
        json.loads((tmp_path / "other" / "config.json").read_text())["rope_scaling"]
        == json.loads(before)["rope_scaling"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "float8"], "--dtype cannot be 'float8'. Did you mean 'float32'?"),
        (["--gguf", "q4"], "--gguf cannot be 'q4'. Known: bf16, f16, f32, q8_0."),
        (["--without", "vllm"], "Known: transformers 4, transformers 5, vLLM"),
        (["--gguf", "f16", "--converter", "nowhere"], "needs llama.cpp's convert_hf_to_gguf.py"),
    ],
)
def test_unknown_choices_are_refused(
    arguments: list[str], message: str, yarn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    assert run("export", yarn, tmp_path / "out", *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_what_is_no_finished_run_is_refused(pico_directory: Path, tmp_path: Path) -> None:
    (pico_directory / "config.json").unlink()
    assert run("export", pico_directory, tmp_path / "out") == 2
    assert run("export", tmp_path / "nowhere", tmp_path / "out") == 2


def test_an_upload_sends_the_directory(yarn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hub's client in place of the hub."""
    calls: list[tuple[str, Any]] = []
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, name, **kw: calls.append(("create", (name, kw))) or "address"
    )
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **kw: calls.append(("upload", kw)))
    assert run("export", yarn, tmp_path / "out", "--push", "some/model", "--private") == 0
    assert calls[0] == ("create", ("some/model", {"private": True, "exist_ok": True}))
    assert calls[1][1]["folder_path"] == tmp_path / "out"
    assert "vllm serve some/model --max-model-len 256" in (tmp_path / "out" / "README.md").read_text()


def test_the_table_of_windowed_layers_must_be_as_it_was() -> None:
    """Readers agree about a theta that was changed everywhere."""
    model = picomodel(family_of("gemma3_text"))
    set_rope_scaling(model, YaRN(), LENGTHS)
    trained, config = live_rope(model, LENGTHS), model.config.to_dict()
    check_readers(config, trained, ["transformers 5"])
    config["rope_parameters"]["sliding_attention"]["rope_theta"] = 20000.0
    with pytest.raises(UserError, match="another RoPE than the model was trained with"):
        check_readers(config, trained, ["transformers 5"])


def test_the_card_says_what_llama_cpp_leaves_out(
    tmp_path: Path, text_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Of GPT-NeoX its converter writes no RoPE; nothing stops, since no file for it is asked for."""
    save_checkpoint(picomodel(family_of("gpt_neox")), tokenizer, tmp_path / "neox", Lengths(64, 64, 64), card="")
    neox = finished(tmp_path, tmp_path / "neox", text_file)
    assert run("export", neox, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "llama.cpp's converter alone makes something else of this model" in card


def test_without_a_hub_the_directory_stays(yarn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", yarn, tmp_path / "out", "--push", "some/model") == 2
    assert "The hub does not take some/model" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "out" / "config.json").is_file()


def test_what_the_card_says_of_its_base() -> None:
    """Hubs make a link of `base_model`; the embedded model is ours."""
    values = {"lengths": {"target": 512}, "data": "builtin:python"}
    for path, expected in (("some/model", "some/model"), ("gpt2", "gpt2"), ("builtin:tiny", None), ("x.gguf", None)):
        config = parse_config({"model": {"path": path}, **values})
        assert ModelCard(model_card(config, Lengths(256, 256, 512))).data.to_dict().get("base_model") == expected
    assert base_licence("builtin:tiny") == "apache-2.0"


def test_a_base_that_was_a_directory_does_not_become_a_link(
    yarn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exported from elsewhere, `models/base` looks like a name on a hub."""
    resolved = (yarn / "resolved.yaml").read_text()
    (yarn / "resolved.yaml").write_text(resolved.replace(str(tmp_path / "pico"), "models/base"))
    assert run("export", yarn, tmp_path / "out") == 0
    assert ModelCard.load(tmp_path / "out" / "README.md").data.to_dict().get("base_model") is None
    assert "of `models/base` was extended" in (tmp_path / "out" / "README.md").read_text()


def test_a_base_model_without_a_licence(tmp_path: Path) -> None:
    assert base_licence(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: [a\n---\n")
    assert base_licence(str(tmp_path)) is None
    assert publish.base_licence("nobody/nothing") is None
