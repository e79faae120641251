"""Writing a checkpoint that plain transformers and older readers open alike."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skipwise.errors import UserError
from skipwise.export.hf_config import loadable_config
from skipwise.export.legacy import with_legacy_rope
from skipwise.export.tokenizer import tokenizer_for_all
from skipwise.lengths import Lengths
from skipwise.models.rope import forget_rope_before, is_rotary_table, lengths_of, same_table, text_config
from skipwise.models.weights import check_finite
from skipwise.training.adapters import base_of, is_adapted, write_rope
from skipwise.utils.distributed import is_first
from skipwise.utils.files import read_json, share_weights, write_json, write_text

# Files of weights, as transformers and peft name them.
_SHARDS = r"(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
WHOLE, ADAPTER = (re.compile(f"({name}){_SHARDS}") for name in ("model|pytorch_model", "adapter_model"))


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> None:
    """Write a model with its tokenizer so that every program reads the RoPE that it was trained with.

    `save_pretrained` writes RoPE in the form of transformers 5 alone, from which older programs read a theta of 10,000
    and no scaling, and leaves the tokenizer's limit at the window of before. Of a peft model the adapter is written,
    with the RoPE beside it: `load_adapter` puts both on the base.

    A whole model that was saved is the base of the adapters that are trained on it later.

    Of several processes the first writes. A directory that is new appears whole; in one that exists, files of the same
    names and earlier weights are replaced.

    Args:
        model: with the RoPE of `set_rope_scaling`, or any other; also a peft model around it, or either of them
            compiled or wrapped for data parallelism.
        tokenizer: of the model; it stays as it is.
        directory: new, or one whose other files stay, such as the output of a `Trainer`.

    Raises:
        UserError: when the written config does not give back the frequencies of the model in memory, the weights are
            in shards or not finite, or the directory holds an adapter and the model is whole, or the other way round.
            Then nothing is written.
    """
    path = Path(directory).resolve()
    plain: PreTrainedModel = extract_model_from_parallel(model, keep_torch_compile=False)
    base = base_of(plain)
    _check_whole(model)
    _check_place(path, adapted=is_adapted(plain))
    if not is_first():
        return
    lengths = lengths_of(base.config)
    check_finite(type(base).__name__, plain)
    with _aside(path) as temporary:
        _write(plain, temporary)
        _complete(temporary, base, tokenizer, lengths)
        write_rope(temporary, plain)
        _move_into(temporary, path)
    if not is_adapted(plain):
        forget_rope_before(base)


def _check_whole(model: nn.Module) -> None:
    """Raise `UserError` for a model of which this process has a part only: the rest would be written empty."""
    sharded = any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        isinstance(weight, DTensor) or getattr(weight, "ds_numel", weight.numel()) != weight.numel()
        for weight in model.parameters()
    )
    if sharded:
        raise UserError(
            "skipwise.save writes a model whose weights are whole, but these are in shards (FSDP or ZeRO-3). Write it "
            "with trainer.save_model(DIRECTORY), which gathers them, and put it right with: skipwise export DIRECTORY "
            "NEW",
            code="model_is_sharded",
        )


def _check_place(directory: Path, adapted: bool) -> None:
    """Raise `UserError` where a whole model would lie beside an adapter: readers would put the one on the other."""
    pattern = WHOLE if adapted else ADAPTER
    names = sorted(file.name for file in directory.iterdir()) if directory.is_dir() else []
    there = next((name for name in names if pattern.fullmatch(name)), None)
    if there is not None:
        raise UserError(
            f"A directory holds a whole model or an adapter, not both, but {directory} has {there}, and "
            f"{'an adapter' if adapted else 'a whole model'} is to be written. Choose another directory.",
            code="directory_holds_another_kind",
        )


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    lengths: Lengths,
    card: str,
) -> None:
    """Write model (safetensors), tokenizer and card to `path`, all or nothing; what was there before is gone.

    The config carries the RoPE twice with the same content: `rope_parameters` for transformers 5, and
    `rope_theta` + `rope_scaling` for readers of the older form (vLLM builds, llama.cpp converters),
    which would otherwise fall back to a theta of 10,000 without a word.

    Raises:
        UserError: when the written config does not give back the frequencies of the model in memory.
    """
    with _aside(path) as temporary:
        _write(model, temporary)
        _complete(temporary, model, tokenizer, lengths)
        write_text(temporary / "README.md", card)
        shutil.rmtree(path, ignore_errors=True)
        temporary.replace(path)


def _write(model: PreTrainedModel, path: Path) -> None:
    """Have transformers write a model.

    Raises:
        UserError: when it does not, as for weights that share memory, or settings that its classes do not take.
    """
    try:
        model.save_pretrained(path)
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"A trained model must be written with save_pretrained, but transformers does not write this "
            f"{type(model).__name__}: {first} Change what it names in the files of the base, or choose another model.",
            code="model_not_written",
        ) from error


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A place beside a directory to fill first; it is gone in the end."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _complete(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lengths: Lengths) -> None:
    """Add tokenizer and limits to what `save_pretrained` wrote, put RoPE into every form, and check it."""
    tokenizer.save_pretrained(directory)
    tokenizer_for_all(directory, lengths.target)
    if (directory / "config.json").is_file():  # which an adapter has not
        config = read_json(directory / "config.json")
        write_json(directory / "config.json", with_legacy_rope(loadable_config(config, type(model).__name__)))
        drop_shorter_limit(directory, lengths.target)
        share_weights(directory)
        _check_written(directory, model, lengths)


def drop_shorter_limit(directory: Path, target: int) -> None:
    """Remove a length at which generation stops, of before, from the generation config of a model."""
    path = directory / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    if (settings.get("max_length") or target) < target:
        write_json(path, {name: value for name, value in settings.items() if name != "max_length"})


def _move_into(source: Path, directory: Path) -> None:
    """Move files to a directory, and the config last: until then none of them says anything new."""
    if not directory.exists():
        source.replace(directory)
        return
    new = sorted(source.iterdir(), key=lambda file: file.name in ("config.json", "adapter_config.json"))
    written = {file.name for file in new}
    for file in new:
        if file.is_dir():
            shutil.rmtree(directory / file.name, ignore_errors=True)
        file.replace(directory / file.name)
    for file in list(directory.iterdir()):  # which would be read instead, if there were another number of files before
        if file.name not in written and (WHOLE.fullmatch(file.name) or ADAPTER.fullmatch(file.name)):
            file.unlink()


def _check_written(path: Path, model: PreTrainedModel, lengths: Lengths) -> None:
    """Read the config back as a user will, and compare with the model in memory."""
    config = text_config(type(model.config).from_pretrained(path))
    for table in (module for module in model.modules() if is_rotary_table(module)):
        read: Any = type(table)(config=config)
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
