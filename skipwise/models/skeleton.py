"""A model without its weights, on the meta device: what its class makes of a config, whatever that says of itself."""

import copy
import inspect
import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from skipwise.lengths import Lengths
from skipwise.models.rope import rotary_tables, set_rope_scaling, settable_tables
from skipwise.rope import RopeScaling

# The module of a layer that weighs tokens: `self_attn`, `attention`, `attn` in the families of transformers.
_ATTENTION = re.compile(r"(^|\.)(self_attn|self_attention|attention|attn)$")
# Modules and weights of which a router chooses a few for every token.
_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")
# How configs call the number of experts that exist, and the number that a token is sent to.
_ALL_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN_EXPERTS = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts")


@dataclass(frozen=True)
class Parameters:
    """Weights of a model, tied ones once.

    Attributes:
        total: all of them.
        active: those that one token is multiplied with or looked up in; fewer with a mixture of experts.
        not_loaded: of layers for multi-token prediction, which checkpoints hold and transformers leaves out.
    """

    total: int
    active: int
    not_loaded: int = 0


def build_skeleton(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config, without memory for its weights. What its class raises goes through."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model.eval()
    return model


def count_parameters(model: PreTrainedModel) -> Parameters:
    """How many weights a model has, and how many of them a token meets."""
    config = model.config.get_text_config()
    experts = next((n for key in _ALL_EXPERTS if isinstance(n := getattr(config, key, None), int) and n), 0)
    chosen = next((n for key in _CHOSEN_EXPERTS if isinstance(n := getattr(config, key, None), int) and n), 0)
    total = int(model.num_parameters())
    routed = sum(weight.numel() for name, weight in model.named_parameters() if _EXPERTS.search(name))
    active = total - round(routed * (1 - chosen / experts)) if experts and chosen else total
    return Parameters(total, active, _multi_token_prediction(model))


def _multi_token_prediction(model: PreTrainedModel) -> int:
    """Weights of the layers that predict tokens after the next one (DeepSeek-V3, arXiv 2412.19437, Section 2.2).

    Each is a layer like the last one, a projection of two hidden states to one, three norms, and in published
    checkpoints a copy of both embeddings.
    """
    config = model.config.get_text_config()
    layers = getattr(config, "num_nextn_predict_layers", None) or 0
    if not layers:
        return 0
    last = max(model.named_modules(), key=lambda named: _layer_number(named[0]))[1]
    hidden = config.hidden_size
    around = 2 * hidden**2 + 3 * hidden + 2 * config.vocab_size * hidden
    return int(layers * (sum(weight.numel() for weight in last.parameters()) + around))


def _layer_number(name: str) -> int:
    """Of a module that is a layer of the decoder; -1 for any other."""
    number = re.fullmatch(r"(?:model\.)?layers\.(\d+)", name)
    return -1 if number is None else int(number[1])


def rotary_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The rotary tables of a skeleton, made again with their values; by name."""
    config = model.config.get_text_config()
    return {name: type(table)(config=config) for name, table in settable_tables(model).items()}


def check_scaling(config: PreTrainedConfig, scaling: RopeScaling, lengths: Lengths, trust_remote_code: bool) -> None:
    """Raise `UserError` where `set_rope_scaling` would, before any weights are loaded; `config` stays as it is."""
    set_rope_scaling(build_skeleton(copy.deepcopy(config), trust_remote_code), scaling, lengths)


def layers_with_rope(model: PreTrainedModel) -> dict[int, bool]:
    """Of each attention layer, by number: whether its output depends on the rotary embedding that it is given.

    The layer itself is asked: its output is traced to the cosines and sines. A layer that takes none, or does not run
    on its own, is left out.

    Args:
        model: a skeleton.
    """
    table = next(iter(rotary_tables(model).values()), None)
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    found = {}
    for name, layer in model.named_modules():
        number = getattr(layer, "layer_idx", None)
        if table is None or number is None or not _ATTENTION.search(name):
            continue
        if "position_embeddings" not in inspect.signature(layer.forward).parameters:  # it has a table of its own
            continue
        try:
            found[int(number)] = _depends_on_rope(layer, table, kinds[number] if kinds else None, text.hidden_size)
        except Exception:  # code of any family, asked for something that it may not do alone
            continue
    return found


def _depends_on_rope(layer: nn.Module, table: nn.Module, kind: str | None, hidden_size: int) -> bool:
    """Whether gradients would flow from the output of an attention layer to its rotary embedding."""
    hidden = torch.empty(1, 2, hidden_size, device="meta")
    positions = torch.empty(1, 2, dtype=torch.long, device="meta")
    own = kind is not None and hasattr(table, f"{kind}_inv_freq")
    made = table(hidden, positions, *([kind] if own else []))
    leaves = [part.detach().requires_grad_() for part in (made if isinstance(made, tuple) else (made,))]
    for weight in layer.parameters():
        weight.requires_grad_(False)
    given = {"hidden_states": hidden, "position_embeddings": tuple(leaves) if isinstance(made, tuple) else leaves[0]}
    given |= {"attention_mask": None, "alibi": None, "position_ids": positions}
    accepted = inspect.signature(layer.forward).parameters
    with torch.enable_grad():
        output = layer(**{key: value for key, value in given.items() if key in accepted})
    return bool((output[0] if isinstance(output, tuple) else output).requires_grad)
