"""A model for others: in the dtype they want, with a card, and only if all that read it compute what was trained."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from skipwise.config.run import RunConfig
from skipwise.errors import UserError, nearest
from skipwise.export.card import Published, model_card, plain_card
from skipwise.export.checkpoint import drop_shorter_limit
from skipwise.export.gguf import TYPES, find_converter, write_gguf
from skipwise.export.hf_config import completed_config
from skipwise.export.legacy import with_legacy_rope
from skipwise.export.proof import prove_copy
from skipwise.export.readers import NO_READING, READERS, Reading, UnreadableError, difference, transformers_5
from skipwise.export.tokenizer import tokenizer_for_all
from skipwise.lengths import Lengths
from skipwise.models.config import ModelConfig
from skipwise.models.load import check_weights
from skipwise.models.locate import TINY
from skipwise.models.quantized import quantization_of
from skipwise.models.windows import windows_of
from skipwise.rope.scaling import base_frequencies
from skipwise.runs.directory import RunDir
from skipwise.utils.files import new_directory, read_json, write_json, write_text

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INDEX = "model.safetensors.index.json"
# Optimizers, logs, and other forms of the weights, which are not checked.
NOT_GIVEN = (
    *(".*", "README.md", "trainer_state.json", "events.out.*"),
    *("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf"),
)
# Those that read a config; llama.cpp has a file of its own.
CONFIG_READERS = ("transformers 5", "transformers 4", "vLLM")
# The one that is installed, and opens what is written; what others do is known from their sources.
OPENED = "transformers 5"


@dataclass(frozen=True)
class Export:
    """How a model is given to others.

    Attributes:
        dtype: of its weights, one of `DTYPES`; None as they are.
        gguf: type of the weights of a file for llama.cpp, one of `gguf.TYPES`; None for no such file.
        converter: llama.cpp's, for that.
        without: readers of a config that may compute something else; the card says so.
        name: by which servers find it; None for that of its directory.
        table: results, in Markdown.
        warnings: what got worse, a sentence each.
    """

    dtype: str | None = None
    gguf: str | None = None
    converter: Path | None = None
    without: Sequence[str] = ()
    name: str | None = None
    table: str = ""
    warnings: Sequence[str] = ()


def export_run(run: RunDir, config: RunConfig, output: Path, wanted: Export) -> list[str]:
    """Write the model of a run to a new directory, all or nothing.

    Args:
        run: finished.
        config: of the run, resolved.
        output: new directory.

    Returns:
        What was checked, and what its users must know, a sentence each.

    Raises:
        UserError: for an unknown choice, or where a reader would compute something else than was trained.
    """
    lengths = config.lengths
    assert lengths.original is not None and lengths.train is not None, "a resolved configuration has all lengths"
    three, plan = Lengths(original=lengths.original, train=lengths.train, target=lengths.target), read_json(run.plan)
    published = Published(
        windows=plan["steps"] * plan["windows_per_step"],
        window=plan["window_tokens"],
        table=wanted.table,
        warnings=wanted.warnings,
        base=written_base(run.model),
        licence=base_licence(config.model.path),
    )
    trained = read_json(run.rope)
    return _export(
        run.model,
        lengths.target,
        trained,
        output,
        wanted,
        published,
        lambda known: model_card(config, three, known),
        config.model.trust_remote_code,
    )


def export_model(model: Path, output: Path, wanted: Export) -> list[str]:
    """Write a model that carries its RoPE in its config to a new directory, all or nothing: one that `skipwise.save` or
    another training loop wrote.

    Args:
        model: directory with config and safetensors.
        output: new directory.

    Returns:
        As `export_run`.

    Raises:
        UserError: as `export_run`, and for weights that cannot be opened.
    """
    windows = windows_of(completed_config(read_json(model / "config.json"))).certain(str(model))
    published = Published(base=written_base(model), licence=base_licence(str(model)), warnings=wanted.warnings)
    card = partial(plain_card, str(model), windows)
    return _export(model, windows.current, None, output, wanted, published, card)


def _export(
    source: Path,
    window: int,
    trained: dict[str, Any] | None,
    output: Path,
    wanted: Export,
    published: Published,
    card: Callable[[Published], str],
    trust_remote_code: bool = False,
) -> list[str]:
    """Write a model, read it back, and say what was checked.

    Args:
        source: directory of the model.
        window: that it has now, in tokens.
        trained: frequencies and attention factor that were trained, if they are known; else those of its config.
        published: what its card says, without what is found here.
        card: the text of it.
        trust_remote_code: whether code that comes with the model may run when it is opened.
    """
    _check_choices(wanted)
    check_weights(ModelConfig(path=str(source), trust_remote_code=trust_remote_code))
    if wanted.dtype and (method := quantization_of(read_json(source / "config.json"))) is not None:
        raise UserError(
            f"--dtype is for ordinary weights, but those of {source} are quantized ({method}). Leave --dtype out to "
            "copy them as they are.",
            code="weights_quantized",
        )
    converter = find_converter(wanted.converter) if wanted.gguf else None
    written = with_legacy_rope(read_json(source / "config.json"))
    unread = {name: reason for name in CONFIG_READERS if (reason := _no_reading(name, written))}
    readers = [name for name in CONFIG_READERS if name not in (*wanted.without, *unread)]
    meant = check_readers(written, trained, readers)
    with new_directory(output) as directory:
        write_model(source, directory, wanted.dtype)
        write_json(directory / "config.json", with_legacy_rope(read_json(directory / "config.json")))
        tokenizer_for_all(directory, window)
        drop_shorter_limit(directory, window)
        file = None
        if converter is not None and wanted.gguf is not None:
            file = f"{output.name}-{wanted.gguf}.gguf"
            write_gguf(directory, directory / file, wanted.gguf, converter, meant)
        limits = _left_out(written, meant, wanted.without, own_file=file is not None)
        limits += [f"{name}: {reason}." for name, reason in unread.items()]
        known = replace(
            published,
            warnings=[*published.warnings, *limits],
            vllm=f"vllm serve {wanted.name or output.name} --max-model-len {window}",
            gguf=file,
        )
        write_text(directory / "README.md", card(known))
        prove_copy(source, directory, wanted.dtype is not None, trust_remote_code)
    by_rule = [*(name for name in readers if name != OPENED), *[f"llama.cpp ({file})"] * (file is not None)]
    said = [f"Checked: {OPENED} opens it and computes what {'was trained' if trained else 'its config says'}."]
    if by_rule:
        said.append(f"By rule, not opened: the same RoPE is read by {', '.join(by_rule)}.")
    return [*said, *limits]


def _no_reading(name: str, config: dict[str, Any]) -> str | None:
    """Why a reader does not read such a model at all; None if it does."""
    try:
        READERS[name](config)
    except UnreadableError as error:
        return str(error) if error.code in NO_READING else None
    return None


def _left_out(config: dict[str, Any], meant: Reading, without: Sequence[str], own_file: bool) -> list[str]:
    """What the card says of readers that are not checked: those left out, and llama.cpp unless it has its own file."""
    wrong = {name: _what(name, config, meant) for name in without}
    said = [f"{name} computes something else with this model: {what}." for name, what in wrong.items() if what]
    lost = None if own_file else _what("llama.cpp", config, meant)
    return [*said, *([f"llama.cpp's converter alone makes something else of this model: {lost}."] if lost else [])]


def _check_choices(wanted: Export) -> None:
    choices: list[tuple[str, str | None, Iterable[str]]] = [
        ("--dtype", wanted.dtype, DTYPES),
        ("--gguf", wanted.gguf, TYPES),
    ]
    choices += [("--without", name, CONFIG_READERS) for name in wanted.without]
    for option, value, known in choices:
        if value is not None and value not in known:
            raise UserError(f"{option} cannot be {value!r}.{nearest(value, known)}", code="unknown_choice")


def _what(name: str, config: dict[str, Any], meant: Reading) -> str | None:
    """In what a reader differs from what was trained; None if in nothing."""
    try:
        return difference(READERS[name](config), meant)
    except UnreadableError as error:
        return str(error)


def write_model(source: Path, output: Path, dtype: str | None) -> None:
    """Copy the files of a model, its weights cast, shard by shard; what a training left beside them stays there.

    Args:
        source: directory with safetensors.
        output: where to; it exists.
        dtype: one of `DTYPES`; None leaves weights as they are.
    """
    ignored = shutil.ignore_patterns("*.safetensors" if dtype else "", *NOT_GIVEN)

    def left(directory: str, names: list[str]) -> set[str]:
        folders = {name for name in names if (Path(directory) / name).is_dir()}
        return ignored(directory, names) | folders - {CHAT_TEMPLATE_DIR}

    shutil.copytree(source, output, ignore=left, dirs_exist_ok=True)
    if dtype is None:
        return
    total = 0
    for file in sorted(source.glob("*.safetensors")):
        weights = {name: _cast(name, weight, DTYPES[dtype]) for name, weight in load_file(file).items()}
        total += sum(weight.nbytes for weight in weights.values())
        save_file(weights, output / file.name, metadata={"format": "pt"})
        shutil.copymode(file, output / file.name)
    config = read_json(output / "config.json")
    write_json(output / "config.json", {**config, "dtype": dtype})
    if (output / INDEX).is_file():
        index = read_json(output / INDEX)
        write_json(output / INDEX, {**index, "metadata": {**index.get("metadata", {}), "total_size": total}})


def _cast(name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight in another dtype.

    Raises:
        UserError: when some of its numbers are too large for it.
    """
    cast = weight.to(dtype) if weight.is_floating_point() else weight
    if bool(weight.isfinite().all()) and not bool(cast.isfinite().all()):
        raise UserError(
            f"Weights must fit into --dtype, but {name} has numbers up to {float(weight.abs().max()):.3g}, too large "
            f"for {str(dtype).removeprefix('torch.')}. Choose --dtype bfloat16.",
            code="weights_too_large_for_dtype",
        )
    return cast


# Tables of a live model are float32, and so is the arithmetic behind them.
ROUNDED = 1e-5


def check_readers(config: dict[str, Any], trained: dict[str, Any] | None, readers: Sequence[str]) -> Reading:
    """The RoPE of a config, if it is what was trained, and every one of these reads it so.

    Args:
        config: as it is written.
        trained: frequencies and attention factor of the live model (`RunDir.rope`); None where they are not known.
        readers: names.

    Raises:
        UserError: when the config says something else than was trained, or one of them reads something else.
    """
    meant = transformers_5(config)
    own: dict[str, Any] = {"short": meant.short, "long": meant.long, "attention_factor": meant.attention_factor}
    trained = own | (trained or {})
    tables = [(trained["short"], meant.short), (trained["long"], meant.long)]
    if near := trained.get("near"):
        tables.append((near, base_frequencies(2 * len(near), meant.sliding_theta or meant.theta)))
    same = all(len(was) == len(now) and np.allclose(was, now, rtol=ROUNDED, atol=0) for was, now in tables)
    if not same or not abs(trained["attention_factor"] - meant.attention_factor) <= ROUNDED:
        raise UserError(
            "The config.json of the run says another RoPE than the model was trained with: it was changed. Bring "
            "it back, or train again.",
            code="rope_changed_after_training",
        )
    for name in readers:
        wrong = _what(name, config, meant)
        if wrong is not None:
            raise UserError(
                f"{name} would compute something else than was trained: {wrong}. Extend the model with another --rope, "
                f"or leave this reader out (--without '{name}'), which the card then says.",
                code="reader_differs_from_training",
            )
    return meant


def written_base(directory: Path) -> str | None:
    """The base that the card of a run's model names: only when it was written it was known what is on the machine."""
    card = directory / "README.md"
    if not card.is_file():
        return None
    base = getattr(ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data, "base_model", None)
    return base if isinstance(base, str) else None


def base_licence(path: str) -> str | None:
    """What the card of a model says of its licence; None if there is no card, or it says nothing."""
    if path == TINY:
        return "apache-2.0"  # our own

    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    card = Path(path) / "README.md"
    if Path(path).exists() and not card.is_file():
        return None
    try:
        if card.is_file():
            content = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        else:
            content = ModelCard.load(path, ignore_metadata_errors=True)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, yaml.YAMLError):
        return None
    licence = getattr(content.data, "license", None)
    return licence if isinstance(licence, str) else None


def push_to_hub(directory: Path, repository: str, private: bool) -> str:
    """Upload a directory to the hub; returns its address.

    Raises:
        UserError: when the hub does not take it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Upload with Skipwise")
    except Exception as error:  # whatever a network, a hub or its client raises
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"The hub does not take {repository}: {first}. Everything is in {directory}. After hf auth login: hf "
            f"upload {repository} {directory}",
            code="hub_upload_failed",
        ) from error
    return str(made)
