"""GGUF files: read by llama.cpp's rules, and completed where its converter leaves the RoPE out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import LlamaConfig

from skipwise import NTK, Lengths, Linear, Mixed, RopeScaling, UserError, YaRN, YaRNRevised
from skipwise.export.gguf import complete, read_gguf, write_gguf
from skipwise.export.readers import Reading, difference

LENGTHS = Lengths(original=2048, train=2048, target=16384)
HEAD, THETA = 64, 10000.0


def meant_by(scaling: RopeScaling) -> Reading:
    frequencies, factor = scaling.frequencies(HEAD, THETA, LENGTHS)
    return Reading(scaling.name, THETA, frequencies, frequencies, factor, LENGTHS.target)


def parameters_of(scaling: RopeScaling) -> dict[str, Any]:
    return scaling.hf_parameters(HEAD, THETA, LENGTHS)


def as_converted(file: Path, scaling: RopeScaling, architecture: str = "llama", with_rope: bool = True) -> None:
    """What llama.cpp's converter writes of a config (conversion/base.py), with one quantised matrix.

    Args:
        with_rope: False for families whose converter writes no RoPE, nor its dimension.
    """
    parameters = scaling.hf_parameters(HEAD, THETA, LENGTHS)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(LENGTHS.target)
    writer.add_embedding_length(256)
    writer.add_head_count(4) if with_rope else None
    writer.add_token_list(["a", "b"])
    kind = parameters["rope_type"] if with_rope else "lost"
    if with_rope:
        writer.add_rope_dimension_count(HEAD)
        writer.add_rope_freq_base(parameters["rope_theta"])
    else:
        writer.add_key_length(HEAD)
        writer.add_head_count(8)  # a head is not the width over their number
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(parameters["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_attn_factor(parameters["attention_factor"])
        writer.add_rope_scaling_yarn_beta_fast(parameters["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(parameters["beta_slow"])
    if kind == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    matrix = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("token_embd.weight", gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q8_0),
                      raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def field(file: Path, key: str) -> Any:
    found = gguf.GGUFReader(file).get_field(key)
    return None if found is None else found.contents()


@pytest.mark.parametrize("scaling", [YaRN(), YaRN(beta_fast=8.0), Linear(), NTK()], ids=lambda one: one.name)
def test_what_the_converter_writes_is_enough_for_these(scaling: RopeScaling, tmp_path: Path) -> None:
    as_converted(tmp_path / "model.gguf", scaling)
    before = (tmp_path / "model.gguf").read_bytes()
    assert difference(read_gguf(tmp_path / "model.gguf"), meant_by(scaling)) is None
    complete(tmp_path / "model.gguf", meant_by(scaling), parameters_of(scaling))
    assert (tmp_path / "model.gguf").read_bytes() == before


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_another_attention_factor_is_added(architecture: str, tmp_path: Path) -> None:
    """llama.cpp computes YaRN's own and takes no other, but multiplies by one."""
    scaling, file = YaRN(attention_factor=1.0), tmp_path / "model.gguf"
    as_converted(file, scaling, architecture)
    assert "attention factor" in str(difference(read_gguf(file), meant_by(scaling)))
    complete(file, meant_by(scaling), parameters_of(scaling))
    assert difference(read_gguf(file), meant_by(scaling)) is None
    assert field(file, f"{architecture}.rope.scaling.attn_factor") == pytest.approx(1 / 1.2079441, rel=1e-6)
    tensor = gguf.GGUFReader(file).tensors[0]
    np.testing.assert_allclose(gguf.quants.dequantize(tensor.data, tensor.tensor_type).ravel(), np.arange(64), atol=0.3)
    assert field(file, "tokenizer.ggml.tokens") == ["a", "b"]


def test_factors_per_dimension_are_added(tmp_path: Path) -> None:
    """In place of a list that the converter drops: llama.cpp would compute with the frequencies of pretraining."""
    scaling, file = YaRNRevised(), tmp_path / "model.gguf"
    as_converted(file, scaling)
    assert "times apart" in str(difference(read_gguf(file), meant_by(scaling)))
    complete(file, meant_by(scaling), parameters_of(scaling))
    assert difference(read_gguf(file), meant_by(scaling)) is None
    names = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert names["rope_freqs.weight"].data.shape == (HEAD // 2,)
    assert set(names) == {"rope_freqs.weight", "token_embd.weight"}


@pytest.mark.parametrize("scaling", [YaRN(), YaRN(attention_factor=1.1), Linear(), NTK()], ids=str)
def test_what_the_converter_left_out_is_added(scaling: RopeScaling, tmp_path: Path) -> None:
    """Of GPT-NeoX, Phi, Falcon, StableLM and Gemma it writes neither theta nor scaling."""
    file = tmp_path / "model.gguf"
    as_converted(file, scaling, "gptneox", with_rope=False)
    assert difference(read_gguf(file), meant_by(scaling)) is not None
    complete(file, meant_by(scaling), parameters_of(scaling))
    assert difference(read_gguf(file), meant_by(scaling)) is None


def test_windowed_layers_would_be_scaled_as_well(tmp_path: Path) -> None:
    """Gemma 3: one attention factor for layers of both kinds."""
    as_converted(tmp_path / "model.gguf", YaRN(attention_factor=1.0), "gemma3")
    meant = replace(meant_by(YaRN(attention_factor=1.0)), sliding_theta=10000.0)
    with pytest.raises(UserError, match="one attention factor for all layers"):
        complete(tmp_path / "model.gguf", meant, parameters_of(YaRN(attention_factor=1.0)))


def test_architectures_without_factors_are_refused(tmp_path: Path) -> None:
    as_converted(tmp_path / "model.gguf", YaRNRevised(), "qwen2")
    with pytest.raises(UserError, match="takes no factors per dimension for 'qwen2'"):
        complete(tmp_path / "model.gguf", meant_by(YaRNRevised()), parameters_of(YaRNRevised()))


def test_two_lists_are_refused(tmp_path: Path) -> None:
    short, _ = Mixed().short_frequencies(HEAD, THETA, LENGTHS)
    long, factor = Mixed().frequencies(HEAD, THETA, LENGTHS)
    with pytest.raises(UserError, match="one list of frequencies"):
        write_gguf(
            tmp_path, tmp_path / "x.gguf", "f16", tmp_path, Reading("longrope", THETA, short, long, factor, 16384)
        )


def test_what_the_converter_says_is_passed_on(tmp_path: Path) -> None:
    converter = tmp_path / "convert_hf_to_gguf.py"
    converter.write_text("import sys\nsys.exit('pre-tokenizer was not recognized')\n")
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not take this model: pre-tokenizer was not recognized"):
        write_gguf(tmp_path, tmp_path / "x.gguf", "f16", converter, meant_by(YaRN()))
    assert not [path for path in tmp_path.iterdir() if "gguf" in path.suffix or "tmp" in path.suffix]
