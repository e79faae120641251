"""Loading plain transformers models and tokenizers."""

import string
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import import_utils
from transformers.utils.import_utils import is_bitsandbytes_available

from skipwise.errors import UserError
from skipwise.models.attention import prefer_blocks
from skipwise.models.config import ModelConfig
from skipwise.models.forward import autocast
from skipwise.models.locate import model_location
from skipwise.models.memory import use_huge_pages
from skipwise.models.quantized import check_quantization, dequantising, forget_quantization, quantization_of
from skipwise.models.shape import read_config
from skipwise.models.weight_files import check_files, check_pointers, has_weights
from skipwise.models.weights import check_finite, check_names, load_whole

T = TypeVar("T")


def _sources(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The first argument and the keywords that all `from_pretrained` of a model share."""
    location = model_location(config.path)
    keywords: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "revision": config.revision}
    if location.endswith(".gguf"):
        check_pointers([Path(location)])
        return str(Path(location).parent), {**keywords, "gguf_file": Path(location).name}
    return location, keywords


def load_config(config: ModelConfig) -> PreTrainedConfig:
    """The model's config, without its weights."""
    location, keywords = _sources(config)
    loaded: PreTrainedConfig = explained(config, lambda: AutoConfig.from_pretrained(location, **keywords))
    return loaded


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    location, keywords = _sources(config)
    return explained(config, lambda: AutoTokenizer.from_pretrained(location, **keywords))


def load_model(
    config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.float32, four_bits: bool = False
) -> PreTrainedModel:
    """The model with its weights in `dtype`, in evaluation mode. GGUF files are dequantised.

    Args:
        four_bits: keep the weights of linear layers in 4 bits (normal floats, their scales quantised as well; QLoRA,
            arXiv 2305.14314, section 3). Needs bitsandbytes.
    """
    use_huge_pages()
    location, keywords = _sources(config)
    if "gguf_file" in keywords:
        from transformers import GgufConfig  # which the transformers of Axolotl has not yet

        keywords["quantization_config"] = GgufConfig(dequantize=True)
    else:
        keywords |= _safe(config, location)
    if four_bits:
        _check_four_bits(config)
        keywords["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype(config.dtype, device),
        )
        keywords["device_map"] = {"": device}
    if config.attn_implementation is not None:
        keywords["attn_implementation"] = config.attn_implementation
    model = explained(config, lambda: load_whole(config.path, location, {**keywords, "dtype": dtype}))
    if keywords.get("quantization_config") is not None and not four_bits:
        forget_quantization(model)
    if four_bits:
        _keep_gradients(model)
    else:
        # nn.Module.to by name: the class's own is wrapped in a way that loses its type.
        torch.nn.Module.to(model, device)
    check_finite(config.path, model)
    model.eval()
    if config.attn_implementation is None:
        prefer_blocks(model)
    return model


def check_weights(config: ModelConfig) -> None:
    """Whether the weights of a model directory can be opened and are whole, without reading them.

    Raises:
        UserError: when they are not.
    """
    location, keywords = _sources(config)
    explained(config, lambda: check_names(config.path, location, {**keywords, **_safe(config, location)}))


def check_weights_here(config: ModelConfig) -> None:
    """`check_weights` of a directory that holds weights. One with a config alone passes: it can be planned for."""
    if has_weights(Path(model_location(config.path))):
        check_weights(config)


def _safe(config: ModelConfig, location: str) -> dict[str, Any]:
    """How `from_pretrained` opens safetensors: no pickles, and ordinary weights also where they are quantized.

    Raises:
        UserError: for weights that are of another form, or quantized so that it cannot be undone.
    """
    given = read_config(config.path, config.revision)
    check_quantization(given, config.path)
    if Path(location).is_dir():
        check_files(Path(location), given.get("transformers_weights"), quantized=quantization_of(given) is not None)
    settings = dequantising(given)
    return {"use_safetensors": True} | ({} if settings is None else {"quantization_config": settings})


def _check_four_bits(config: ModelConfig) -> None:
    if not is_bitsandbytes_available():
        raise UserError(
            "train.lora.load_in_4bit needs bitsandbytes. Install it with: pip install 'skipwise[peft]'",
            code="package_not_installed",
        )
    if model_location(config.path).endswith(".gguf"):
        raise UserError(
            "train.lora.load_in_4bit takes a directory or hub id with safetensors, not a .gguf file. Load the file "
            "with transformers, save it with save_pretrained, and give that directory.",
            code="four_bit_needs_safetensors",
        )
    if (method := quantization_of(read_config(config.path, config.revision))) is not None:
        raise UserError(
            f"train.lora.load_in_4bit packs ordinary weights, but those of {config.path} are quantized ({method}). "
            "Name the model that they were made from, or leave load_in_4bit out: then they are dequantised.",
            code="weights_quantized",
        )


def _keep_gradients(model: PreTrainedModel) -> None:
    """On some CPUs bitsandbytes packs weights anew when they are first used outside of training, for a product that has
    no gradient: training after an evaluation would go on without it, and without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def explained(config: ModelConfig, load: Callable[[], T]) -> T:
    """`load()`, with its many ways to fail turned into one message."""
    known = (OSError, ValueError, KeyError, ImportError, struct.error, SafetensorError, StrictDataclassError)
    try:
        return load()
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, known) and not config.trust_remote_code:  # code of others raises what it wants
            raise
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"{config.path!r} must be a model directory{_here(config.path)}, hub id or .gguf file, but cannot be loaded"
            f": {first_line}",
            code="model_not_loadable",
        ) from error


def _here(path: str) -> str:
    return "" if Path(path).exists() or path.startswith("builtin:") else " (there is none here of that name)"


def vocabulary_size(model: PreTrainedModel) -> int:
    """Token ids that a model can both read and predict: rows of the smaller one of its two embeddings."""
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    weights: list[Any] = [one.weight for one in embeddings if one is not None]
    return min(int(weight.shape[0]) for weight in weights)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, used: int = -1) -> None:
    """Refuse a tokenizer that makes ids of a text that the model has no embedding for.

    A vocabulary may be larger than the model's: tokens that were added and never used, and ids with holes between them.

    Args:
        used: the largest id in the data; -1 where there are none.

    Raises:
        UserError: when a text, or one that begins or ends, has such an id.
    """
    ends = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    check_ids(model, max([used, *ends, *tokenizer(string.printable)["input_ids"]]))


def check_ids(model: PreTrainedModel, largest: int) -> None:
    """Refuse token ids that a model has no embedding for; an accelerator would end the process there.

    Args:
        largest: of the ids.

    Raises:
        UserError: when there is no embedding for it.
    """
    rows = vocabulary_size(model)
    if largest >= rows:
        raise UserError(
            f"Tokenizer and model must share a vocabulary, but the tokenizer makes the id {largest:,} and the model "
            f"has {rows:,} embeddings. Load the tokenizer that came with the model.",
            code="vocabulary_mismatch",
        )


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype; `auto` is bfloat16 where the hardware multiplies it natively."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and native_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def default_device() -> torch.device:
    """The accelerator, if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def usable_attention(config: ModelConfig, device: torch.device) -> tuple[ModelConfig, list[str]]:
    """The configuration without a FlashAttention that this machine does not have, and a line that says so."""
    name = config.attn_implementation or ""
    if not name.startswith("flash_attention"):
        return config, []
    available: Callable[..., bool] = getattr(import_utils, f"is_{name.replace('attention', 'attn')}_available", _never)
    if device.type == "cpu":
        reason = "needs a GPU, and there is none"
    elif not available(kernels_fallback_ok=True):
        reason = "is not installed here, or not for this device"
    else:
        return config, []
    default = config.model_copy(update={"attn_implementation": None})
    return default, [f"model.attn_implementation: {name} {reason}; the default is used."]


def _never(**_: Any) -> bool:
    return False


@torch.no_grad()
def usable_dtype(config: ModelConfig, model: PreTrainedModel, device: torch.device) -> tuple[torch.dtype, list[str]]:
    """The compute dtype that a model runs in, and a line where it is another one than this machine is fast in.

    Raises:
        UserError: where the model does not run in the one asked for. DBRX adds its experts to a tensor of another one.
    """
    dtype = compute_dtype(config.dtype, device)
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    try:
        with autocast(device, dtype):
            if dtype != torch.float32:
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except RuntimeError as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if config.dtype != "auto":
            raise UserError(
                f"A model must run in its compute dtype, but {type(model).__name__} does not in {config.dtype}: "
                f"{reason}. Set model.dtype=float32.",
                code="compute_dtype_not_supported",
            ) from error
        return torch.float32, [f"model.dtype: {type(model).__name__} runs in float32 only ({reason}); that is used."]
    return dtype, []
