"""Pretrain the embedded model: `make -f experiments/Makefile tiny-model`. It takes about 40 minutes on one busy core.

A Llama of 3.7 M parameters with a window of 256 tokens, trained on the Python standard library and on
synthetic retrieval documents. It is a stand-in for a real model: it predicts text, it retrieves, and
both fade beyond its window.

Two things make that possible in minutes. Retrieval needs heads that look at the previous tokens
before any other head can learn to look up what followed them earlier; waiting for the former to
appear takes most of a small model's pretraining, so three heads of the first layer start out that way.
And the matrices are trained with Muon.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from skipwise.data.build import is_held_out
from skipwise.data.builtin import PYTHON, python_documents
from skipwise.data.config import DataConfig, SourceConfig
from skipwise.data.mixture import retrieval_documents
from skipwise.data.retrieval import RetrievalDocuments
from skipwise.data.store import open_store
from skipwise.data.windows import Source, cut_spans
from skipwise.evaluation.passkey import count_retrieved, make_trials
from skipwise.evaluation.prompts import encoder
from skipwise.export.legacy import with_legacy_rope
from skipwise.models.forward import autocast
from skipwise.models.load import compute_dtype
from skipwise.training.trainer import window_loss
from skipwise.utils.files import short_hash, write_json

WINDOW = 256
WIDTH, HEAD_SIZE = 256, 64
# The slowest rotary pair turns once in 24 windows, that of LLaMA (10,000 at 2,048 tokens) in 27. With much
# more, a model retrieves far beyond its window untouched.
THETA = 1200.0
# How many tokens back the heads look that start out as previous-token heads.
DISTANCES = (1, 2, 3)
VOCABULARY = 2048
WINDOWS_PER_STEP = 16
# First steps: nothing but short cycles of random tokens, in short windows, until they are continued.
CYCLE_STEPS, CYCLE_WINDOW = 200, 64
RETRIEVAL_SHARE, COPIES_SHARE = 0.55, 0.33
# Windows that weigh as if this many tokens more stood in them; keys do so in whole blocks, the nearest never.
CROWD_SHARE, CROWD = 0.6, 8192
BLOCK, NEAR = 16, 24
MUON_RATE, ADAM_RATE = 0.006, 2e-3


def train_tokenizer(data: DataConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits, from the training part of the text."""
    documents = python_documents()
    training_text = (text for key, text in documents if not is_held_out(short_hash(key), data.held_out_share))
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=WINDOW
    )


def build_model(seed: int) -> LlamaForCausalLM:
    """The model before training."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=HEAD_SIZE,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    for head, distance in enumerate(DISTANCES):
        attend_to_distance(model, head, distance)
    return model


@torch.no_grad()
def attend_to_distance(model: LlamaForCausalLM, head: int, distance: int, fast: int = 8, gap: float = 6.0) -> None:
    """Make a head of the first layer look `distance` tokens back, whatever the tokens are.

    Queries and keys read a direction that all embeddings share, and lie in the `fast` fastest rotary
    pairs, the key turned by `distance`: their product is largest, by `gap` in the logits, where the
    rotation of RoPE undoes that turn.
    """
    layer = model.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(head)
    width, size = WIDTH, HEAD_SIZE
    shared = torch.nn.functional.normalize(torch.ones(width), dim=0)
    embeddings = model.model.embed_tokens.weight
    embeddings -= (embeddings @ shared)[:, None] * shared
    embeddings += embeddings.norm(dim=1).mean() * shared  # after the norm, sqrt(width / 2) along `shared`
    angles = model.model.rotary_emb.inv_freq[:fast]
    amplitude = (gap * math.sqrt(size) / (fast - angles.cos().sum())).sqrt()
    query, key = torch.zeros(size), torch.zeros(size)
    query[:fast] = amplitude
    key[:fast] = amplitude * (angles * distance).cos()
    key[size // 2 : size // 2 + fast] = amplitude * (angles * distance).sin()
    rows = slice(head * size, (head + 1) * size)
    layer.q_proj.weight[rows] = torch.outer(query, shared) / math.sqrt(width / 2)
    layer.k_proj.weight[rows] = torch.outer(key, shared) / math.sqrt(width / 2)
    # What it sees is passed on in a random subspace of the residual stream.
    layer.v_proj.weight[rows] = 0.5 * torch.linalg.qr(torch.randn(width, size, generator=generator))[0].T
    out = torch.linalg.qr(torch.randn(width, size, generator=generator))[0]
    layer.o_proj.weight[:, rows] = 0.02 * math.sqrt(width / size) * out


def make_batch(
    step: int, retrieval: RetrievalDocuments, source: Source, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Windows of one step: cycles at first, then text and retrieval documents."""
    window = CYCLE_WINDOW if step < CYCLE_STEPS else WINDOW
    ids, labels = [], []
    for _ in range(WINDOWS_PER_STEP * WINDOW // window):
        scored = np.ones(window, dtype=bool)
        if step < CYCLE_STEPS:
            tokens, scored = retrieval.cycle(window, rng)
        elif rng.random() < RETRIEVAL_SHARE:
            tokens, scored = retrieval.draw(window, rng)
        else:
            tokens = piece_of_text(source, window, rng)
        ids.append(tokens)
        labels.append(np.where(scored, tokens, -100))
    masks = np.stack([crowd_mask(window, rng) for _ in ids])
    return {
        "input_ids": torch.from_numpy(np.stack(ids)),
        "attention_mask": torch.from_numpy(masks)[:, None],
        "labels": torch.from_numpy(np.stack(labels)),
    }


def crowd_mask(window: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """float32[window, window]: a causal mask of scores, often as if the text were longer.

    Whoever has only ever chosen among 256 tokens loses its choice among thousands. A real model has seen
    thousands. So in a random half of the blocks, keys count (1 + m / e)^u times, with `CROWD` missing tokens m,
    e echoing keys and u^2 ~ U[0, 1).
    """
    query, key = np.indices((window, window))
    mask = np.where(key > query, -np.inf, 0.0).astype(np.float32)
    if rng.random() < CROWD_SHARE:
        echoing = np.repeat(rng.random(-(-window // BLOCK)) < 0.5, BLOCK)[:window]
        echoing[0] = False  # a text begins only once
        log_count = np.sqrt(rng.random()) * np.log1p(CROWD / max(1, echoing.sum()))
        mask[(query - key > NEAR) & echoing] = log_count
    return mask


def piece_of_text(source: Source, length: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Tokens of the training text, every second time with the begin-of-text token in front."""
    begin, end = source.spans[rng.integers(len(source.spans))]
    start = int(rng.integers(begin, end - length, endpoint=True))
    tokens = source.documents.read(start, start + length)
    return np.concatenate([[0], tokens[:-1]]) if rng.random() < 0.5 else tokens


def make_optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for embeddings (of positions, too) and norms."""
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    if (output := model.get_output_embeddings()) is not None:
        tables.append(output)
    embeddings = {id(weight) for table in tables for weight in table.parameters()}
    matrices = [p for p in model.parameters() if p.dim() == 2 and id(p) not in embeddings]
    others = [p for p in model.parameters() if p.dim() != 2 or id(p) in embeddings]
    muon = torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01, momentum=0.95)
    return [muon, torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)]


def rate_share(step: int, steps: int) -> float:
    """Warm-up over 30 steps, then constant, then linear decay over the last 70 %."""
    return min(1.0, (step + 1) / 30) * min(1.0, (steps - step) / (0.7 * steps))


def training_data() -> tuple[PreTrainedTokenizerFast, Source, RetrievalDocuments]:
    """A tokenizer, text, and synthetic documents in it."""
    data = DataConfig(sources=(SourceConfig(source=PYTHON),))
    tokenizer = train_tokenizer(data)
    documents = open_store(data.sources[0], data, tokenizer).train
    source = Source(documents, cut_spans(documents, needed=WINDOW, used=1 << 30, join=False), weight=1.0)
    return tokenizer, source, retrieval_documents(tokenizer, len(tokenizer), [source], COPIES_SHARE)


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    source: Source,
    retrieval: RetrievalDocuments,
    *,
    steps: int,
    seed: int,
    console: Console,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Train, and now and then report passkey accuracy and save."""
    rng = np.random.default_rng(seed)
    optimizers = make_optimizers(model)
    base_rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    dtype = compute_dtype("auto", model.device)
    for step in range(steps):
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, base_rates, strict=True):
            group["lr"] = rate * rate_share(step, steps)
        with autocast(model.device, dtype):
            loss = window_loss(model, model, make_batch(step, retrieval, source, rng))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        if step % 250 == 249 or step == steps - 1:
            accuracy = passkeys(model, tokenizer, dtype)
            console.print(f"step {step + 1}: loss {loss.item():.3f}, {accuracy}", highlight=False)
            save()


def main() -> None:
    """Train, report passkey accuracy, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("skipwise/models/tiny"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    console = Console()
    tokenizer, source, retrieval = training_data()
    model = build_model(arguments.seed)
    tokens = source.documents.lengths.sum()
    console.print(f"{model.num_parameters():,} parameters, {tokens:,} tokens of text", highlight=False)
    pretrain(
        model,
        tokenizer,
        source,
        retrieval,
        steps=arguments.steps,
        seed=arguments.seed,
        console=console,
        save=lambda: save(model, tokenizer, arguments.output),
    )


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write the model in bfloat16, half the size; training goes on in float32."""
    half = copy.deepcopy(model)
    torch.nn.Module.to(half, torch.bfloat16)
    half.save_pretrained(path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    write_json(path / "config.json", with_legacy_rope(config))
    tokenizer.save_pretrained(path)


def passkeys(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype) -> str:
    """Passkey accuracy inside the window and beyond, for the log."""
    shares = []
    for length in (128, 256, 512, 1024):
        with autocast(model.device, dtype):
            trials = make_trials(encoder(tokenizer, chat=False), length, 20, seed=1)
            shares.append(f"{length}: {count_retrieved(model, trials) / len(trials):.0%}")
    return "passkey " + ", ".join(shares)


if __name__ == "__main__":
    main()
