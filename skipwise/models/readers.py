"""What each program that reads a `config.json` takes for the RoPE of a model: frequencies, attention factor, window.

The rules are those of the programs' sources (named at each reader), written down once more, so that a checkpoint can be
checked against all of them where none is installed. No torch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipwise.errors import UserError
from skipwise.models.families import family_of
from skipwise.models.shape import FAR, WINDOWED, far_table
from skipwise.rope.scaling import base_frequencies
from skipwise.rope.yarn import interpolated_share, yarn_attention_factor

# Readers compute in float32, from numbers written in decimal.
PARITY = 1e-6
# What a reader takes for theta where it finds none.
DEFAULT_THETA = 10000.0
Table = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Reading:
    """The RoPE that a reader computes with, in layers that see all of the text.

    Attributes:
        rope_type: of the scaling, as it understood it.
        theta: base of the frequencies.
        short, long: float64[d/2], inverse frequencies of a text that fits into the first window, and of a longer one.
        attention_factor: on cosines and sines.
        window: how many tokens it lets a text have, if it is told nothing else.
        near_theta: base of windowed layers; None where there are none with a table of their own.
    """

    rope_type: str
    theta: float
    short: Table
    long: Table
    attention_factor: float
    window: int
    near_theta: float | None = None


class UnreadableError(UserError):
    """A reader stops at this config."""


def difference(one: Reading, other: Reading) -> str | None:
    """In what two readings differ by more than `PARITY`, in a few words; None if in nothing that is computed with."""
    if one.long.shape != other.long.shape:
        return f"{2 * one.long.size} rotated dimensions, and not {2 * other.long.size}"
    for name, a, b in (("", one.long, other.long), (" of short texts", one.short, other.short)):
        apart = float(np.maximum(a / b, b / a).max()) - 1
        if apart > PARITY:
            return f"frequencies{name} up to {1 + apart:.6g} times apart"
    if abs(one.attention_factor - other.attention_factor) > PARITY:
        return f"attention factor {one.attention_factor:.4f}, and not {other.attention_factor:.4f}"
    one_near, other_near = one.near_theta or 0.0, other.near_theta or 0.0
    if not math.isclose(one_near, other_near, rel_tol=PARITY):
        return f"theta of windowed layers {one.near_theta}, and not {other.near_theta}"
    return None


def transformers_5(config: Mapping[str, Any]) -> Reading:
    """`rope_scaling` if it is there, else `rope_parameters`; theta inside, else beside, else a default
    (transformers 5.23, modeling_rope_utils.py, `convert_rope_params_to_dict`).
    """
    config = _language_model(config)
    names = family_of(config["model_type"]).legacy_names
    theta = config.get(names.get("rope_theta") or "rope_theta")
    tables = config.get("rope_parameters") or {}
    if isinstance(tables.get(FAR), Mapping):  # a newer rope_scaling goes over what layers that see far have
        scaling = config.get("rope_scaling") or {}
        far, near = {**tables[FAR], **scaling}, tables.get(WINDOWED) or {}
        reading = _reading(config, {"rope_theta": theta, **far})
        return _with_near(reading, near.get("rope_theta", config.get(names.get("near_theta") or "")))
    rope = {"rope_theta": theta, **(config.get("rope_scaling") or tables)}
    return _reading(config, rope)


def transformers_4(config: Mapping[str, Any]) -> Reading:
    """`rope_theta` and `rope_scaling`, and nothing else (transformers 4.57, modeling_rope_utils.py)."""
    config = _language_model(config)
    names = family_of(config["model_type"]).legacy_names
    if names.get("rope_scaling", "") is None and _type(far_table(config.get("rope_parameters") or {})) != "default":
        raise UnreadableError("this family has no rope_scaling there")
    theta = config.get(names.get("rope_theta") or "rope_theta")
    share = config.get(names.get("partial_rotary_factor") or "partial_rotary_factor")
    rope = {"rope_theta": theta, **(config.get("rope_scaling") or {})}
    if share is not None:
        rope["partial_rotary_factor"] = share
    reading = _reading(config, rope)
    nested = isinstance((config.get("rope_parameters") or {}).get(FAR), Mapping)
    return _with_near(reading, config.get(names.get("near_theta") or "rope_theta")) if nested else reading


def vllm(config: Mapping[str, Any]) -> Reading:
    """What transformers 5 makes of the file, with rules of its own for `longrope`: two keys for the attention factor,
    and the long list for all texts as soon as the server's window is longer than the first one (vLLM 0.32,
    rotary_embedding/__init__.py, phi3_long_rope_scaled_rope.py and config/model.py).
    """
    read = transformers_5(config)
    config = _language_model(config)
    rope = _rope_of(config)
    window = int(config["max_position_embeddings"])
    if read.rope_type == "longrope":
        first = int(rope["original_max_position_embeddings"])
        default = math.sqrt(1 + math.log(window / first) / math.log(first)) if window > first else 1.0
        long, short = (float(rope.get(f"{which}_mscale", default)) for which in ("long", "short"))
        window = int(config.get("original_max_position_embeddings") or window)
        if abs(long - short) > PARITY:
            raise UnreadableError(f"two attention factors, {short:.4f} and {long:.4f}")
        return replace(read, short=read.long, attention_factor=long, window=window)
    if read.rope_type in ("linear", "dynamic", "default") and "gemma3" not in config["model_type"]:
        window = int(window * float(rope.get("factor") or 1.0))
    return replace(read, window=window)


def llama_cpp(config: Mapping[str, Any]) -> Reading:
    """What its converter writes and its kernels make of that: YaRN always with its own attention factor, per-dimension
    factors only for Phi-3 (llama.cpp of llama-cpp-python 0.3.36, conversion/base.py, conversion/phi.py and
    src/llama-context.cpp). `skipwise export --gguf` writes what it leaves out.
    """
    config = _language_model(config)
    rope = _rope_of(config)
    rope.setdefault("rope_theta", _legacy_theta(config))
    read = _reading(config, rope)
    theta, window = read.theta, int(config["max_position_embeddings"])
    factor = read.attention_factor
    if read.rope_type == "yarn":
        factor = yarn_attention_factor(float(rope["factor"]))
    elif read.rope_type == "longrope" and config["model_type"] == "phi3":
        first = int(rope["original_max_position_embeddings"])
        factor = math.sqrt(1 + math.log(window / first) / math.log(first)) if window > first else 1.0
    elif read.rope_type == "longrope":
        plain = base_frequencies(2 * read.long.size, theta)
        return replace(read, short=plain, long=plain, attention_factor=1.0)
    near = (config.get("rope_parameters") or {}).get(WINDOWED) or {}
    return _with_near(replace(read, attention_factor=factor), near.get("rope_theta"))


READERS: dict[str, Callable[[Mapping[str, Any]], Reading]] = {
    "transformers 5": transformers_5,
    "transformers 4": transformers_4,
    "vLLM": vllm,
    "llama.cpp": llama_cpp,
}


def _language_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Multimodal models nest it."""
    return config.get("text_config") or config


def _rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The RoPE parameters of layers that see far, wherever they are."""
    return dict(far_table(config.get("rope_parameters") or config.get("rope_scaling") or {}))


def _legacy_theta(config: Mapping[str, Any]) -> Any:
    names = ("global_rope_theta", "rope_theta", "rotary_emb_base")
    return next((config[name] for name in names if name in config), None)


def _with_near(reading: Reading, theta: Any) -> Reading:
    return replace(reading, near_theta=None if theta is None else float(theta))


def _type(rope: Mapping[str, Any]) -> str:
    name = str(rope.get("rope_type") or rope.get("type") or "default")
    return {"su": "longrope"}.get(name, name)


def _reading(config: Mapping[str, Any], rope: Mapping[str, Any]) -> Reading:
    """Frequencies and attention factor that all of them compute from the same dictionary."""
    kind, theta = _type(rope), float(rope.get("rope_theta") or DEFAULT_THETA)
    window = int(config["max_position_embeddings"])
    if kind not in _FREQUENCIES:
        raise UnreadableError(f"the rope type {kind!r} is not known")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    plain = base_frequencies(int(head_dim * float(rope.get("partial_rotary_factor") or 1.0)), theta)
    first = int(
        config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or window
    )
    try:
        short, long, factor = _FREQUENCIES[kind](plain, rope, theta, first, window)
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableError(f"{type(error).__name__}: {error}") from error
    return Reading(kind, theta, short, long, factor, window)


Computed = tuple[Table, Table, float]


def _default(plain: Table, rope: Mapping[str, Any], theta: float, first: int, window: int) -> Computed:
    return plain, plain, 1.0


def _linear(plain: Table, rope: Mapping[str, Any], theta: float, first: int, window: int) -> Computed:
    scaled = plain / float(rope["factor"])
    return scaled, scaled, 1.0


def _yarn(plain: Table, rope: Mapping[str, Any], theta: float, first: int, window: int) -> Computed:
    factor = float(rope.get("factor") or window / first)
    fast, slow = float(rope.get("beta_fast") or 32), float(rope.get("beta_slow") or 1)
    ramp = interpolated_share(2 * plain.size, theta, first, fast, slow)
    scaled = plain * (ramp / factor + (1 - ramp))
    attention = rope.get("attention_factor")
    if attention is None:
        inner, outer = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = yarn_attention_factor(factor)
        if inner and outer:
            attention = (0.1 * inner * math.log(factor) + 1) / (0.1 * outer * math.log(factor) + 1)
    return scaled, scaled, float(attention)


def _longrope(plain: Table, rope: Mapping[str, Any], theta: float, first: int, window: int) -> Computed:
    short, long = (plain / np.array(rope[f"{which}_factor"], dtype=np.float64) for which in ("short", "long"))
    factor, attention = float(rope.get("factor") or window / first), rope.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(first)) if factor > 1 else 1.0
    return short, long, float(attention)


def _llama3(plain: Table, rope: Mapping[str, Any], theta: float, first: int, window: int) -> Computed:
    """Slow dimensions by the factor, fast ones not, a ramp by wavelength between (Llama 3.1)."""
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = first * plain / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    scaled = plain * ((1 - kept) / factor + kept)
    return scaled, scaled, 1.0


def _dynamic(plain: Table, rope: Mapping[str, Any], theta: float, first: int, window: int) -> Computed:
    """At its window, where it has not begun to change anything."""
    float(rope["factor"])
    return plain, plain, 1.0


_FREQUENCIES: dict[str, Callable[[Table, Mapping[str, Any], float, int, int], Computed]] = {
    "default": _default,
    "linear": _linear,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "dynamic": _dynamic,
}
