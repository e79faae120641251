"""Is what was written what was in memory? It is read back with stock transformers alone, and compared."""

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

# Tokens of the text on which losses are compared, and by how much they may differ: weights in float32 give equal ones
# but for the order of sums, those rounded to 16 bits do not.
PROOF_TOKENS = 64
EQUAL, ROUNDED = 1e-3, 0.05
# What the tokenizers are compared on.
SAMPLE = "A tokenizer's sample: 3 words, ünïcode and\n  spaces."


@torch.no_grad()
def proof_loss(model: PreTrainedModel) -> float:
    """The loss, in nats a token, on a fixed text of random tokens. The model's mode is kept.

    Args:
        model: whole, on one device.
    """
    ids = torch.randint(vocabulary_size(model), (1, PROOF_TOKENS), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
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
        raise _differs(path, f"transformers does not open it ({type(error).__name__}: {error})") from error
    read, found = loaded
    if missing := found["missing_keys"]:
        raise _differs(path, f"{len(missing):,} weights are missing in its files, {sorted(missing)[0]} among them")
    if opened and tokenizer and opened(SAMPLE)["input_ids"] != tokenizer(SAMPLE)["input_ids"]:
        raise _differs(path, "its tokenizer makes other tokens")
    if tables is not None and lengths is not None:
        theirs = rotary_tables(read)
        if len(tables) != len(theirs) or not all(map(same_table, tables.values(), theirs.values(), repeat(lengths))):
            raise _differs(path, "its rotary tables are others")
    again = proof_loss(read)
    if not abs(again - loss) <= tolerance * max(1.0, loss):
        raise _differs(path, f"its loss on the same tokens is {again:.4f}, and that of the model in memory {loss:.4f}")


def prove_copy(source: Path, copy: Path, rounded: bool = False, trust_remote_code: bool = False) -> None:
    """Open a model and its copy, and compare.

    Args:
        source: directory of the model.
        copy: directory of the copy.
        rounded: whether the weights of the copy are in 16 bits and those of the model need not be.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        UserError: as `prove`.
    """
    keywords: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **keywords)
    loss, tables, lengths = proof_loss(model), rotary_tables(model), lengths_of(model.config)
    del model  # one of them at a time
    there = (source / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(source, **keywords) if there else None
    prove(copy, loss, tokenizer, tables, lengths, ROUNDED if rounded else EQUAL, trust_remote_code)


def _differs(path: Path, what: str) -> UserError:
    return UserError(
        f"What is written must be the model in memory, but of {path} {what}. This family cannot be written as it is; "
        "choose another --rope, or another model.",
        code="written_model_differs",
    )
