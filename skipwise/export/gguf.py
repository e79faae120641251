"""GGUF files for llama.cpp: made by its own converter, then read back, and completed where that left the RoPE out."""

import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from skipwise.errors import UserError
from skipwise.export.hf_config import completed_config
from skipwise.export.readers import PARITY, Reading, difference
from skipwise.models.windows import full_table
from skipwise.rope.scaling import base_frequencies
from skipwise.rope.yarn import interpolated_share, yarn_attention_factor
from skipwise.utils.files import read_json

CONVERTER = "convert_hf_to_gguf.py"
TYPES = ("f32", "f16", "bf16", "q8_0")
# Architectures whose layers take a factor for each pair of dimensions (llama.cpp, src/models, ROPE_FREQS).
WITH_FACTORS = ("llama", "arcee", "granite", "apertus")
FACTORS = "rope_freqs.weight"


def find_converter(given: Path | None) -> Path:
    """llama.cpp's converter: what is given, in `$LLAMA_CPP`, or in a directory beside.

    Raises:
        UserError: that says where it can be had.
    """
    places = [given, Path(os.environ.get("LLAMA_CPP", "llama.cpp"))]
    for place in places:
        if place is not None:
            file = place / CONVERTER if place.is_dir() else place
            if file.is_file():
                return file
    raise UserError(
        f"--gguf needs llama.cpp's {CONVERTER}. Clone https://github.com/ggml-org/llama.cpp (or unpack the source "
        "distribution of llama-cpp-python), and name its directory with --converter or in LLAMA_CPP.",
        code="converter_not_found",
    )


def convert(model: Path, output: Path, outtype: str, converter: Path) -> None:
    """Run the converter on a model directory.

    Raises:
        UserError: with its last line, when it fails.
    """
    command = [sys.executable, str(converter), str(model), "--outfile", str(output), "--outtype", outtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not output.is_file():
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason given")
        remedy = (
            " Install what it needs: pip install 'skipwise[gguf]'" if last.startswith("ModuleNotFoundError") else ""
        )
        raise UserError(f"llama.cpp's converter does not take this model: {last}.{remedy}", code="converter_failed")


def write_gguf(model: Path, output: Path, outtype: str, converter: Path, meant: Reading) -> None:
    """A GGUF file with which llama.cpp computes the frequencies and the attention factor that were trained with.

    Args:
        model: directory of the model.
        output: the file.
        outtype: of its weights, one of `TYPES`.
        converter: llama.cpp's.
        meant: the RoPE of the model.

    Raises:
        UserError: when llama.cpp cannot be told them.
    """
    if not np.array_equal(meant.short, meant.long):
        raise UserError(
            "llama.cpp keeps one list of frequencies for all texts, but this model has two (rope: mixed). Serve it "
            "with transformers, or extend it with another --rope.",
            code="gguf_needs_one_table",
        )
    rope = full_table(completed_config(read_json(model / "config.json"))["rope_parameters"])
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        convert(model, temporary, outtype, converter)
        complete(temporary, meant, rope)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def complete(file: Path, meant: Reading, rope: Mapping[str, Any]) -> None:
    """Add to a GGUF file what llama.cpp needs to compute the RoPE that is meant.

    Args:
        rope: RoPE parameters of the config.

    Raises:
        UserError: when it would compute something else all the same.
    """
    if difference(read_gguf(file), meant) is None:
        return
    reader = gguf.GGUFReader(file)
    architecture, theta = _value(reader, "general.architecture"), float(rope["rope_theta"])
    kind = str(rope["rope_type"]) if rope["rope_type"] in ("linear", "yarn") else "none"
    changes: dict[str, float | int | str] = {"rope.freq_base": theta, "rope.scaling.type": kind}
    own, factors = 1.0, None
    if kind != "none":
        changes["rope.scaling.factor"] = float(rope["factor"])
    if kind == "yarn":
        own = yarn_attention_factor(float(rope["factor"]))
        changes["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
        changes |= {f"rope.scaling.yarn_{end}": float(rope[end]) for end in ("beta_fast", "beta_slow") if rope.get(end)}
    elif rope["rope_type"] == "longrope" and architecture == "phi3":
        del changes["rope.scaling.type"]  # it has the lists
    elif rope["rope_type"] not in ("linear", "default"):
        factors = _factors(architecture, meant, theta)
    share = meant.attention_factor / own
    if abs(share - 1) > PARITY and meant.sliding_theta is not None:
        raise UserError(
            "llama.cpp has one attention factor for all layers, which would also scale those that see the last tokens "
            "only. Extend this model with YaRN's own attention factor.",
            code="gguf_needs_one_attention_factor",
        )
    _rewrite(file, {**changes, "rope.scaling.attn_factor": share}, factors)
    wrong = difference(read_gguf(file), meant)
    if wrong is not None:
        raise UserError(
            f"llama.cpp would compute something else with this file: {wrong}. Choose another --rope.",
            code="reader_differs_from_training",
        )


def _factors(architecture: str, meant: Reading, theta: float) -> NDArray[np.float32]:
    """By which llama.cpp divides the frequency of each pair of dimensions."""
    if architecture not in WITH_FACTORS:
        raise UserError(
            f"llama.cpp takes no factors per dimension for {architecture!r}, which {meant.rope_type!r} needs. Extend "
            "the model with --rope yarn, linear or ntk.",
            code="gguf_factors_not_supported",
        )
    factors: NDArray[np.float32] = (base_frequencies(2 * meant.long.size, theta) / meant.long).astype(np.float32)
    return factors


def read_gguf(file: Path) -> Reading:
    """The RoPE that llama.cpp computes with, by its rules (llama-model.cpp, llama-context.cpp, ggml-cpu/ops.cpp)."""
    reader = gguf.GGUFReader(file)
    theta, window = float(_value(reader, "rope.freq_base", 10000.0)), int(_value(reader, "context_length"))
    size = _value(reader, "rope.dimension_count") or _value(reader, "attention.key_length")
    size = size or _value(reader, "embedding_length") // _value(reader, "attention.head_count")
    plain = base_frequencies(int(size), theta)
    kind, factor = _value(reader, "rope.scaling.type", "linear"), float(_value(reader, "rope.scaling.factor", 1.0))
    attention = float(_value(reader, "rope.scaling.attn_factor", 1.0))
    scaled: NDArray[np.float64] = plain if kind == "none" else plain / factor
    if kind == "yarn":
        first = int(_value(reader, "rope.scaling.original_context_length", window))
        fast, slow = (
            _value(reader, f"rope.scaling.yarn_beta_{end}", by) for end, by in (("fast", 32.0), ("slow", 1.0))
        )
        ramp = interpolated_share(int(size), theta, first, float(fast), float(slow))
        scaled = plain * (ramp / factor + (1 - ramp))
        attention *= 1.0 + 0.1 * math.log(factor)
    for tensor in reader.tensors:
        if tensor.name in (FACTORS, "rope_factors_long.weight"):
            scaled = scaled / np.asarray(tensor.data, dtype=np.float64)
    near = _value(reader, "rope.freq_base_swa")
    return Reading(str(kind), theta, scaled, scaled, attention, window, None if near is None else float(near))


def _value(reader: Any, key: str, default: Any = None) -> Any:
    """Of a key of the architecture, or of a general one."""
    architecture = reader.get_field("general.architecture").contents()
    field = reader.get_field(key) or reader.get_field(f"{architecture}.{key}")
    return default if field is None else field.contents()


_KINDS = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}


def _rewrite(file: Path, changes: Mapping[str, float | int | str], factors: NDArray[np.float32] | None) -> None:
    """The file once more, with other values, and with factors of RoPE in front of its tensors."""
    reader = gguf.GGUFReader(file)
    architecture = _value(reader, "general.architecture")
    new = {f"{architecture}.{key}": value for key, value in changes.items()}
    temporary = file.with_name(f"{file.name}.more")
    writer = gguf.GGUFWriter(temporary, arch=architecture, endianess=reader.endianess)
    for field in reader.fields.values():
        virtual = field.name.startswith("GGUF.") or field.name == "general.architecture"
        if not virtual and field.name not in new:
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for name, value in new.items():
        writer.add_key_value(name, value, _KINDS[type(value)])
    if factors is not None:
        writer.add_tensor(FACTORS, factors)
    for tensor in reader.tensors:
        if tensor.name != FACTORS:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.replace(file)
