"""Tiny bases of other families than the embedded Llama, to be extended: GPT-J, Baichuan 2, GPT-NeoX.

    python -m experiments.family_bases runs/families gpt_neox gptj baichuan

Each has a window of 256 tokens and is pretrained like the embedded model (experiments/tiny_model.py), with its
tokenizer and on the same data. The layouts of GPT-J and Baichuan know no other theta than 10,000, so all three have
that; at this window it lets a model find things well beyond it untouched. Baichuan begins with the embedded model's
weights and is trained for 500 steps with an output layer and a theta of its own. GPT-J and Baichuan are then converted:
what is extended is what `skipwise convert` made of them. About a quarter of an hour each on one core.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from experiments.tiny_model import WIDTH, WINDOW, pretrain, training_data
from skipwise.export.convert import convert_baichuan, convert_gptj
from skipwise.models.locate import TINY, model_location
from skipwise.runs.environment import describe_environment
from skipwise.utils.files import write_json

HEADS, LAYERS = 4, 4


class UnitRows(nn.Module):
    """Baichuan 2 divides each row of its output layer by its length."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """float[v, n] to the same shape."""
        return nn.functional.normalize(weight)


def gpt_neox(vocabulary: int) -> PreTrainedModel:
    """A quarter of each head rotated, attention and feed-forward side by side."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=WINDOW,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def gptj(vocabulary: int) -> PreTrainedModel:
    """Half of each head rotated, neighbours together."""
    return GPTJForCausalLM(
        GPTJConfig(
            vocab_size=vocabulary,
            n_positions=4 * WINDOW,  # a table of sines ends there, and passkeys are asked for beyond the window
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            rotary_dim=WIDTH // HEADS // 2,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def baichuan(vocabulary: int) -> PreTrainedModel:
    """The embedded Llama with another theta, and an output layer of its own whose rows are divided by their lengths."""
    known = LlamaForCausalLM.from_pretrained(model_location(TINY), dtype=torch.float32)
    config = LlamaConfig(**{**known.config.to_dict(), "tie_word_embeddings": False})
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0}
    model = LlamaForCausalLM(config)
    model.load_state_dict(known.state_dict())  # the output layer, too, which is there as a copy
    lengths = known.lm_head.weight.detach().norm(dim=1)
    model.model.norm.weight.data *= lengths.mean()  # or the logits would be smaller than they were
    parametrize.register_parametrization(model.lm_head, "weight", UnitRows())
    return model


def save_gpt_neox(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """As it is."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def save_gptj(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Its own layout, then Phi's."""
    own = directory.with_name(f"{directory.name}-original")
    model.config.n_positions = WINDOW
    save_gpt_neox(model, tokenizer, own)
    convert_gptj(own, directory)


def save_baichuan(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Its own layout, then Llama's."""
    own = directory.with_name(f"{directory.name}-original")
    own.mkdir(parents=True, exist_ok=True)
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith("lm_head.")}
    weights["lm_head.weight"] = model.lm_head.parametrizations.weight.original.detach()
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.self_attn"
        parts = [weights.pop(f"{prefix}.{part}_proj.weight") for part in "qkv"]
        weights[f"{prefix}.W_pack.weight"] = torch.cat(parts)
    save_file(weights, own / "model.safetensors")
    named = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
             "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id")  # fmt: skip
    config = {name: getattr(model.config, name) for name in named}
    write_json(
        own / "config.json", {**config, "model_type": "baichuan", "z_loss_weight": 0, "tie_word_embeddings": False}
    )
    convert_baichuan(own, directory)
    tokenizer.save_pretrained(directory)


STEPS = {"gpt_neox": 1200, "gptj": 1200, "baichuan": 500}
BUILD: dict[str, Callable[[int], PreTrainedModel]] = {"gpt_neox": gpt_neox, "gptj": gptj, "baichuan": baichuan}
SAVE = {"gpt_neox": save_gpt_neox, "gptj": save_gptj, "baichuan": save_baichuan}


def main() -> None:
    """Pretrain the families that are asked for and not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("families", nargs="+", choices=BUILD)
    arguments = parser.parse_args()
    console = Console()
    tokenizer, source, retrieval = training_data()
    for family in arguments.families:
        directory = arguments.output / family
        if directory.exists():
            continue
        arguments.output.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        model = BUILD[family](len(tokenizer))
        console.print(f"{family}: {model.num_parameters():,} parameters", highlight=False)
        pretrain(model, tokenizer, source, retrieval, steps=STEPS[family], seed=0, console=console)
        with tempfile.TemporaryDirectory(dir=arguments.output) as unfinished:
            SAVE[family](model, tokenizer, Path(unfinished) / family)
            recipe = {"family": family, "steps": STEPS[family], "seed": 0, "environment": describe_environment()}
            write_json(Path(unfinished) / family / "recipe.json", recipe)
            for made in sorted(Path(unfinished).iterdir(), reverse=True):  # the original layout first
                made.rename(arguments.output / made.name)


if __name__ == "__main__":
    main()
