"""What Skipwise can do with each family of models: the evidence behind docs/results/support.json.

    python -m experiments.family_support docs/results/support.json

For every row of `skipwise.models.families`, a model of some ten thousand parameters from transformers' own config class
is given every RoPE scaling, asked with every attention backend whether it sees across a skip, trained for a step,
written, read back by plain transformers, and by the rules of each reader; and encoders, as far as that goes for them. A
cell is `yes`, or says why not. Before that, a small model of every causal type of transformers goes the way of
`skipwise extend` (experiments/type_sweep.py). All of it takes a quarter of an hour.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
)
from transformers.utils import logging

from experiments.type_sweep import outcome_apart, types_markdown
from skipwise import (
    MaskedWindowCollator,
    PoSE,
    UserError,
    WindowCollator,
    masks_for,
    set_rope_scaling,
)
from skipwise.export.checkpoint import save_checkpoint
from skipwise.export.readers import READERS, UnreadableError, difference, transformers_5
from skipwise.models.attention import NAME as BLOCKS
from skipwise.models.families import FAMILIES, Family
from skipwise.models.probe import probe_attention
from skipwise.models.rope import is_rotary_table, read_rope, table_of
from skipwise.models.windowed import probe_windows, windowed_layers
from skipwise.models.windows import FULL
from skipwise.positions import Document
from skipwise.rope import AdjustedBase, Mixed, RopeScaling, Scaling
from skipwise.training.trainer import check_loss, window_loss
from skipwise.utils.files import write_json
from tests.picomodels import ENCODERS, LENGTHS, byte_tokenizer, pico_encoder, picomodel
from tests.picotypes import CAUSAL_TYPES

SCALINGS: list[RopeScaling] = [
    AdjustedBase(theta=5e5) if cls is AdjustedBase else Mixed(beta_fast=4.0) if cls is Mixed else cls()
    for cls in get_args(Scaling)
]
BACKENDS = ("sdpa", "eager", BLOCKS)
YES = "yes"

Build = Callable[[], PreTrainedModel]


def extended(build: Build, scaling: RopeScaling) -> PreTrainedModel:
    """A new model with this scaling."""
    model = build()
    set_rope_scaling(model, scaling, LENGTHS)
    return model


def check_scaling(build: Build, scaling: RopeScaling) -> str:
    """The live tables are the scaling's, at both ends of its range, and windowed layers keep theirs."""
    before, model = build(), extended(build, scaling)
    info = read_rope(before.config)
    wanted, factor = scaling.frequencies(info.rotary_dim, info.theta, LENGTHS)
    tables = [module for module in model.modules() if is_rotary_table(module)]
    assert tables
    for table in tables:
        nested = isinstance(getattr(table, "rope_type", None), dict)
        found, attention = table_of(table, LENGTHS.target, FULL if nested else None)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
        assert abs(attention - factor) < 1e-6
        if nested:
            old = next(module for module in before.modules() if is_rotary_table(module))
            torch.testing.assert_close(table.sliding_attention_inv_freq, old.sliding_attention_inv_freq, rtol=0, atol=0)
    return YES


def check_backend(build: Build, backend: str) -> str:
    """With YaRN: attention reaches across a skip and sees how far it is; windowed layers are masked by distance."""
    model = extended(build, SCALINGS[0])
    if model.config._attn_implementation == "eager" and backend != "eager":
        return "the family asks for eager"
    model.set_attn_implementation(backend)
    dtype = torch.bfloat16 if backend == BLOCKS else torch.float32  # in which blocks are used
    probe_attention(model, LENGTHS.target, 1, dtype=dtype)
    layers = windowed_layers(model.config, LENGTHS.target)
    if layers is not None:
        probe_windows(model, layers, dtype)
    return YES


def check_training(build: Build) -> str:
    """With YaRN: our loss is that of the model's own logits, and a step of PoSE lowers it."""
    model = extended(build, SCALINGS[0]).train()
    check_loss(model)
    window = PoSE().sample(Document(LENGTHS.original), LENGTHS, np.random.default_rng(0))
    ids = torch.randint(2, 258, (2, LENGTHS.original), generator=torch.Generator().manual_seed(1))
    positions = torch.from_numpy(window.position_ids).expand(2, -1)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids)}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = window_loss(model, model, batch)
    before.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert window_loss(model, model, batch) < before
    return YES


def check_export(build: Build, scaling: RopeScaling) -> dict[str, str]:
    """Written, read back by plain transformers with equal logits, and the same by the rules of every reader."""
    model = extended(build, scaling)
    ids = torch.randint(2, 258, (1, 300), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        path = Path(directory) / "model"
        save_checkpoint(model, byte_tokenizer(), path, LENGTHS, card="")
        again = AutoModelForCausalLM.from_pretrained(path).eval()
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-4)
        config = json.loads((path / "config.json").read_text())
    info = read_rope(build().config)
    wanted, factor = scaling.frequencies(info.rotary_dim, info.theta, LENGTHS)
    meant = transformers_5(config)
    np.testing.assert_allclose(meant.long, wanted, rtol=1e-6)
    assert abs(meant.attention_factor - factor) < 1e-6
    found = {}
    for name, reader in READERS.items():
        try:
            found[name] = difference(reader(config), meant) or YES
        except UnreadableError as error:
            found[name] = str(error)
    return found


def check_masked_training(build: Build) -> str:
    """With YaRN: a step of PoSE lowers the loss of masked tokens."""
    model = extended(build, SCALINGS[0])  # without dropout, or both losses would be of different models
    tokenizer = byte_tokenizer()
    tokenizer.mask_token = "~"
    collator = MaskedWindowCollator(WindowCollator(PoSE(), LENGTHS), tokenizer, share=0.3)
    text = np.random.default_rng(0).integers(3, 258, (2, LENGTHS.original))
    batch = collator([{"input_ids": one, "visit": (0, number, 0)} for number, one in enumerate(text)])
    given = {**batch, "attention_mask": masks_for(model, batch)}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model(**given).loss
    before.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert model(**given).loss < before
    return YES


def check_reload(build: Build, scaling: RopeScaling) -> str:
    """Written, and read back by plain transformers with equal logits."""
    model = extended(build, scaling)
    ids = torch.randint(3, 258, (1, 300), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        model.save_pretrained(directory)
        again = AutoModelForMaskedLM.from_pretrained(directory).eval()
        torch.testing.assert_close(again(**given).logits, model(**given).logits, rtol=1e-4, atol=1e-4)
    return YES


def result_of(check: Callable[[], Any]) -> Any:
    """What a check says; a refusal in the words of its message."""
    try:
        return check()
    except UserError as error:
        return str(error).split(". ")[0]


def row_of(family: Family) -> dict[str, Any]:
    """Everything about a family."""

    def build() -> PreTrainedModel:
        return picomodel(family)

    return {
        "family": family.model_type,
        "models": family.models,
        "scalings": {one.name: result_of(partial(check_scaling, build, one)) for one in SCALINGS},
        "backends": {name: result_of(partial(check_backend, build, name)) for name in BACKENDS},
        "training": result_of(lambda: check_training(build)),
        "exports": {one.name: result_of(partial(check_export, build, one)) for one in SCALINGS},
    }


def encoder_row(kind: str) -> dict[str, Any]:
    """Everything about an encoder."""

    def build() -> PreTrainedModel:
        return pico_encoder(kind)

    return {
        "family": kind,
        "scalings": {one.name: result_of(partial(check_scaling, build, one)) for one in SCALINGS},
        "backends": {name: result_of(partial(check_backend, build, name)) for name in ("sdpa", "eager")},
        "training": result_of(lambda: check_masked_training(build)),
        "exports": {one.name: {"transformers 5": result_of(partial(check_reload, build, one))} for one in SCALINGS},
    }


def encoder_markdown(rows: list[dict[str, Any]]) -> str:
    """The rows of encoders for people."""
    lines = ["| encoder | scalings | attention | one step | transformers 5 |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        read = _summary({name: found["transformers 5"] for name, found in row["exports"].items()})
        cells = [_summary(row["scalings"]), _summary(row["backends"]), row["training"], read]
        lines.append(f"| {row['family']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows for people: a line per family, and what differs from yes below."""
    readers = list(READERS)
    headings = [{"llama.cpp": "llama.cpp's converter alone"}.get(reader, reader) for reader in readers]
    lines = [
        f"| family | models | scalings | attention | one step | {' | '.join(headings)} |",
        f"| --- | --- | --- | --- | --- | {' | '.join('---' for _ in readers)} |",
    ]
    for row in rows:
        exports = {name: found for name, found in row["exports"].items() if isinstance(found, dict)}
        read = [_summary({name: found[reader] for name, found in exports.items()}) for reader in readers]
        cells = [_summary(row["scalings"]), _summary(row["backends"]), row["training"], *read]
        lines.append(f"| {row['family']} | {row['models']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _summary(cells: dict[str, str]) -> str:
    """`all`, `none`, or all but what is not `yes`."""
    if YES not in cells.values():
        return "none"
    missing = [name for name, found in cells.items() if found != YES]
    return f"all but {', '.join(missing)}" if missing else "all"


def main() -> None:
    """Check everything, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    types = []  # first: their processes are forked from one that has not computed anything
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SKIPWISE_CACHE"] = cache
        for kind in CAUSAL_TYPES:
            types.append(outcome_apart(kind).as_dict())
            print(kind, types[-1]["outcome"], flush=True)
    rows = []
    for family in FAMILIES:
        rows.append(row_of(family))
        print(family.model_type, flush=True)
    encoders = [encoder_row(kind) for kind in ENCODERS]
    write_json(output, {"families": rows, "encoders": encoders, "model_types": types})
    print(markdown(rows))
    print(encoder_markdown(encoders))
    print(types_markdown(types))


if __name__ == "__main__":
    main()
