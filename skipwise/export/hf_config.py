"""A `config.json` as transformers' own class completes it: defaults, older names, a table for each kind of layer."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from skipwise.errors import UserError
from skipwise.models.shape import completed

if TYPE_CHECKING:
    pass

# Where configs of any version keep RoPE.
ROPE_KEYS = (
    *("rope_parameters", "rope_scaling", "rope_theta", "rotary_emb_base", "global_rope_theta", "local_rope_theta"),
    "rope_local_base_freq",
)


def completed_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part, with everything that the class knows.

    Raises:
        UserError: when transformers has no such class, or the class does not take the config.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"The config.json is of model type {kind!r}, which transformers does not know.", code="unknown_model_type"
        )
    try:  # with a copy, in which classes change what they like
        built = CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(config)))
        return completed(built.get_text_config())
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError, StrictDataclassError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"The config.json is not one that transformers takes for {kind!r}: {first}", code="malformed_model_config"
        ) from error


def loadable_config(config: Mapping[str, Any], model_class: str) -> dict[str, Any]:
    """A `config.json` that `AutoModelForCausalLM` opens as this class.

    Where transformers takes a class out of a larger model and does not know its config alone (Llama 3.2 Vision, Emu3),
    that stands inside the larger one's.

    Args:
        config: of the model, as `save_pretrained` writes it.
        model_class: name of its class.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    if config.get("model_type") in CLASSES:
        return dict(config)
    larger = next((kind for kind, name in CLASSES.items() if name == model_class), None)
    if larger is None:  # remote code
        return dict(config)
    named = {key: config[key] for key in ("architectures", "dtype", "transformers_version") if key in config}
    return {**named, "model_type": larger, "text_config": dict(config)}


def default_theta(config: Mapping[str, Any]) -> Any:
    """RoPE parameters that the class has where the config says nothing, per kind of layer where it has several."""
    silent = {key: value for key, value in config.items() if key not in ROPE_KEYS}
    if config.get("text_config"):
        silent["text_config"] = {key: value for key, value in config["text_config"].items() if key not in ROPE_KEYS}
    return completed_config(silent).get("rope_parameters")
