"""Encoders to eight times their window: small ones made here, which fill in masks.

    python -m experiments.encoders docs/results/encoders [modernbert eurobert bert]

What is measured is the share of masked tokens that are filled in rightly, in held-out documentation and sources of
Python: in ordinary text, and in a repetition, where the passage it repeats, at the other end of the text, helps.
It compares the untouched model, the new positions without training (`interpolate`), and some steps with skips (`pose`)
and without (`plain`), on windows of the original length.

- ModernBERT, from nothing, 128 tokens: takes YaRN in its global layers; the others see 16 tokens to each side and stay.
- EuroBERT, 256 tokens: all layers see all of the text, and take YaRN. It has the layers of a Llama and begins with the
  weights of the embedded one, which was pretrained here as a decoder (experiments/tiny_model.py).
- BERT, from nothing, 128 tokens: has a learned embedding for each position, which begin as sinusoids; the new ones lie
  between the old ones, on straight lines.

Writes rows.json and table.md; models are kept in runs/encoders, and the same command goes on where it was interrupted.
A quarter to half an hour for each on one core.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from transformers import (
    BertConfig,
    BertForMaskedLM,
    EuroBertConfig,
    EuroBertForMaskedLM,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from experiments.tiny_model import make_optimizers, piece_of_text, rate_share, training_data
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
from skipwise.data.builtin import PYTHON
from skipwise.data.config import DataConfig, SourceConfig
from skipwise.data.store import open_store
from skipwise.data.windows import Source, cut_spans
from skipwise.models.forward import autocast
from skipwise.models.load import compute_dtype
from skipwise.models.locate import TINY, model_location
from skipwise.utils.files import short_hash, write_json, write_text

Tokens = NDArray[np.int64]
TIMES = (1, 2, 4, 8)  # the window, to be measured
MASKED, TRIALS = 0.3, 48
# Size of BERT's first position embeddings; those of its tokens begin at 0.02.
SINUSOIDS = 0.05


@dataclass(frozen=True)
class Recipe:
    """How an encoder is made.

    Attributes:
        build: the untrained model, by the size of its vocabulary and its window.
        window: of pretraining, and of training to TIMES[-1] times that, in tokens.
        windows: in a step.
        repeated: tokens of a repetition, at least and less than.
        repeating: share of windows that have one, the last tokens repeating some before them.
        pretraining, extension: steps.
        rate: of pretraining; a fifth of the full one in extension.
    """

    build: Callable[[int, int], PreTrainedModel]
    window: int = 128
    windows: int = 16
    repeated: tuple[int, int] = (24, 56)
    repeating: float = 0.75
    pretraining: int = 1200
    extension: int = 200
    rate: float = 1.0

    @property
    def lengths(self) -> Lengths:
        """For an extension."""
        return Lengths(original=self.window, train=self.window, target=TIMES[-1] * self.window)


SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "pad_token_id": 1,
}


def modernbert(vocabulary: int, window: int) -> PreTrainedModel:
    """Every second layer sees all of the text."""
    return ModernBertForMaskedLM(
        ModernBertConfig(
            **SIZES,
            max_position_embeddings=window,
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


def eurobert(vocabulary: int, window: int) -> PreTrainedModel:
    """Every layer sees all of the text. The weights of the embedded Llama, with a mask as one more token."""
    known = LlamaForCausalLM.from_pretrained(model_location(TINY), dtype=torch.float32)
    known.resize_token_embeddings(vocabulary)
    values = known.config.to_dict()
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "hidden_act", "rms_norm_eps", "bos_token_id", "eos_token_id",
            "tie_word_embeddings", "rope_parameters", "vocab_size")  # fmt: skip
    given = {name: values[name] for name in same}
    config = EuroBertConfig(**given, max_position_embeddings=window, pad_token_id=1, mask_token_id=vocabulary - 1)
    model = EuroBertForMaskedLM(config)
    model.load_state_dict(known.state_dict())
    return model


def bert(vocabulary: int, window: int) -> PreTrainedModel:
    """A learned embedding for each position; as random ones they need more steps than there are here."""
    model = BertForMaskedLM(
        BertConfig(
            **SIZES,
            max_position_embeddings=window,
            vocab_size=vocabulary,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    weight = model.bert.embeddings.position_embeddings.weight
    weight.data = SINUSOIDS * sinusoids(window, weight.shape[1])
    return model


def sinusoids(positions: int, width: int) -> torch.Tensor:
    """float32[positions, width]: sines and cosines in turn (Vaswani et al., arXiv 1706.03762, Section 3.5)."""
    angles = torch.arange(positions)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


RECIPES = {
    "modernbert": Recipe(modernbert, windows=32, repeated=(16, 40), repeating=0.5, extension=400),
    "eurobert": Recipe(eurobert, window=256, pretraining=600, rate=0.5),
    "bert": Recipe(bert, windows=32, repeated=(16, 40), repeating=0.5, pretraining=3000, extension=400),
}


def extend_positions(model: PreTrainedModel, lengths: Lengths) -> None:
    """Give a model positions up to the target."""
    if not isinstance(model, BertForMaskedLM):
        set_rope_scaling(model, YaRN(), lengths)
        return
    old = model.bert.embeddings.position_embeddings.weight.data
    new = torch.nn.functional.interpolate(old.T[None], size=lengths.target, mode="linear", align_corners=True)[0].T
    model.config.max_position_embeddings = lengths.target
    embeddings = model.bert.embeddings
    embeddings.position_embeddings = torch.nn.Embedding.from_pretrained(new.contiguous(), freeze=False)
    embeddings.register_buffer("position_ids", torch.arange(lengths.target)[None], persistent=False)
    embeddings.register_buffer("token_type_ids", torch.zeros(1, lengths.target, dtype=torch.long), persistent=False)


def text_with_repetition(
    source: Source, length: int, repeated: tuple[int, int], rng: np.random.Generator, *, far: bool
) -> tuple[Tokens, int]:
    """A text whose last tokens repeat earlier ones, and how many they are.

    Args:
        repeated: so many tokens, at least and less than.
        far: the repeated passage is the beginning of the text; otherwise anywhere before.
    """
    tokens = piece_of_text(source, length, rng).copy()
    size = int(rng.integers(*repeated))
    start = 1 if far else int(rng.integers(1, length - 2 * size))
    tokens[-size:] = tokens[start : start + size]
    return tokens, size


def train(
    model: PreTrainedModel,
    collator: MaskedWindowCollator,
    source: Source,
    recipe: Recipe,
    *,
    steps: int,
    rate: float,
    report: Callable[[str], None],
) -> None:
    """Fill in masks; matrices by Muon, the rest by AdamW. The mean loss of every 200 steps is reported."""
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
        for _ in range(recipe.windows):
            if rng.random() < recipe.repeating:
                tokens, _ = text_with_repetition(source, recipe.window, recipe.repeated, rng, far=False)
            else:
                tokens = piece_of_text(source, recipe.window, rng)
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
def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, source: Source, length: int, repeated: tuple[int, int]
) -> dict[str, Any]:
    """Share of masked tokens filled in rightly at a length: in text, and in a repetition of the text's beginning."""
    model.eval()
    rng, right = np.random.default_rng(length), {"text": [0, 0], "repetition": [0, 0]}
    for _ in range(TRIALS):
        for kind in right:
            if kind == "text":
                tokens, size = piece_of_text(source, length, rng).copy(), length
            else:
                tokens, size = text_with_repetition(source, length, repeated, rng, far=True)
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
    heads = [f"{kind}, {times}x" for kind in ("text", "repetition") for times in TIMES]
    lines = [f"| model | method | {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * len(heads)}"]
    for row in rows:
        cells = []
        for kind in ("text", "repetition"):
            for times in TIMES:
                found = row["accuracy"].get(str(times * RECIPES[row["model"]].window))
                cells.append("none" if found is None else f"{found[kind]['right'] / found[kind]['of']:.0%}")
        lines.append(f"| {row['model']} | {row['method']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train and measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("models", nargs="*", default=list(RECIPES), metavar="MODEL")
    arguments, console = parser.parse_args(), Console()
    if unknown := set(arguments.models) - set(RECIPES):
        parser.error(f"models are {', '.join(RECIPES)}, not {', '.join(unknown)}")

    def log(line: str) -> None:
        console.print(line, highlight=False)

    file, kept = arguments.output / "rows.json", Path("runs/encoders")
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    tokenizer, source, _ = training_data()
    data = DataConfig(sources=(SourceConfig(source=PYTHON),))
    documents = open_store(data.sources[0], data, tokenizer).held_out
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    for name in arguments.models:
        recipe = RECIPES[name]
        lengths = recipe.lengths
        made = {field: value for field, value in asdict(recipe).items() if field != "build"}
        made["repeated"] = list(recipe.repeated)
        if any(row["model"] == name and row["recipe"] != made for row in rows):
            parser.error(f"{file} has rows of {name} by another recipe: remove them, or choose another directory")
        spans = cut_spans(documents, needed=lengths.target, used=1 << 30, join=False)
        held_out = Source(documents, spans, weight=1.0)
        torch.manual_seed(0)
        base = kept / f"{name}-{short_hash(json.dumps(made))}.pt"
        model = recipe.build(len(tokenizer), recipe.window)
        collators = {
            method: MaskedWindowCollator(WindowCollator(sampler, lengths), tokenizer, MASKED)
            for method, sampler in (("plain", Plain()), ("pose", PoSE()))
        }
        if not base.exists():
            log(f"{name}: {model.num_parameters():,} parameters")
            train(model, collators["plain"], source, recipe, steps=recipe.pretraining, rate=recipe.rate, report=log)
            base.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), base)
        for method in ("untouched", "interpolate", "plain", "pose"):
            if any((row["model"], row["method"]) == (name, method) for row in rows):
                continue
            torch.manual_seed(1)
            model = recipe.build(len(tokenizer), recipe.window)
            model.load_state_dict(torch.load(base, weights_only=True))
            if method != "untouched":
                extend_positions(model, lengths)
            if method in collators:
                if name != "bert":
                    probe_attention(model, lengths.target, batch_size=recipe.windows)
                train(model, collators[method], source, recipe, steps=recipe.extension, rate=0.2, report=log)
            # BERT has no positions beyond its window before it is extended.
            measured = [times * recipe.window for times in TIMES]
            if name == "bert":
                measured = [length for length in measured if length <= model.config.max_position_embeddings]
            accuracy = {str(n): measure(model, tokenizer, held_out, n, recipe.repeated) for n in measured}
            rows.append({"model": name, "method": method, "recipe": made, "accuracy": accuracy})
            write_json(file, {"rows": rows})
            log(table(rows[-1:]).splitlines()[-1])
    write_text(arguments.output / "table.md", table(rows))


if __name__ == "__main__":
    main()
