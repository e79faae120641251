"""Is what was written what was in memory? It is read back with plain transformers alone, and compared."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.models.attention import attention_in_float32
from skipwise.models.load import default_device, vocabulary_size
from skipwise.models.rope import lengths_of, rotary_tables, same_table
from skipwise.models.weights import check_finite, check_tied

# Tokens of the text on which losses are compared, and by how much they may differ: weights in float32 give equal ones
# but for the order of sums, those rounded to 16 bits do not.
PROOF_TOKENS = 64
EQUAL, ROUNDED = 1e-3, 0.05
# What the tokenizers are compared on.
SAMPLE = "A tokenizer's sample: 3 words, ünïcode and\n  spaces."


def proof_ids(model: PreTrainedModel) -> torch.Tensor:
    """int64[1, PROOF_TOKENS]: the text on which losses are compared."""
    return torch.randint(vocabulary_size(model), (1, PROOF_TOKENS), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def proof_loss(model: PreTrainedModel) -> float:
    """The loss, in nats a token, on a fixed text of random tokens. The model's mode is kept.

    Args:
        model: whole, on one device.
    """
    ids = proof_ids(model).to(model.device)
    mode = model.training
    model.eval()
    try:
        # Compiling for one text takes longer than reading it.
        with attention_in_float32(model), torch.compiler.set_stance("force_eager"):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
    finally:
        model.train(mode)
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))


@contextmanager
def randomness_kept() -> Iterator[None]:
    """Leave the random numbers that training draws as they are."""
    states, devices = (random.getstate(), np.random.get_state()), range(torch.accelerator.device_count())
    with torch.random.fork_rng(devices, device_type=default_device().type if devices else "cuda"):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def prove(
    path: Path,
    loss: float,
    tokenizer: PreTrainedTokenizerBase | None,
    tables: Mapping[str, nn.Module] | None = None,
    lengths: Lengths | None = None,
    tolerance: float = EQUAL,
    trust_remote_code: bool = False,
    remedy: str = "This family cannot be written as it is. Choose another --rope, or another model.",
) -> None:
    """Open a written model with plain `AutoModelForCausalLM` and `AutoTokenizer`, and compare.

    Args:
        path: the directory that was written.
        loss: of the model in memory (`proof_loss`).
        tokenizer: that was written; None for none.
        tables: the rotary tables of the model in memory (`rotary_tables`); None to compare none.
        lengths: at which these are compared.
        tolerance: share of the loss by which the two may differ.
        trust_remote_code: whether code that comes with the model may run.
        remedy: what to do where it is another one.

    Raises:
        UserError: when it cannot be opened, or is another model or tokenizer.
    """
    try:
        keywords: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, **keywords
        )
        opened = None if tokenizer is None else AutoTokenizer.from_pretrained(path, **keywords)
    except Exception as error:  # whatever a stranger would see
        raise _differs(f"transformers does not open it ({type(error).__name__}: {error})", remedy) from error
    read, found = loaded
    if missing := found["missing_keys"]:
        raise _differs(f"{len(missing):,} weights are missing in its files, {sorted(missing)[0]} among them", remedy)
    if opened and tokenizer and opened(SAMPLE)["input_ids"] != tokenizer(SAMPLE)["input_ids"]:
        raise _differs("its tokenizer makes other tokens", remedy)
    if tables is not None and lengths is not None:
        theirs = rotary_tables(read)
        if len(tables) != len(theirs) or not all(map(same_table, tables.values(), theirs.values(), repeat(lengths))):
            raise _differs("its rotary tables are others", remedy)
    again = proof_loss(read)
    if not abs(again - loss) <= tolerance * max(1.0, loss):
        raise _differs(f"its loss on the same tokens is {again:.4f} instead of {loss:.4f}", remedy)


def prove_copy(source: Path, copy: Path, rounded: bool = False, trust_remote_code: bool = False) -> None:
    """Open a model and its copy, and compare.

    Args:
        source: directory of the model.
        copy: directory of the copy.
        rounded: whether the weights of the copy are in 16 bits and those of the model need not be.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        UserError: as `prove`, and for a model with weights that are not finite, or tied ones that differ.
    """
    keywords: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **keywords)
    check_tied(str(source), model)
    check_finite(str(source), model)
    loss, tables, lengths = proof_loss(model), rotary_tables(model), lengths_of(model.config)
    del model  # one of them at a time
    there = (source / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(source, **keywords) if there else None
    tolerance = ROUNDED if rounded else EQUAL
    remedy = "Choose another --dtype, or leave it out." if rounded else "This family cannot be copied as it is."
    prove(copy, loss, tokenizer, tables, lengths, tolerance, trust_remote_code, remedy)


def _differs(what: str, remedy: str) -> UserError:
    return UserError(
        f"A model that was written must be the same when it is read back, but {what}. {remedy}",
        code="written_model_differs",
    )
