"""Models whose weights are quantized: which are dequantised when they are loaded, and which are refused. No torch."""

from collections.abc import Mapping
from typing import Any

from skipwise.errors import UserError

# Methods that transformers undoes on any device when it loads a model, with the class of their settings.
DEQUANTISED = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config", "mxfp8": "FineGrainedFP8Config"}


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """The method by which the weights of a model are quantized, by its `config.json`; None for ordinary weights."""
    inner = config.get("text_config") or {}
    settings = config.get("quantization_config") or inner.get("quantization_config") or config.get("compression_config")
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        raise UserError(
            f"quantization_config in a config.json must be an object, not {settings!r}. Download the file again.",
            code="malformed_model_config",
        )
    method = settings.get("quant_method")
    if method is None:  # as bitsandbytes wrote it first
        return "bitsandbytes" if "load_in_4bit" in settings or "load_in_8bit" in settings else "unknown"
    return str(method)


def check_quantization(config: Mapping[str, Any], path: str) -> None:
    """Refuse weights that cannot be trained, before they are loaded.

    Raises:
        UserError: for a method that is not undone on loading.
    """
    method = quantization_of(config)
    if method is None or method in DEQUANTISED:
        return
    raise UserError(
        f"Skipwise trains and writes ordinary weights, but those of {path} are quantized ({method}). Name the model "
        "that they were made from. To train adapters on 4 bits, name that model too, and set "
        "train.lora.load_in_4bit=true.",
        code="weights_quantized",
    )


def forget_quantization(model: Any) -> None:
    """Let a model that was dequantised on loading be one of ordinary weights, for training and saving.

    transformers keeps the way in which it loaded weights, and takes it back when it saves them: float8 again, in a
    checkpoint whose config says nothing of it.
    """
    model._weight_conversions = None
    model.is_quantized = False  # for which the Trainer asks
    model.hf_quantizer = None


def dequantising(config: Mapping[str, Any]) -> Any:
    """What `from_pretrained` takes as `quantization_config` so that weights come as ordinary ones; None if they are."""
    method = quantization_of(config)
    if method not in DEQUANTISED:
        return None
    import transformers

    return getattr(transformers, DEQUANTISED[method])(dequantize=True)
