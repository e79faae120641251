"""What each program that reads a `config.json` takes for the RoPE of a model: frequencies, attention factor, window.

transformers 5 is asked itself. The rules of the others are those of their sources (named at each), written down once
more, so that a checkpoint can be checked against all of them where none is installed. No torch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipwise.errors import UserError
from skipwise.export.hf_config import completed_config, default_theta
from skipwise.models.families import family_of, is_tested
from skipwise.models.transformers4 import MODEL_TYPES, ONE_THETA, ONLY_KEYS, WITHOUT_SCALING
from skipwise.models.windows import FULL, SLIDING, full_table
from skipwise.rope.scaling import base_frequencies
from skipwise.rope.yarn import interpolated_share, yarn_attention_factor

# Readers compute in float32, from numbers written in decimal.
PARITY = 1e-6
# Codes of readers that do not read a model at all, which is nothing wrong with it.
NO_READING = ("reader_lacks_model", "reader_not_known")
# What llama.cpp takes for theta where its file has none.
PLAIN_THETA = 10000.0
Table = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Reading:
    """The RoPE that a reader computes with, in layers that see all of the text.

    Attributes:
        rope_type: of the scaling, as it understood it.
        theta: base of the frequencies.
        short, long: float64[d/2], inverse frequencies of a text that fits into the original window and of a longer
            one.
        attention_factor: on cosines and sines.
        window: how many tokens it lets a text have, if it is told nothing else.
        sliding_theta: base of windowed layers; None where there are none with a table of their own.
    """

    rope_type: str
    theta: float
    short: Table
    long: Table
    attention_factor: float
    window: int
    sliding_theta: float | None = None


class UnreadableError(UserError):
    """A reader stops at this config."""


def difference(one: Reading, other: Reading) -> str | None:
    """In what two readings differ by more than `PARITY`, in a few words; None if in nothing that is computed with."""
    if one.long.shape != other.long.shape:
        return f"{2 * one.long.size} rotated dimensions, and not {2 * other.long.size}"
    for name, a, b in (("", one.long, other.long), (" of short texts", one.short, other.short)):
        with np.errstate(all="ignore"):
            apart = float(np.maximum(a / b, b / a).max())
        if not apart <= 1 + PARITY:  # nor where it is no number
            return f"frequencies{name} up to {apart:.6g} times apart"
    if not abs(one.attention_factor - other.attention_factor) <= PARITY:
        return f"attention factor {one.attention_factor:.4f}, and not {other.attention_factor:.4f}"
    if not math.isclose(one.sliding_theta or 0.0, other.sliding_theta or 0.0, rel_tol=PARITY):
        return f"theta of windowed layers {one.sliding_theta}, and not {other.sliding_theta}"
    return None


def transformers_5(config: Mapping[str, Any]) -> Reading:
    """What its class makes of the file."""
    return reading_of(completed_config(config))


def transformers_4(config: Mapping[str, Any]) -> Reading:
    """`rope_theta` and `rope_scaling` by their older names, and nothing else; the original window of `longrope` only
    from beside `rope_scaling` (transformers 4.57, modeling_rope_utils.py).
    """
    given = config.get("text_config") or config
    hf = completed_config(config)
    if str(config.get("model_type")) not in MODEL_TYPES:
        raise UnreadableError("it has no such model", code="reader_lacks_model")
    if full_table(hf["rope_parameters"]) is not hf["rope_parameters"] and not is_tested(hf["model_type"]):
        raise UnreadableError("how it reads the tables of this family is not known", code="reader_not_known")
    names = family_of(hf["model_type"]).legacy_names
    defaults = default_theta(config)
    new = full_table(hf["rope_parameters"])
    without = names.get("rope_scaling", "") is None or hf["model_type"] in WITHOUT_SCALING
    if without and _type(new) != "default":
        raise UnreadableError("this family has no rope_scaling there", code="reader_lacks_scaling")
    scaling = given.get("rope_scaling") or {}
    keys = ONLY_KEYS.get(hf["model_type"], tuple(scaling))
    if scaling and set(scaling) != set(keys):
        raise UnreadableError(
            f"its class takes a rope_scaling with {', '.join(keys)} and nothing else", code="reader_takes_few_keys"
        )
    rope = {
        "rope_theta": given.get(names.get("rope_theta") or "rope_theta", full_table(defaults).get("rope_theta")),
        "partial_rotary_factor": new.get("partial_rotary_factor"),
        **scaling,
    }
    outside = given.get("original_max_position_embeddings")
    hf = {**hf, "original_max_position_embeddings": outside}
    if _type(rope) == "longrope" and outside is None:  # never longer than its original window, then
        hf["original_max_position_embeddings"] = hf["max_position_embeddings"]
        rope = {**rope, "long_factor": rope.get("short_factor")}
    tables = hf["rope_parameters"]
    if tables is not new:
        near = None if hf["model_type"] in ONE_THETA else names.get("sliding_theta")
        default = (defaults.get(SLIDING) or {}).get("rope_theta")
        tables = {FULL: rope, SLIDING: {"rope_theta": given.get(near, default) if near else rope["rope_theta"]}}
    return reading_of({**hf, "rope_parameters": tables if FULL in tables else rope})


def vllm(config: Mapping[str, Any]) -> Reading:
    """What transformers 5 makes of the file, with rules of its own: `longrope` has two keys for the attention factor,
    and one list for all texts as soon as the server's window is longer than the first one; DeepSeek knows YaRN alone
    (vLLM 0.32, model_executor/layers/rotary_embedding, models/deepseek_v2.py, models/registry.py, config/model.py).
    """
    hf = completed_config(config)
    read, family = reading_of(hf), family_of(hf["model_type"])
    rope, window = full_table(hf["rope_parameters"]), int(hf["max_position_embeddings"])
    if family.vllm == "none":
        raise UnreadableError("it has no such model", code="reader_lacks_model")
    if hf["model_type"].startswith("deepseek_v") and read.rope_type != "default":
        own = yarn_attention_factor(float(rope.get("factor") or 1.0))
        if read.rope_type != "yarn" or (not rope.get("mscale") and abs(read.attention_factor - own) > PARITY):
            raise UnreadableError(
                "for this family it knows YaRN with its own attention factor only", code="reader_needs_own_factor"
            )
    if read.rope_type == "longrope":
        first = int(rope["original_max_position_embeddings"])
        window_now = int(hf.get("original_max_position_embeddings") or window)
        if family.vllm == "transformers":
            return replace(read, window=window_now)
        if family.vllm == "pairs":
            raise UnreadableError(
                "its longrope rotates halves, and this family neighbours", code="reader_rotates_neighbours"
            )
        default = math.sqrt(1 + math.log(window / first) / math.log(first)) if window > first else 1.0
        long, short = (float(rope.get(f"{which}_mscale", default)) for which in ("long", "short"))
        if not abs(long - short) <= PARITY:
            raise UnreadableError(f"two attention factors, {short:.4f} and {long:.4f}", code="reader_needs_one_factor")
        return replace(read, short=read.long, attention_factor=long, window=window_now)
    if read.rope_type in ("linear", "dynamic", "default") and "gemma3" not in hf["model_type"]:
        window = int(window * float(rope.get("factor") or 1.0))
    return replace(read, window=window)


def llama_cpp(config: Mapping[str, Any]) -> Reading:
    """What its converter writes and its kernels make of that: YaRN always with its own attention factor, lists of
    factors only for Phi-3, and of some families no RoPE at all (llama.cpp of llama-cpp-python 0.3.36, conversion/ and
    src/llama-context.cpp). `skipwise export --gguf` writes what it leaves out.
    """
    hf = completed_config(config)
    read, family = reading_of(hf), family_of(hf["model_type"])
    rope, window = full_table(hf["rope_parameters"]), int(hf["max_position_embeddings"])
    size = 2 * read.long.size
    if hf["model_type"] == "cohere":  # it looks there first (conversion/command_r.py)
        window = int(hf.get("model_max_length") or window)
        read = replace(read, window=window)
    if family.llama_cpp == "none":
        raise UnreadableError("its converter has no such model", code="reader_lacks_model")
    if family.llama_cpp == "nothing":
        plain = base_frequencies(size, PLAIN_THETA)
        return replace(read, rope_type="default", theta=PLAIN_THETA, short=plain, long=plain, attention_factor=1.0)
    plain = base_frequencies(size, read.theta)
    if family.llama_cpp == "theta":
        return replace(read, rope_type="default", short=plain, long=plain, attention_factor=1.0)
    if family.llama_cpp == "linear" and rope.get("factor"):
        return replace(read, short=plain / rope["factor"], long=plain / rope["factor"], attention_factor=1.0)
    if read.rope_type == "yarn":
        scaled = _yarn(plain, {**rope, "truncate": True}, read.theta, _first(hf, rope), window)[1]
        factor = read.attention_factor if rope.get("mscale_all_dim") else yarn_attention_factor(float(rope["factor"]))
        return replace(read, short=scaled, long=scaled, attention_factor=factor)
    if read.rope_type == "longrope" and hf["model_type"] == "phi3":
        first = _first(hf, rope)
        factor = math.sqrt(1 + math.log(window / first) / math.log(first)) if window > first else 1.0
        return replace(read, attention_factor=factor)
    if read.rope_type == "longrope":
        return replace(read, short=plain, long=plain, attention_factor=1.0)
    return read


READERS: dict[str, Callable[[Mapping[str, Any]], Reading]] = {
    "transformers 5": transformers_5,
    "transformers 4": transformers_4,
    "vLLM": vllm,
    "llama.cpp": llama_cpp,
}


def _type(rope: Mapping[str, Any]) -> str:
    name = str(rope.get("rope_type") or rope.get("type") or "default")
    # With mrope a token has three positions, which are the same in text.
    return {"su": "longrope", "mrope": "default"}.get(name, name)


def _first(hf: Mapping[str, Any], rope: Mapping[str, Any]) -> int:
    """The original window: what stands beside the RoPE parameters goes before what stands in them."""
    name = "original_max_position_embeddings"
    return int(hf.get(name) or rope.get(name) or hf["max_position_embeddings"])


def reading_of(hf: Mapping[str, Any]) -> Reading:
    """Frequencies and attention factor that all of them compute from the same completed config."""
    tables = hf.get("rope_parameters")
    if not tables or hf.get("max_position_embeddings") is None:
        raise UserError(f"Models of type {hf.get('model_type')!r} have no RoPE to look at.", code="no_rope")
    rope, window = full_table(tables), int(hf["max_position_embeddings"])
    kind = _type(rope)
    if kind not in _FREQUENCIES:
        raise UnreadableError(f"the rope type {kind!r} is not known", code="unknown_rope_type")
    try:
        theta = float(rope["rope_theta"])
        head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
        plain = base_frequencies(int(head_dim * float(rope.get("partial_rotary_factor") or 1.0)), theta)
        with np.errstate(all="ignore"):
            short, long, factor = _FREQUENCIES[kind](plain, rope, theta, _first(hf, rope), window)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UnreadableError(f"{type(error).__name__}: {error}", code="malformed_rope") from error
    if not (np.isfinite([*short, *long, factor]).all() and min(*short, *long) > 0):
        raise UnreadableError("its frequencies are no numbers above 0", code="frequencies_not_positive")
    near = (tables.get(SLIDING) or {}).get("rope_theta") if rope is not tables else None
    return Reading(kind, theta, short, long, factor, window, None if near is None else float(near))


Computed = tuple[Table, Table, float]


def _default(plain: Table, rope: Mapping[str, Any], theta: float, first: int, window: int) -> Computed:
    return plain, plain, 1.0


def _linear(plain: Table, rope: Mapping[str, Any], theta: float, first: int, window: int) -> Computed:
    scaled = plain / float(rope["factor"])
    return scaled, scaled, 1.0


def _yarn(plain: Table, rope: Mapping[str, Any], theta: float, first: int, window: int) -> Computed:
    factor = float(rope.get("factor") or window / first)
    fast, slow = float(rope.get("beta_fast") or 32), float(rope.get("beta_slow") or 1)
    ramp = interpolated_share(2 * plain.size, theta, first, fast, slow, whole=bool(rope.get("truncate", True)))
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
