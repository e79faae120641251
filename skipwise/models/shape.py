"""The files of a model that say what it is, and its sizes from its config alone. No torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipwise.errors import UserError
from skipwise.models.families import family_of
from skipwise.models.locate import model_location
from skipwise.models.windows import UNLIMITED

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Keys that say that a config is of a mixture of experts, whose sizes mean something else.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a dense decoder that its cost depends on.

    Attributes:
        layers, heads, key_heads, head_dim, hidden_size, intermediate_size, vocabulary: as in the model's config.
        gated: whether feed-forward layers have three matrices, or two.
        tied: whether input and output embedding are one matrix.
    """

    layers: int
    heads: int
    key_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocabulary: int
    gated: bool = True
    tied: bool = True

    @property
    def query_size(self) -> int:
        """Width of all queries of a token."""
        return self.heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Width of all keys of a token, and of all values."""
        return self.key_heads * self.head_dim

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of one layer."""
        attention = self.hidden_size * 2 * (self.query_size + self.key_size)
        return attention + (3 if self.gated else 2) * self.hidden_size * self.intermediate_size

    @property
    def embedding_weights(self) -> int:
        """Weights of one embedding matrix."""
        return self.vocabulary * self.hidden_size

    @property
    def product_weights(self) -> int:
        """Weights that every token is multiplied with; the input embedding is looked up."""
        return self.layers * self.layer_weights + self.embedding_weights

    @property
    def parameters(self) -> int:
        """All weights, those of norms included; biases, well below a thousandth, are not."""
        norms = (2 * self.layers + 1) * self.hidden_size
        return self.product_weights + norms + (0 if self.tied else self.embedding_weights)


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The sizes that a `config.json` says.

    Raises:
        UserError: for a model that is no dense decoder.
    """
    config = config.get("text_config") or config
    config = {**config, "intermediate_size": config.get("intermediate_size") or config.get("ffn_hidden_size")}
    kind = str(config.get("model_type"))
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [key for key in needed if not config.get(key)]
    if missing:
        raise UserError(
            f"Costs are known for models in the layout of Llama, but the config.json of this one ({kind!r}) has no "
            f"{', '.join(missing)}. Plan another model; extend may take it, without knowing the cost.",
            code="model_sizes_missing",
        )
    if any(config.get(key) for key in EXPERTS):
        raise UserError(
            "Costs are known for dense models, but this is a mixture of experts. Plan a dense model; extend may take "
            "it, without knowing the cost.",
            code="mixture_of_experts",
        )
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        key_heads = config.get("num_key_value_heads") or config.get("num_kv_heads") or heads
        if config.get("multi_query") and not config.get("new_decoder_architecture"):  # Falcon's
            key_heads = 1
        return ModelShape(
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            key_heads=int(key_heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            gated=family_of(kind).gated,
            tied=bool(config.get("tie_word_embeddings", family_of(kind).tied)),
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"Costs are known for models whose layers are alike, but the sizes of {kind!r} are no whole numbers. "
            "Plan another model.",
            code="malformed_model_sizes",
        ) from error


def read_config(path: str, revision: str | None = None) -> dict[str, Any]:
    """The `config.json` of a model directory or hub model.

    Raises:
        UserError: when it cannot be had, or for a .gguf file.
    """
    location = model_location(path)
    if location.endswith(".gguf"):
        raise UserError(
            f"A plan is made from a config.json, but {path} is a single file. Name a model directory.",
            code="plan_needs_config",
        )
    file = Path(location) / "config.json"
    if not Path(location).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            file = Path(hf_hub_download(location, "config.json", revision=revision))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            said = str(error).splitlines()[0]
            raise UserError(
                f"There is no directory {path} here, and the hub does not give its config either: {said} "
                "Check the name; HF_HUB_OFFLINE=1 takes what was downloaded before.",
                code="model_not_found",
            ) from error
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}", code="unreadable_json") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} must hold a mapping, not {type(config).__name__}.", code="not_a_mapping")
    return config


def read_tokenizer_limit(path: str) -> int | None:
    """`model_max_length` of a model directory's tokenizer, in tokens; None where it says none that is one."""
    file = Path(model_location(path)) / "tokenizer_config.json"
    try:
        limit = json.loads(file.read_text(encoding="utf-8")).get("model_max_length")
        return int(limit) if limit and int(limit) < UNLIMITED else None
    except (OSError, ValueError, TypeError, AttributeError):  # the limit is a hint, and the file another's matter
        return None


def completed(text: "PreTrainedConfig") -> dict[str, Any]:
    """The config of a language model as a dictionary, also under the usual names (DBRX has another for its window)."""
    own: dict[str, Any] = text.to_dict()
    return {name: own[key] for name, key in text.attribute_map.items() if key in own} | own


def knows_key(config_class: type, key: str) -> bool:
    """Whether a config class has a key. One that it does not have is of another family, and changes nothing.

    Classes that come as remote code may not declare what they take.
    """
    return hasattr(config_class, key) or not config_class.__module__.startswith("transformers.")
