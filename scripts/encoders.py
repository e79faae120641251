"""Encoders to eight times their window: small ones trained from scratch to fill in masks.

    python scripts/encoders.py docs/results/encoders

Each is pretrained on windows of 128 tokens of the Python documentation and sources, in three quarters of which the last
tokens repeat earlier ones. What is measured is the share of masked tokens that are filled in rightly: in ordinary
text, and in a repetition, where the passage it repeats, at the other end of the text, helps. Compared are the
untouched model, the new positions without training (`interpolate`), and 400 steps with skips (`pose`) and without
(`plain`). ModernBERT takes YaRN in its global layers; its other layers see 16 tokens to each side and stay as they are.
In EuroBERT all layers see all of the text, and take YaRN.
BERT has a learned embedding for each of its positions: there the new ones lie between the old ones, on straight lines.

Writes rows.json and table.md; models are kept in runs/encoders, and the same command goes on where it was interrupted.
A quarter of an hour for each on one core.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from tiny_model import make_optimizers, piece_of_text, rate_share, training_data
from transformers import (
    BertConfig,
    BertForMaskedLM,
    EuroBertConfig,
    EuroBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from skipwise import (
    Lengths,
    MaskedWindowCollator,
    Plain,
    PoSE,
    WindowCollator,
    YaRN,
    masks_for,
    probe_attention,
    set_rope_scaling,
)
from skipwise.config import DataConfig, SourceConfig
from skipwise.data.builtin import PYTHON
from skipwise.data.store import open_store
from skipwise.data.windows import Source, cut_spans
from skipwise.lengths import format_length
from skipwise.models.forward import autocast
from skipwise.models.load import compute_dtype
from skipwise.runs import write_json, write_text

WINDOW, TARGET = 128, 1024
Tokens = NDArray[np.int64]
LENGTHS = Lengths(original=WINDOW, train=WINDOW, target=TARGET)
MEASURED = (128, 256, 512, 1024)
WINDOWS_PER_STEP = 32
PRETRAINING, EXTENDING = 1200, 400
# Tokens of a repetition; windows that have one; share of tokens that are masked.
REPEATED, REPEATING, MASKED = (24, 56), 0.75, 0.3
TRIALS = 48
SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": WINDOW,
    "pad_token_id": 1,
}


def modernbert(vocabulary: int) -> PreTrainedModel:
    """Every second layer sees all of the text."""
    return ModernBertForMaskedLM(
        ModernBertConfig(
            **SIZES,
            vocab_size=vocabulary,
            layer_types=["full_attention", "sliding_attention"] * 2,
            local_attention=32,
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 1200.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1200.0},
            },
            bos_token_id=0,
            eos_token_id=1,
            cls_token_id=0,
            sep_token_id=1,
        )
    )


def eurobert(vocabulary: int) -> PreTrainedModel:
    """Every layer sees all of the text."""
    rope = {"rope_type": "default", "rope_theta": 1200.0}
    config = EuroBertConfig(
        **SIZES,
        vocab_size=vocabulary,
        rope_parameters=rope,
        bos_token_id=0,
        eos_token_id=1,
        mask_token_id=vocabulary - 1,
    )
    return EuroBertForMaskedLM(config)


def bert(vocabulary: int) -> PreTrainedModel:
    """A learned embedding for each position."""
    return BertForMaskedLM(
        BertConfig(**SIZES, vocab_size=vocabulary, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )


BUILD: dict[str, Callable[[int], PreTrainedModel]] = {"modernbert": modernbert, "eurobert": eurobert, "bert": bert}


def extend_positions(model: PreTrainedModel) -> None:
    """Give a model positions up to the target."""
    if not isinstance(model, BertForMaskedLM):
        set_rope_scaling(model, YaRN(), LENGTHS)
        return
    old = model.bert.embeddings.position_embeddings.weight.data
    new = torch.nn.functional.interpolate(old.T[None], size=TARGET, mode="linear", align_corners=True)[0].T
    model.config.max_position_embeddings = TARGET
    embeddings = model.bert.embeddings
    embeddings.position_embeddings = torch.nn.Embedding.from_pretrained(new.contiguous(), freeze=False)
    embeddings.register_buffer("position_ids", torch.arange(TARGET)[None], persistent=False)
    embeddings.register_buffer("token_type_ids", torch.zeros(1, TARGET, dtype=torch.long), persistent=False)


def text_with_repetition(source: Source, length: int, rng: np.random.Generator, far: bool) -> tuple[Tokens, int]:
    """A text whose last tokens repeat earlier ones, and how many they are.

    Args:
        far: the repeated passage is the beginning of the text; otherwise anywhere before.
    """
    tokens = piece_of_text(source, length, rng).copy()
    size = int(rng.integers(*REPEATED))
    start = 1 if far else int(rng.integers(1, length - 2 * size))
    tokens[-size:] = tokens[start : start + size]
    return tokens, size


def train(
    model: PreTrainedModel,
    collator: MaskedWindowCollator,
    source: Source,
    *,
    steps: int,
    rate: float,
    report: Callable[[str], None],
) -> None:
    """Fill in masks; matrices by Muon, the rest by AdamW. Every 200 steps their mean loss is reported."""
    rng = np.random.default_rng(0)
    optimizers = make_optimizers(model)
    groups = [(group, group["lr"] * rate) for optimizer in optimizers for group in optimizer.param_groups]
    dtype = compute_dtype("auto", model.device)
    model.train()
    losses: list[float] = []
    for step in range(steps):
        for group, own in groups:
            group["lr"] = own * rate_share(step, steps)
        features = []
        for _ in range(WINDOWS_PER_STEP):
            if rng.random() < REPEATING:
                tokens, _ = text_with_repetition(source, WINDOW, rng, far=False)
            else:
                tokens = piece_of_text(source, WINDOW, rng)
            features.append({"input_ids": tokens, "visit": (0, int(rng.integers(2**31)), 0)})
        batch = collator(features)
        labels = batch.pop("labels")
        with autocast(model.device, dtype):
            logits = model(**{**batch, "attention_mask": masks_for(model, batch)}).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        if len(losses) == 200 or step == steps - 1:
            report(f"step {step + 1} of {steps}: loss {np.mean(losses):.3f}")
            losses.clear()


@torch.no_grad()
def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, source: Source, length: int) -> dict[str, Any]:
    """Share of masked tokens filled in rightly at a length: in text, and in a repetition of the text's beginning."""
    model.eval()
    rng, right = np.random.default_rng(length), {"text": [0, 0], "repetition": [0, 0]}
    for _ in range(TRIALS):
        for kind in right:
            if kind == "text":
                tokens, size = piece_of_text(source, length, rng).copy(), length
            else:
                tokens, size = text_with_repetition(source, length, rng, far=True)
            hidden = length - size + np.flatnonzero(rng.random(size) < MASKED)
            ids = torch.from_numpy(tokens)[None].clone()
            ids[0, hidden] = tokenizer.mask_token_id
            with autocast(model.device, compute_dtype("auto", model.device)):
                said = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, hidden].argmax(-1)
            right[kind][0] += int((said.numpy() == tokens[hidden]).sum())
            right[kind][1] += len(hidden)
    return {kind: {"right": one[0], "of": one[1]} for kind, one in right.items()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    heads = [f"{kind}, {format_length(length)}" for kind in ("text", "repetition") for length in MEASURED]
    lines = [f"| model | method | {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * len(heads)}"]
    for row in rows:
        cells = []
        for kind in ("text", "repetition"):
            for length in MEASURED:
                found = row["accuracy"].get(str(length))
                cells.append("none" if found is None else f"{found[kind]['right'] / found[kind]['of']:.0%}")
        lines.append(f"| {row['model']} | {row['method']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train and measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output, console = parser.parse_args().output, Console()

    def say(line: str) -> None:
        console.print(line, highlight=False)

    file, kept = output / "rows.json", Path("runs/encoders")
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    tokenizer, source, _ = training_data()
    data = DataConfig(sources=(SourceConfig(source=PYTHON),))
    documents = open_store(data.sources[0], data, tokenizer).held_out
    held_out = Source(documents, cut_spans(documents, needed=TARGET, used=1 << 30, join=False), weight=1.0)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    for name, build in BUILD.items():
        torch.manual_seed(0)
        base = kept / f"{name}.pt"
        model = build(len(tokenizer))
        collators = {
            method: MaskedWindowCollator(WindowCollator(sampler, LENGTHS), tokenizer, MASKED)
            for method, sampler in (("plain", Plain()), ("pose", PoSE()))
        }
        if not base.exists():
            say(f"{name}: {model.num_parameters():,} parameters")
            train(model, collators["plain"], source, steps=PRETRAINING, rate=1.0, report=say)
            base.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), base)
        for method in ("untouched", "interpolate", "plain", "pose"):
            if any((row["model"], row["method"]) == (name, method) for row in rows):
                continue
            torch.manual_seed(1)
            model = build(len(tokenizer))
            model.load_state_dict(torch.load(base, weights_only=True))
            if method != "untouched":
                extend_positions(model)
            if method in collators:
                if name != "bert":
                    probe_attention(model, TARGET, batch_size=WINDOWS_PER_STEP)
                train(model, collators[method], source, steps=EXTENDING, rate=0.2, report=say)
            # BERT has no positions beyond its window before it is extended.
            lengths = [n for n in MEASURED if n <= model.config.max_position_embeddings or name != "bert"]
            accuracy = {str(length): measure(model, tokenizer, held_out, length) for length in lengths}
            rows.append({"model": name, "method": method, "accuracy": accuracy})
            write_json(file, {"rows": rows})
            say(table(rows[-1:]).splitlines()[-1])
    write_text(output / "table.md", table(rows))


if __name__ == "__main__":
    main()
