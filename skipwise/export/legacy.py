"""The form in which programs older than transformers 5 look for RoPE."""

from typing import Any

from skipwise.errors import UserError
from skipwise.export.hf_config import completed_config
from skipwise.models.families import family_of
from skipwise.models.transformers4 import ONLY_KEYS
from skipwise.models.windows import SLIDING, full_table


def with_legacy_rope(config: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` with `rope_theta` and `rope_scaling` beside its `rope_parameters`.

    transformers lets `rope_scaling` win when both are there, so it holds everything: a poorer copy
    would lose the attention factor. The default type needs no `rope_scaling`.

    Where each kind of layer has a rotary table, both are those of layers that see all of the text, and the theta of
    windowed layers has a name of its own. A config whose class does not find the same RoPE then is left as it is.

    Where the class of transformers 4 takes some keys alone, `rope_scaling` has these if they say as much as all do.

    Raises:
        UserError: for a config that its class does not take.
    """
    if config.get("text_config"):  # multimodal models nest the language model
        return {**config, "text_config": with_legacy_rope(config["text_config"])}
    tables = config["rope_parameters"]
    parameters = full_table(tables)
    values = {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters}
    if parameters is not tables and SLIDING in tables:
        values["sliding_theta"] = tables[SLIDING]["rope_theta"]
    if parameters["rope_type"] == "longrope":  # there it is looked for nowhere else
        values["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
    # "type" is the key before "rope_type"; the oldest readers know nothing else.
    scaling = None if parameters["rope_type"] == "default" else {**parameters, "type": parameters["rope_type"]}
    names = family_of(config["model_type"]).legacy_names
    for keys in (ONLY_KEYS.get(config["model_type"]), None):
        few = scaling if keys is None or scaling is None else {key: scaling[key] for key in keys if key in scaling}
        legacy = {names.get(key, key): value for key, value in {**values, "rope_scaling": few}.items()}
        known = {name: value for name, value in legacy.items() if name is not None and name != "sliding_theta"}
        if _read_alike(written := {**config, **known}, config):
            return written
    return config


def _read_alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the model's own class finds the same RoPE in two configs.

    Classes newer than the older form know none, and take what stands there for the parameters of all layers.
    """
    try:
        wanted = completed_config(other)["rope_parameters"]
    except UserError as error:
        if error.code == "unknown_model_type":  # remote code
            return True
        raise
    try:
        found = completed_config(one)["rope_parameters"]
    except UserError:  # too little for its class
        return False
    return without_type(found) == without_type(wanted)


def without_type(parameters: dict[str, Any]) -> dict[str, Any]:
    """RoPE parameters without the older name of `rope_type`."""
    return {
        key: without_type(value) if isinstance(value, dict) else value
        for key, value in parameters.items()
        if key != "type"
    }
