"""Writing a checkpoint that stock transformers and older readers open alike."""

import json
import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.models.legacy import with_legacy_rope
from skipwise.models.rope import is_rotary_table, same_table, text_config
from skipwise.runs import share_weights, write_json, write_text


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
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
        _drop_shorter_limit(temporary / "generation_config.json", lengths.target)
        write_text(temporary / "README.md", card)
        share_weights(temporary)
        _check_written(temporary, model, lengths)
        shutil.rmtree(path, ignore_errors=True)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _drop_shorter_limit(path: Path, target: int) -> None:
    """A length at which generation stops, of before."""
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if (settings.get("max_length") or target) < target:
        write_json(path, {name: value for name, value in settings.items() if name != "max_length"})


def _check_written(path: Path, model: PreTrainedModel, lengths: Lengths) -> None:
    """Read the config back as a user will, and compare with the model in memory."""
    config = text_config(type(model.config).from_pretrained(path))
    for table in (module for module in model.modules() if is_rotary_table(module)):
        read = type(table)(config=config)
        if not same_table(read, table, lengths):
            raise UserError(
                f"The written config must give back the rotary table of the model, but that of {config.model_type!r} "
                "does not: this family keeps its RoPE in another form. Choose another --rope.",
                code="config_loses_rope",
            )
    if config.max_position_embeddings != lengths.target:
        raise UserError(
            f"The written config must have a window of {lengths.target:,}, but has {config.max_position_embeddings:,}.",
            code="written_window_differs",
        )
