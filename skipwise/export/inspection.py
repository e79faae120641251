"""What is known of a model before its weights are loaded, and whether it can be extended. Every command asks here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from skipwise.config.resolve import ResolvedRun, resolve
from skipwise.config.run import RunConfig
from skipwise.errors import UserError
from skipwise.export.readers import Reading, reading_of
from skipwise.models.config import ModelConfig
from skipwise.models.families import why_refused
from skipwise.models.load import check_weights_here, explained, load_config
from skipwise.models.locate import model_location
from skipwise.models.quantized import check_quantization, quantization_of
from skipwise.models.rope import FREQUENCY_TOLERANCE, RopeInfo, read_rope, table_of, text_config
from skipwise.models.shape import ModelShape, completed, read_config, read_tokenizer_limit, shape_of
from skipwise.models.skeleton import Parameters, build_skeleton, count_parameters, layers_with_rope, rotary_modules
from skipwise.models.windowed import Layers, windowed_layers
from skipwise.models.windows import FULL, SLIDING, Windows, windows_of

# Share of a model's parameters by which those of its sizes may differ for its cost to be believed.
COUNTED_ALIKE = 0.02


@dataclass(frozen=True)
class ModelInfo:
    """A model that can be extended.

    Attributes:
        config: as its class completes it, whole.
        windows: of pretraining, and the one now.
        rope: of layers that see all of the text.
        parameters: how many weights it has.
        shape: its sizes, where those of a dense decoder explain its parameters; None for any other.
        layers: those that see only the last tokens, of a target length; None where there are none.
    """

    config: PreTrainedConfig
    windows: Windows
    rope: RopeInfo
    parameters: Parameters
    shape: ModelShape | None
    layers: Layers | None

    def notes(self) -> list[str]:
        """What to know of it before it is extended, a sentence each."""
        notes = [] if self.layers is None else [self.layers.describe()]
        if (method := quantization_of(self.config.to_dict())) is not None:
            notes.append(
                f"The weights are quantized ({method}). They are dequantised when they are loaded, and the extended "
                "model is written with ordinary weights."
            )
        if self.parameters.not_loaded:
            notes.append(
                f"The checkpoint may hold {self.parameters.not_loaded / 1e6:,.1f} M parameters more, of layers for "
                "multi-token prediction. transformers does not load them, so the extended model is without them."
            )
        if self.rope.rope_type != "default" or self.windows.current != self.windows.original:
            how = "by other means than RoPE" if self.rope.rope_type == "default" else self.rope.rope_type
            notes.append(
                f"The model was extended before ({how}, {self.windows.original:,} -> "
                f"{self.windows.current:,}). The new scaling replaces that one, and counts from the original window."
            )
        return notes


def inspect_model(model: ModelConfig, target: int | None = None, original: int | None = None) -> ModelInfo:
    """What is known of a model, if it can be extended.

    Args:
        model: where it is.
        target: target length, in tokens; None for one beyond every window.
        original: the original window as the user says it.

    Raises:
        UserError: when it cannot be extended: what it is, why, and what to do instead; when it cannot be read; or when
            its window can be read in two ways.
    """
    config, windows = load_config_and_windows(model, original)
    windows.certain(model.path)
    rope = read_rope(config)
    skeleton = explained(model, lambda: build_skeleton(config, model.trust_remote_code))
    check_positions(skeleton, rope)
    layers = windowed_layers(config, target or 2 * windows.current)
    check_weights_here(model)
    parameters = count_parameters(skeleton)
    return ModelInfo(config, windows, rope, parameters, _shape(config, parameters), layers)


def _shape(config: PreTrainedConfig, parameters: Parameters) -> ModelShape | None:
    """The sizes of a model, if they add up to its parameters."""
    try:
        shape = shape_of(text_config(config).to_dict())
    except UserError:  # mixtures of experts and others, whose cost is not known
        return None
    return shape if abs(shape.parameters - parameters.total) <= COUNTED_ALIKE * parameters.total else None


def load_config_and_windows(model: ModelConfig, original: int | None) -> tuple[PreTrainedConfig, Windows]:
    """The completed config of a decoder, and its windows by all that its files say.

    Raises:
        UserError: when it is no decoder that can be extended, or cannot be read.
    """
    if model_location(model.path).endswith(".gguf"):
        config = load_config(model)
        return config, windows_of(text_config(config).to_dict(), original=original)
    given = read_config(model.path, model.revision)
    check_type(given, model.trust_remote_code)
    check_quantization(given, model.path)
    config = load_config(model)
    check_kind(config, model.trust_remote_code)
    written = given.get("text_config") or given
    return config, windows_of(completed(text_config(config)), written, read_tokenizer_limit(model.path), original)


def check_type(given: Mapping[str, Any], trust_remote_code: bool = False) -> None:
    """Refuse a model type that is known not to be extendable, and one that the installed transformers does not have.

    Args:
        given: `config.json` as written.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        UserError: with the reason and what to do.
    """
    from transformers import CONFIG_MAPPING, __version__

    inner = given.get("text_config") or given
    kinds = [str(one.get("model_type")) for one in (inner, given)]
    refused = next((reason for kind in kinds if (reason := why_refused(kind, bool(inner.get("alibi"))))), None)
    if refused:
        raise UserError(
            f"Skipwise extends models with rotary position embeddings (RoPE). {refused}", code="family_not_supported"
        )
    kind = kinds[1]
    if kind in CONFIG_MAPPING or trust_remote_code:
        return
    if given.get("auto_map"):
        raise UserError(
            f"transformers {__version__} has no model type {kind!r}: this model comes with code of its own. Skipwise "
            "runs it only with --set model.trust_remote_code=true; look at the code first. Or choose a checkpoint in a "
            "layout that transformers has, such as Llama's.",
            code="remote_code_needed",
        )
    raise UserError(
        f"transformers {__version__} has no model type {kind!r}. Choose a checkpoint in a layout that it has, such as "
        "Llama's, or install the version of transformers that has this one.",
        code="unknown_model_type",
    )


def check_kind(config: PreTrainedConfig, trust_remote_code: bool = False) -> None:
    """Refuse what is no decoder of text that transformers loads as one: wrappers, encoders and halves of models.

    Raises:
        UserError: with what it is, and what to do instead.
    """
    kind = str(config.model_type)
    if _is_of_several(config):
        raise UserError(
            f"Skipwise extends models with one language model, but {kind!r} is made of several parts with positions of "
            "their own. Choose one such as Llama.",
            code="several_language_models",
        )
    text = text_config(config)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or (trust_remote_code and getattr(config, "auto_map", None)):
        return
    if text is not config:
        what = (
            f"is a multimodal model around a language model ({text.model_type!r}), which transformers does not load on "
            "its own. Extend a text model of the same family instead"
        )
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        what = "is an encoder. Train it in a loop of your own with MaskedWindowCollator (docs/models.md, Encoders)"
    elif getattr(config, "is_encoder_decoder", False):
        what = (
            "is an encoder-decoder. Train it in a loop of your own (docs/models.md), or choose a decoder such as Llama"
        )
    else:
        what = "is no model that writes text. Choose a decoder such as Llama, Qwen or Mistral"
    raise UserError(
        f"Skipwise extends decoders that transformers loads as causal language models, but {kind!r} {what}.",
        code="not_a_causal_model",
    )


def _is_of_several(config: PreTrainedConfig) -> bool:
    """Whether several parts of a model have positions, and none of them alone is its language model."""
    try:
        text = text_config(config)
    except ValueError:  # transformers finds more than one
        return True
    parts = [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)]
    return text is config and any(getattr(part, "rope_parameters", None) for part in parts)


def check_positions(skeleton: PreTrainedModel, rope: RopeInfo) -> None:
    """Ask the class of a model whether the RoPE that its config speaks of is the one it computes with, and where.

    Raises:
        UserError: when no layer that sees all of the text has rotary positions, or when the frequencies are not those
            that the config says by the rules of transformers.
    """
    config = text_config(skeleton.config)
    kind = str(config.model_type)
    tables = rotary_modules(skeleton)
    if not tables:
        raise UserError(
            f"Skipwise extends models with rotary position embeddings (RoPE), but {kind!r} computes none, though its "
            "config may speak of it. Choose a RoPE model such as Llama, Qwen, Mistral or SmolLM.",
            code="no_rope",
        )
    rotated = layers_with_rope(skeleton)
    kinds = getattr(config, "layer_types", None) or []
    far = [number for number in rotated if number >= len(kinds) or kinds[number] != SLIDING]
    if far and not any(rotated[number] for number in far):
        seen = (
            f"only in layers that see the last {config.sliding_window:,} tokens"
            if any(rotated.values())
            else "in no layer"
        )
        raise UserError(
            f"Skipwise rescales the rotary positions of layers that see all of the text, but {kind!r} has them {seen}. "
            "Choose another model.",
            code="no_rope_in_full_attention",
        )
    meant = reading_of(completed(config))  # by the usual rules
    for module in tables.values():
        if (apart := _apart(module, rope, meant)) is not None:
            raise UserError(
                f"The rotary frequencies of {kind!r} are up to {apart:.4g} times those of its config by the rules of "
                "transformers: keys of its own change them, which a new scaling would lose. Choose another model.",
                code="frequencies_not_understood",
            )


def _apart(module: Any, rope: RopeInfo, meant: Reading) -> float | None:
    """How many times the frequencies of a rotary table are those of a reading at most; None if they are the same."""
    kind = FULL if hasattr(module, f"{FULL}_inv_freq") else None
    for length, wanted in ((rope.original, meant.short), (rope.current, meant.long)):
        found = table_of(module, length, kind)[0]
        if found.shape != wanted.shape:
            return float("inf")
        ratio = float(np.maximum(found / wanted, wanted / found).max())
        if ratio > 1 + FREQUENCY_TOLERANCE:
            return ratio
    return None


def inspect_run(config: RunConfig) -> tuple[ModelInfo, ResolvedRun]:
    """Inspect the model of a run, and resolve the run's settings.

    Raises:
        UserError: when the model cannot be extended, or `resolve` refuses the settings.
    """
    info = inspect_model(config.model, config.lengths.target, config.lengths.original)
    return info, resolve(config, info.windows.original, info.windows.current)
