"""Loading: .gguf files give their weights back, and ordinary checkpoints; names that lead nowhere."""

import json
import logging
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from skipwise.cli.terminal import OneLine
from skipwise.errors import UserError
from skipwise.models.config import ModelConfig
from skipwise.models.load import check_vocabulary, load_model, load_tokenizer
from skipwise.models.locate import model_location
from tests.commands import error_code, skipwise
from tests.picomodels import VOCABULARY, WINDOW, byte_tokenizer, pico_llama
from tests.processes import command, started

# Names in the GGUF format for those of transformers.
_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """llama.cpp rotates neighbours instead of halves: rows of each head in that order."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """The model with float32 weights and a tokenizer of bytes and `th`, in llama.cpp's format."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(WINDOW)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = byte_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(tokens, key=tokens.__getitem__), "th"])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in model.state_dict().items():
        weight = tensor.float().numpy()
        if name.startswith("model.layers."):
            layer, rest = name.removeprefix("model.layers.").split(".", 1)
            module = rest.removesuffix(".weight")
            if module.endswith(("q_proj", "k_proj")):
                heads = config.num_attention_heads if "q_proj" in module else config.num_key_value_heads
                weight = interleaved(weight, heads)
            name = f"blk.{layer}.{_NAMES[module]}.weight"
        else:
            name = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}.get(name, "output")
            name += ".weight"
        writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_tokens_that_no_text_has_are_no_reason_to_refuse() -> None:
    """A tokenizer with an added token that is not used, or with a hole in its ids."""
    model, tokenizer = pico_llama(), byte_tokenizer()
    tokenizer.add_tokens(["<never-used>"])
    assert len(tokenizer) > model.config.vocab_size
    check_vocabulary(model, tokenizer)
    check_vocabulary(model, tokenizer, used=model.config.vocab_size - 1)
    for build in (
        lambda: check_vocabulary(model, tokenizer, used=model.config.vocab_size),
        lambda: check_vocabulary(pico_llama(vocab_size=60), tokenizer),
    ):
        with pytest.raises(UserError) as caught:
            build()
        assert caught.value.code == "vocabulary_mismatch"
    tokenizer.add_special_tokens({"eos_token": "<end>"})  # which ends every document
    with pytest.raises(UserError):
        check_vocabulary(model, tokenizer)


def test_tokens_of_a_chat_count_where_there_is_one(tmp_path: Path) -> None:
    """A model whose embeddings were not enlarged for them: it ended in an error of an index."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<turn>"])
    tokenizer.chat_template = "{% for message in messages %}<turn>{{ message['content'] }}{% endfor %}"
    pico_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    asked = ["evaluate", tmp_path / "model", "--only", "passkey", "--lengths", "400"]
    said = skipwise(*asked, "--chat", "--output", tmp_path / "chat", code=2)
    assert error_code(said) == "vocabulary_mismatch"
    skipwise(
        *asked, "--output", tmp_path / "plain", "--set", "evaluate=[{name: passkey, context_lengths: [400], trials: 1}]"
    )


@torch.no_grad()
def test_a_gguf_file_gives_the_same_model_and_saves_as_an_ordinary_one(tmp_path: Path) -> None:
    model = pico_llama(vocab_size=VOCABULARY + 1)
    write_gguf(model, tmp_path / "pico.gguf")
    config = ModelConfig(path=str(tmp_path / "pico.gguf"))
    loaded, ids = load_model(config, torch.device("cpu")), torch.arange(2, 2 + WINDOW)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert load_tokenizer(config).tokenize("the key") == ["th", "e", "Ġ", "k", "e", "y"]
    loaded.save_pretrained(tmp_path / "saved")
    # Left in the config, it breaks vLLM and the conversion back to GGUF.
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(ids).logits, loaded(ids).logits)


def test_a_damaged_gguf_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(UserError, match=r"\.gguf file, but cannot be loaded"):
        load_model(ModelConfig(path=str(tmp_path / "broken.gguf")), torch.device("cpu"))


def test_a_run_that_is_not_there_is_not_looked_for_on_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It took half a minute, and the network was blamed."""
    for name in ("tiny-4k-pose/model", "another"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"runs/tiny-4k does not exist\. Did you mean 'runs/tiny-4k-pose/model'\?"):
        model_location("runs/tiny-4k")
    with pytest.raises(UserError, match=r"runs/xyz does not exist\.$"):
        model_location("runs/xyz")
    assert model_location("somebody/tiny-4k") == "somebody/tiny-4k"


def ask_a_hub_that_is_away(arguments: list[str]) -> None:
    """A command whose hub has nobody at its address, and does not wait between its tries."""
    constants.HF_HUB_OFFLINE, constants.ENDPOINT = False, "http://127.0.0.1:9"
    time.sleep = lambda seconds: print(f"pause of {seconds:g} s")
    command(arguments)


def test_a_hub_that_is_away_is_said_once(tmp_path: Path) -> None:
    """It said two lines for each of six tries."""
    with started(ask_a_hub_that_is_away, ["doctor", "somebody/nothing"], tmp_path / "printed") as process:
        assert process.wait() == 2
        printed = process.printed
    assert printed.count("pause of") > 1
    assert printed.count("The hub does not answer") == 1 and "Retrying" not in printed
    assert error_code(printed) == "model_not_found"


def test_what_a_hub_answers_is_shown() -> None:
    one_line, said = OneLine(), []
    for words in ("HTTP Error 429 thrown while requesting GET x", "Retrying in 1s [Retry 1/5].", "Other words"):
        record = logging.LogRecord("hub", logging.WARNING, "", 0, words, (), None)
        said += [record.getMessage()] if one_line.filter(record) else []
    assert said == ["HTTP Error 429 thrown while requesting GET x", "Retrying in 1s [Retry 1/5].", "Other words"]
