"""GGUF files: read by llama.cpp's rules, and completed where its converter leaves the RoPE out."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from skipwise import NTK, Lengths, Linear, Mixed, RopeScaling, UserError, YaRN, YaRNRevised
from skipwise.export.gguf import complete, read_gguf, write_gguf
from skipwise.models.readers import Reading, difference

LENGTHS = Lengths(original=2048, train=2048, target=16384)
HEAD, THETA = 64, 10000.0


def meant_by(scaling: RopeScaling) -> Reading:
    frequencies, factor = scaling.frequencies(HEAD, THETA, LENGTHS)
    return Reading(scaling.name, THETA, frequencies, frequencies, factor, LENGTHS.target)


def as_converted(file: Path, scaling: RopeScaling, architecture: str = "llama") -> None:
    """What llama.cpp's converter writes of a config (conversion/base.py), with one quantised matrix."""
    parameters = scaling.hf_parameters(HEAD, THETA, LENGTHS)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(LENGTHS.target)
    writer.add_embedding_length(256)
    writer.add_head_count(4)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(parameters["rope_theta"])
    writer.add_token_list(["a", "b"])
    kind = parameters["rope_type"]
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
    complete(tmp_path / "model.gguf", meant_by(scaling))
    assert (tmp_path / "model.gguf").read_bytes() == before


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_another_attention_factor_is_added(architecture: str, tmp_path: Path) -> None:
    """llama.cpp computes YaRN's own and takes no other, but multiplies by one."""
    scaling, file = YaRN(attention_factor=1.0), tmp_path / "model.gguf"
    as_converted(file, scaling, architecture)
    assert "attention factor" in str(difference(read_gguf(file), meant_by(scaling)))
    complete(file, meant_by(scaling))
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
    complete(file, meant_by(scaling))
    assert difference(read_gguf(file), meant_by(scaling)) is None
    names = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert names["rope_freqs.weight"].data.shape == (HEAD // 2,)
    assert set(names) == {"rope_freqs.weight", "token_embd.weight"}


def test_architectures_without_factors_are_refused(tmp_path: Path) -> None:
    as_converted(tmp_path / "model.gguf", YaRNRevised(), "qwen2")
    with pytest.raises(UserError, match="takes no factors per dimension for 'qwen2'"):
        complete(tmp_path / "model.gguf", meant_by(YaRNRevised()))


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
    with pytest.raises(UserError, match="does not take this model: pre-tokenizer was not recognized"):
        write_gguf(tmp_path, tmp_path / "x.gguf", "f16", converter, meant_by(YaRN()))
    assert [path.name for path in tmp_path.iterdir()] == ["convert_hf_to_gguf.py"]
