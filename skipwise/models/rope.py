"""Reading and setting the RoPE of a Hugging Face transformers model."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.models.families import why_refused
from skipwise.models.windows import FULL, ORIGINAL, OTHER_KEYS, SLIDING, full_table, rope_of, windows_of
from skipwise.rope import RopeScaling
from skipwise.rope.scaling import Frequencies, longrope_parameters

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# Keys of a scaling, which a new one replaces; any other key in RoPE parameters is a family's own and stays.
SCALING_KEYS = frozenset(
    {"rope_type", "type", "rope_theta", "factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale",
     "mscale_all_dim", "truncate", "finetuned", "short_factor", "long_factor", "short_mscale", "long_mscale",
     "low_freq_factor", "high_freq_factor"}
)  # fmt: skip
# Hugging Face models compute frequencies in float32; ours are float64.
FREQUENCY_TOLERANCE = 1e-5
# Where a model keeps the RoPE of before it was given another: what its weights on disk have.
RECORD = "rope_before"


@dataclass(frozen=True)
class RopeInfo:
    """The rotary embedding a model has now, in the layers that see all of the text.

    Attributes:
        rotary_dim: how many dimensions of a head are rotated.
        theta: base of the frequencies.
        original: the window it was first pretrained with, in tokens.
        current: the window it claims now; larger when it was extended before.
        rope_type: transformers' name of its scaling, `default` for none.
    """

    rotary_dim: int
    theta: float
    original: int
    current: int
    rope_type: str


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the language model, which multimodal models nest."""
    return config.get_text_config()


def lengths_of(config: PreTrainedConfig) -> Lengths:
    """The windows of a model that carries its RoPE: that of before, and as the target the one now."""
    original = read_rope(config).original
    return Lengths(original, original, text_config(config).max_position_embeddings)


def read_rope(config: PreTrainedConfig) -> RopeInfo:
    """What the config says about RoPE.

    Raises:
        UserError: for a model without RoPE or of a family that is refused, with no rotary table for layers that see all
            of the text, or extended with a scaling of all of its attention.
    """
    config = text_config(config)
    parameters = getattr(config, "rope_parameters", None)
    kind = f"{type(config).__name__} (model type {config.model_type!r})"
    refused = why_refused(config.model_type, bool(getattr(config, "alibi", False)))
    if refused:
        raise UserError(
            f"Skipwise extends models with rotary position embeddings (RoPE). {refused}", code="family_not_supported"
        )
    if not parameters or not hasattr(config, "max_position_embeddings"):
        raise UserError(
            f"Skipwise extends models with rotary position embeddings (RoPE), but {kind} has none. "
            "Choose a RoPE model such as Llama, Qwen, Mistral or SmolLM.",
            code="no_rope",
        )
    if parameters.get(FULL, parameters) is None:
        raise UserError(
            f"Skipwise rescales the rotary positions of layers that see all of the text, but {kind} has none there. "
            "Choose another model.",
            code="no_rope_in_full_attention",
        )
    parameters = full_table(parameters)
    if "rope_theta" not in parameters:
        raise UserError(
            f"{kind} keeps several rotary tables ({', '.join(parameters)}), none of them for layers that see all of "
            "the text. Choose a model that has such layers.",
            code="no_table_for_full_attention",
        )
    theta = parameters["rope_theta"]
    if not isinstance(theta, int | float) or not 1 < theta < float("inf"):
        raise UserError(
            f"The theta of RoPE is a number above 1, but that of {kind} is {theta}. Bring its config.json back.",
            code="theta_out_of_range",
        )
    rope_type = rope_of({"rope_parameters": parameters})["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise UserError(
            f"Skipwise replaces RoPE of the types {', '.join(ROPE_TYPES)}, but {kind} has {rope_type!r}, whose "
            "frequencies it does not know. Choose another model.",
            code="unknown_rope_type",
        )
    if rope_type == "yarn" and parameters.get("mscale_all_dim"):
        raise UserError(
            f"{kind} was extended before and scales all of its attention with that (mscale_all_dim), which a new "
            "scaling would have to replace in the weights' place. Choose a model that was not.",
            code="attention_scaled_before",
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    windows = windows_of(config.to_dict())
    return RopeInfo(
        rotary_dim=int(head_dim * parameters.get("partial_rotary_factor", 1.0)),
        theta=float(theta),
        original=windows.original,
        current=windows.current,
        rope_type=rope_type,
    )


def length_dependent(config: PreTrainedConfig) -> str | None:
    """The rope type of a model whose frequencies depend on how long its input is; None for any other."""
    parameters = getattr(text_config(config), "rope_parameters", None) or {}
    tables = [table for table in parameters.values() if isinstance(table, dict)] or [parameters]
    types = [str(table.get("rope_type", "default")) for table in tables]
    return next((rope_type for rope_type in types if rope_type in ("dynamic", "longrope")), None)


def read_window(config: PreTrainedConfig) -> int | None:
    """Tokens that a model claims to handle, whatever its kind; None where its config says nothing."""
    try:
        return windows_of(text_config(config).to_dict()).current
    except UserError:
        return None


def has_learned_positions(config: PreTrainedConfig) -> bool:
    """Whether a model has an embedding per position, of which there is none beyond its window."""
    return not hasattr(text_config(config), "rope_parameters") and read_window(config) is not None


def rotary_tables(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The rotary tables of a model, by name, in order."""
    return {name: module for name, module in model.named_modules() if is_rotary_table(module)}


def settable_tables(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The rotary tables of a model, which a change of its config reaches; by name.

    Raises:
        UserError: where some of them are made from settings of their own.
    """
    config, tables = text_config(model.config), rotary_tables(model)
    if any(getattr(table, "config", config) is not config for table in tables.values()):
        raise UserError(
            f"Rotary tables must follow the rope_parameters of a config, but {config.model_type!r} makes some of them "
            "from settings of their own (a theta for each layer). Choose a model with one RoPE for all layers.",
            code="rope_of_layers_apart",
        )
    return tables


def rope_record(config: PreTrainedConfig) -> dict[str, Any]:
    """The RoPE parameters and the window of a config, as a dictionary of their own."""
    text = text_config(config)
    record = {"rope_parameters": text.rope_parameters, "max_position_embeddings": text.max_position_embeddings}
    return copy.deepcopy(record)


def rope_before(model: PreTrainedModel) -> dict[str, Any]:
    """`rope_record` of a model as it was loaded, before `set_rope_scaling` or `restore_rope` changed it."""
    record: dict[str, Any] = getattr(inside_peft(model), RECORD, None) or rope_record(model.config)
    return record


def forget_rope_before(model: PreTrainedModel) -> None:
    """Take the RoPE that a model has now for that of its weights on disk, where they were just written."""
    vars(inside_peft(model)).pop(RECORD, None)


def inside_peft(model: PreTrainedModel) -> PreTrainedModel:
    """The model that peft wrapped, or the model itself."""
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return base


def restore_rope(model: PreTrainedModel, parameters: dict[str, Any], lengths: Lengths) -> None:
    """Give a model the RoPE parameters that one of its kind was written with, in place: config and tables together.

    Args:
        parameters: `rope_parameters`, as `set_rope_scaling` wrote them.
        lengths: of that model.
    """
    config = text_config(model.config)
    setattr(inside_peft(model), RECORD, rope_before(model))
    _set_config(config, copy.deepcopy(parameters), lengths)
    _set_head_dim(config)
    for name, module in rotary_tables(model).items():
        model.set_submodule(name, type(module)(config=config).to(model.device))


def set_rope_scaling(model: PreTrainedModel, scaling: RopeScaling, lengths: Lengths) -> None:
    """Give a Hugging Face model new frequencies, in place: config and rotary tables together.

    `max_position_embeddings` becomes the target length, while `original_max_position_embeddings`
    stays the length of pretraining. An earlier scaling is replaced.

    Raises:
        UserError: when the model does not take the frequencies from its config. It is then unchanged.
    """
    config = text_config(model.config)
    info = read_rope(config)
    tables = settable_tables(model)
    before, record = copy.deepcopy(vars(config)), rope_before(model)
    _set_config(config, with_full_table(config, scaling, lengths), lengths)
    try:
        _set_head_dim(config)
        with torch.device("cpu"):  # where a table has values, also for a model without weights
            fresh = {name: type(module)(config=config) for name, module in tables.items()}
        _check_tables(fresh, scaling, info, lengths, config.model_type)
    except (KeyError, TypeError, ValueError) as error:  # a class may have rules of its own
        vars(config).clear()
        vars(config).update(before)
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{config.model_type!r} does not take {scaling.name!r} ({type(error).__name__}: {error}). Choose another "
            "--rope, or a model of the Llama kind.",
            code="scaling_not_supported",
        ) from error
    setattr(inside_peft(model), RECORD, record)
    for name, module in fresh.items():
        model.set_submodule(name, module.to(model.device))


def _set_config(config: PreTrainedConfig, parameters: dict[str, Any], lengths: Lengths) -> None:
    """Everything in a config that says RoPE or window."""
    config.rope_parameters = parameters
    config.max_position_embeddings = lengths.target
    if hasattr(config, ORIGINAL):  # Phi-3 keeps it outside
        setattr(config, ORIGINAL, lengths.original)
    for key in OTHER_KEYS:  # of which some programs take one for the window
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, lengths.target)
    # Of linear scaling alone a config does not say which of the two windows it names.
    if full_table(parameters)["rope_type"] == "linear":
        config.max_sequence_length = lengths.target
    if hasattr(config, "dual_chunk_attention_config"):  # another way to the longer window, which the new one replaces
        del config.dual_chunk_attention_config


def with_full_table(config: PreTrainedConfig, scaling: RopeScaling, lengths: Lengths) -> dict[str, Any]:
    """`rope_parameters` for this config, with those of windowed layers as they are."""
    parameters = default_parameters(config, scaling, lengths)
    old: dict[str, Any] = text_config(config).rope_parameters
    return {**old, FULL: parameters} if full_table(old) is not old else parameters


def default_parameters(config: PreTrainedConfig, scaling: RopeScaling, lengths: Lengths) -> dict[str, Any]:
    """The RoPE parameters of layers that see far: the scaling's own, and the share of a head that is rotated."""
    config = text_config(config)
    info = read_rope(config)
    parameters = scaling.hf_parameters(info.rotary_dim, info.theta, lengths)
    old = full_table(config.rope_parameters)
    kept = {key: value for key, value in old.items() if key not in SCALING_KEYS}
    if set(kept) - {"partial_rotary_factor"}:  # a family's own, which may count from the original window
        kept[ORIGINAL] = lengths.original
    if _takes(config, {**kept, **parameters}):
        return {**kept, **parameters}
    frequencies = scaling.frequencies(info.rotary_dim, info.theta, lengths)
    return {**kept, **longrope_parameters(frequencies, info.rotary_dim, info.theta, lengths)}


def _takes(config: PreTrainedConfig, parameters: dict[str, Any]) -> bool:
    """Whether a config's own class takes these RoPE parameters; that of Phi-3 knows `longrope` alone."""
    changed = copy.copy(config)
    vars(changed)["rope_parameters"] = parameters
    _set_head_dim(changed)
    try:
        changed.validate_rope()
    except (KeyError, TypeError, ValueError):  # whatever a class says no with
        return False
    return True


def _set_head_dim(config: PreTrainedConfig) -> None:
    """Fill in what transformers' YaRN and checks look for, and take for a number."""
    if getattr(config, "head_dim", 0) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads


def is_rotary_table(module: nn.Module) -> bool:
    """Whether a module holds the inverse frequencies of a model."""
    return bool(_kinds(module))


def _kinds(module: nn.Module) -> list[str | None]:
    """The kinds of layers that a module holds frequencies for: none if it is no rotary table, [None] for all alike."""
    kinds = (None, FULL, SLIDING)
    return [
        kind
        for kind in kinds
        if isinstance(getattr(module, _named(kind, "inv_freq"), None), torch.Tensor)
        and hasattr(module, _named(kind, "attention_scaling"))
    ]


def _named(kind: str | None, attribute: str) -> str:
    return attribute if kind is None else f"{kind}_{attribute}"


def _far(module: nn.Module) -> str | None:
    """The kind of layers that see all of the text."""
    kinds = _kinds(module)
    return FULL if FULL in kinds else kinds[0]


def table_of(module: nn.Module, length: int, kind: str | None) -> Frequencies:
    """Inverse frequencies and attention factor of a rotary table, for an input of so many tokens.

    Args:
        kind: of layers; None where all are alike.
    """
    device = next(module.buffers()).device
    position = torch.full((1, 1), length - 1, device=device)
    with torch.no_grad():  # some take other frequencies for long inputs
        module(torch.zeros(1, 1, 1, device=device), position, *([] if kind is None else [kind]))
    frequencies = getattr(module, _named(kind, "inv_freq"))
    return frequencies.double().cpu().numpy(), float(getattr(module, _named(kind, "attention_scaling")))


def live_rope(model: PreTrainedModel, lengths: Lengths) -> dict[str, Any]:
    """What is in a model's tables, for a text that fits into the original window and for one as long as the target.

    With the table of windowed layers, `near`, where they have one of their own.
    """
    table = next((module for module in model.modules() if is_rotary_table(module)), None)
    if table is None:
        raise UserError(
            f"Skipwise changes the rotary tables of a model, but {model.config.model_type!r} has none, though its "
            "config speaks of RoPE. Choose a model of the Llama kind.",
            code="no_rotary_table",
        )
    short, long = (table_of(table, length, _far(table)) for length in (lengths.original, lengths.target))
    near = table_of(table, lengths.target, SLIDING)[0].tolist() if SLIDING in _kinds(table) else None
    return {"short": short[0].tolist(), "long": long[0].tolist(), "attention_factor": long[1], "near": near}


def pin_table(table: Any, length: int) -> Callable[[], None]:
    """Leave a rotary table with the frequencies of a text of so many tokens, whatever it is given; returns what takes
    that back.
    """
    rope_type, kind = table.rope_type, _far(table)

    def forget_length() -> None:
        """Dynamic NTK goes on with the frequencies of the longest text so far; let it begin anew."""
        if (rope_type if kind is None else rope_type[kind]) == "dynamic":
            original, current = getattr(table, _named(kind, "original_inv_freq")), _named(kind, "inv_freq")
            setattr(table, current, original.to(getattr(table, current).device))
            setattr(table, _named(kind, "max_seq_len_cached"), table.original_max_seq_len)

    def undo() -> None:
        table.rope_type = rope_type
        forget_length()

    forget_length()
    table_of(table, length, kind)
    table.rope_type = "default" if kind is None else {**rope_type, kind: "default"}
    return undo


def same_table(one: nn.Module, other: nn.Module, lengths: Lengths) -> bool:
    """Whether two rotary tables are equal but for rounding, inside the original window and at the target."""
    return _kinds(one) == _kinds(other) and all(
        _close(table_of(one, length, kind), table_of(other, length, kind))
        for kind in _kinds(one)
        for length in (lengths.target, lengths.original)
    )


def _close(one: Frequencies, other: Frequencies) -> bool:
    same = one[0].shape == other[0].shape and np.allclose(one[0], other[0], rtol=FREQUENCY_TOLERANCE, atol=0)
    return bool(same) and abs(one[1] - other[1]) < FREQUENCY_TOLERANCE


def _check_tables(
    tables: dict[str, nn.Module], scaling: RopeScaling, info: RopeInfo, lengths: Lengths, model_type: str
) -> None:
    """Raise `UserError` unless there are tables, each with the scaling's frequencies and attention factor."""
    wanted = {lengths.target: scaling.frequencies(info.rotary_dim, info.theta, lengths)}
    if scaling.two_tables:
        wanted[lengths.original] = scaling.short_frequencies(info.rotary_dim, info.theta, lengths)
    same = all(
        _close(table_of(table, length, _far(table)), own) and _used(table, length, own)
        for table in tables.values()
        for length, own in wanted.items()
    )
    if not tables or not same:
        raise UserError(
            f"The rotary table of a model must follow its config, but that of {model_type!r} does not take "
            f"{scaling.name!r} from it. Choose another --rope, or a model of the Llama kind.",
            code="scaling_not_supported",
        )


def _used(table: nn.Module, length: int, wanted: Frequencies) -> bool:
    """Whether the cosines and sines that a table gives for a text of so many tokens are those of these frequencies.

    Phi-3.5-MoE switches its table with the length, and computes with the shorter one all the same. What is no pair of
    cosines and sines is taken at its word.
    """
    kind = _far(table)
    positions = torch.tensor([[1, length - 1]])
    with torch.no_grad():
        given = table(torch.zeros(1, 2, 1), positions, *([] if kind is None else [kind]))
    if not isinstance(given, tuple) or len(given) != 2:
        return True
    cosines, sines = (part.double().numpy().reshape(-1, 2, part.shape[-1])[0, 0] for part in given)
    frequencies, factor = wanted
    angles = np.sort(np.arctan2(sines, cosines))[:: max(1, len(cosines) // len(frequencies))]
    return _close((angles, float(np.hypot(sines, cosines).max())), (np.sort(frequencies), factor))
