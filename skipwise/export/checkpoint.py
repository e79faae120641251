"""Writing a checkpoint that stock transformers and older readers open alike."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.models.rope import check_tables, is_rotary_table, read_rope, text_config
from skipwise.rope import RopeScaling
from skipwise.runs import write_json, write_text


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    scaling: RopeScaling,
    lengths: Lengths,
    card: str,
) -> None:
    """Write model (safetensors), tokenizer and card to `path`, all or nothing.

    The config carries the RoPE twice with the same content: `rope_parameters` for transformers 5, and
    `rope_theta` + `rope_scaling` for readers of the older form (vLLM builds, llama.cpp converters),
    which would otherwise fall back to a theta of 10,000 without a word.

    Raises:
        UserError: when the written config does not give back the frequencies of the model in memory.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        tokenizer.model_max_length = lengths.target
        tokenizer.save_pretrained(temporary)
        config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
        write_json(temporary / "config.json", with_legacy_rope(config))
        write_text(temporary / "README.md", card)
        _check_written(temporary, model, scaling, lengths)
        shutil.rmtree(path, ignore_errors=True)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def with_legacy_rope(config: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` with `rope_theta` and `rope_scaling` beside its `rope_parameters`.

    transformers lets `rope_scaling` win when both are there, so it holds everything: a poorer copy
    would lose the attention factor. The default type needs no `rope_scaling`.
    """
    parameters = config["rope_parameters"]
    legacy: dict[str, Any] = {"rope_theta": parameters["rope_theta"]}
    if "partial_rotary_factor" in parameters:
        legacy["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    # "type" is the key before "rope_type"; the oldest readers know nothing else.
    scaling = None if parameters["rope_type"] == "default" else {**parameters, "type": parameters["rope_type"]}
    return {**config, **legacy, "rope_scaling": scaling}


def _check_written(path: Path, model: PreTrainedModel, scaling: RopeScaling, lengths: Lengths) -> None:
    """Read the config back as a user will, and compare frequencies."""
    config = text_config(AutoConfig.from_pretrained(path))
    tables = {type(m) for m in model.modules() if is_rotary_table(m)}
    info = read_rope(text_config(model.config))
    read = {table.__name__: table(config=config) for table in tables}
    check_tables(read, scaling, info, lengths, config.model_type)
    if config.max_position_embeddings != lengths.target:
        raise UserError(
            f"The written config must have a window of {lengths.target:,}, but has {config.max_position_embeddings:,}."
        )
