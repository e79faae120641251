"""Layers that see only the last tokens, in windows with skips."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Starcoder2Config,
)

from skipwise import Lengths, Mixed, YaRN, set_rope_scaling
from skipwise.errors import UserError
from skipwise.models import attention as blocks
from skipwise.models.forward import autocast
from skipwise.models.windowed import check_takes_masks, masks_for, probe_windows, windowed_layers
from skipwise.models.windows import FULL, SLIDING
from skipwise.training.activation_checkpointing import checkpoint_activations
from skipwise.training.trainer import window_loss
from tests.picomodels import pico_llama

WINDOW, TARGET = 6, 64
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": TARGET, "sliding_window": WINDOW,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ALTERNATING = [SLIDING, FULL, SLIDING]
CONFIGS: dict[str, PreTrainedConfig] = {
    "mistral": MistralConfig(**SMALL),
    "phi3": Phi3Config(**SMALL),
    "starcoder2": Starcoder2Config(**SMALL),
    "qwen2": Qwen2Config(**SMALL, use_sliding_window=True, layer_types=ALTERNATING),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, layer_types=ALTERNATING),
    "gemma3_text": Gemma3TextConfig(**SMALL, head_dim=8, layer_types=ALTERNATING),
    "olmo3": Olmo3Config(**SMALL, layer_types=ALTERNATING),
    "cohere2": Cohere2Config(**SMALL, layer_types=ALTERNATING),
}


def picomodel(kind: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation=attention).eval()
    with torch.no_grad():
        for weight in model.parameters():  # or attention is nearly uniform, and hides little
            weight.mul_(3.0)
    return model


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        (kind, attention)
        for kind in CONFIGS
        for attention in ("sdpa", "eager")
        if (kind, attention) != ("gemma2", "sdpa")
    ],
)
def test_a_window_with_skips_sees_what_its_tokens_would_see_in_the_whole_text(kind: str, attention: str) -> None:
    """As masks by index over a text of the target length see, in which all but the window's tokens are hidden."""
    model = picomodel(kind, attention)
    generator = torch.Generator().manual_seed(1)
    positions = torch.tensor(
        [[0, 1, 2, 3, 7, 8, 9, 30, 31, 32, 33, 34], [0, 1, 20, 21, 22, 23, 24, 25, 26, 27, 60, 61]]
    )
    text = torch.randint(3, 100, (2, TARGET), generator=generator)
    there = torch.zeros_like(text).scatter_(1, positions, 1)
    with torch.no_grad():
        whole = model(text, attention_mask=there, position_ids=torch.arange(TARGET).expand(2, -1), use_cache=False)
        layers = windowed_layers(model.config, TARGET)
        assert layers is not None
        masks = masks_for(model, {"attention_mask": torch.ones_like(positions), "position_ids": positions})
        ids = text.gather(1, positions)
        ours = model(ids, attention_mask=masks, position_ids=positions, use_cache=False).logits
        by_index = model(ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False).logits
    expected = whole.logits.gather(1, positions[..., None].expand(-1, -1, 100))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert float((by_index - expected).abs().max()) > 1e-2  # what Hugging Face masks would do
    probe_windows(model, layers)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["mistral", "qwen2", "gemma3_text"])
def test_training_masks_by_distance(kind: str, attention: str, recomputed: bool) -> None:
    """The loss of a window is that of its tokens in the whole text, and so are gradients."""
    model = picomodel(kind, attention).train()
    if recomputed:
        checkpoint_activations(model, "all")
    positions = torch.tensor([[0, 1, 2, 3, 7, 8, 9, 30, 31, 32, 33, 34]])
    text = torch.randint(3, 100, (1, TARGET), generator=torch.Generator().manual_seed(1))
    there = torch.zeros_like(text).scatter_(1, positions, 1)
    ids = text.gather(1, positions)
    window = {"input_ids": ids, "labels": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids)}
    loss = window_loss(model, model, window)
    loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    model.zero_grad(set_to_none=True)
    logits = model(text, attention_mask=there, position_ids=torch.arange(TARGET)[None], use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[0, positions[0, :-1]], ids[0, 1:])
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, model.get_input_embeddings().weight.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_blocks_mask_by_distance_as_well(kind: str) -> None:
    """In bfloat16, where they are used; rounding is smaller than what Hugging Face masks by index would change."""
    positions = torch.tensor([[0, 1, 2, 3, 7, 8, 9, 30, 31, 32, 33, 34]])
    ids = torch.randint(3, 100, positions.shape, generator=torch.Generator().manual_seed(1))
    ones = torch.ones_like(ids)
    window = {"input_ids": ids, "labels": ids, "position_ids": positions, "attention_mask": ones}
    hf, ours = picomodel(kind, "sdpa"), picomodel(kind, blocks.NAME)
    with torch.no_grad():
        expected = window_loss(hf, hf, window)
        logits = hf(ids, position_ids=positions, attention_mask=ones, use_cache=False).logits
        by_index = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        with autocast(ids.device, torch.bfloat16):
            loss = window_loss(ours, ours, window)
    assert abs(float(loss - expected)) < 0.3 * abs(float(by_index - expected))


def test_nothing_is_masked_anew_where_nothing_is_skipped() -> None:
    ones = torch.ones(2, 8, dtype=torch.int64)
    inputs = {"attention_mask": ones, "position_ids": torch.arange(8).expand(2, -1)}
    assert masks_for(picomodel("qwen2", "sdpa"), inputs) is ones
    assert masks_for(picomodel("qwen2", "sdpa"), {"attention_mask": ones}) is ones


def test_scores_that_are_there_stay() -> None:
    positions = torch.tensor([[0, 1, 2, 20]])
    scores = torch.full((1, 1, 4, 4), -torch.inf).triu(1)
    scores[..., 3, 0] = scores[..., 2, 0] = 2.5
    masks = masks_for(picomodel("qwen2", "sdpa"), {"attention_mask": scores, "position_ids": positions})
    assert isinstance(masks, dict)
    assert masks[FULL] is scores
    near = masks[SLIDING]
    assert near is not None
    assert near[0, 0].tolist()[2:] == [[2.5, 0.0, 0.0, -torch.inf], [-torch.inf, -torch.inf, -torch.inf, 0.0]]


def test_which_layers_are_windowed() -> None:
    mixed = windowed_layers(CONFIGS["qwen2"], TARGET)
    assert mixed is not None and (mixed.windowed, mixed.total, mixed.by_kind) == (2, 3, True)
    assert mixed.describe().startswith("2 of 3 layers see only the last 6 tokens")
    everywhere = windowed_layers(CONFIGS["mistral"], TARGET)
    assert everywhere is not None and (everywhere.windowed, everywhere.by_kind) == (3, False)
    assert everywhere.describe().startswith("All 3 layers see only the last 6 tokens")
    assert windowed_layers(CONFIGS["mistral"], WINDOW) is None  # no window is shorter
    assert windowed_layers(Qwen2Config(**SMALL, use_sliding_window=False), TARGET) is None
    assert windowed_layers(LlamaConfig(), TARGET) is None


def test_other_kinds_of_layers_are_refused() -> None:
    config = Qwen2Config(**SMALL, use_sliding_window=True, layer_types=ALTERNATING)
    config.layer_types = [FULL, "chunked_attention", FULL]
    with pytest.raises(UserError, match="chunked_attention"):
        windowed_layers(config, TARGET)


def test_attention_that_takes_no_masks_is_refused() -> None:
    model = picomodel("mistral", "sdpa")
    check_takes_masks(model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="attn_implementation=sdpa"):
        check_takes_masks(model)


def test_a_model_that_takes_no_mask_for_them_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = picomodel("qwen2", "sdpa")
    layers = windowed_layers(model.config, TARGET)
    assert layers is not None
    forward = model.forward

    def deaf(**keywords: Any) -> Any:
        return forward(**{**keywords, "attention_mask": torch.ones_like(keywords["input_ids"])})

    monkeypatch.setattr(model, "forward", deaf)
    with pytest.raises(UserError, match="takes no mask for them"):
        probe_windows(model, layers)


def test_a_batch_for_two_rotary_tables_is_refused(llama: PreTrainedModel) -> None:
    """With untouched windows and the default of WindowCollator logits were off by 8.8."""
    lengths = Lengths(original=64, train=64, target=512)
    factors = Mixed()
    set_rope_scaling(llama, factors, lengths)
    ordinary, skipped = torch.arange(64), torch.arange(64) + 100 * (torch.arange(64) > 30)
    ones = torch.ones(2, 64, dtype=torch.long)
    for rows in ((ordinary, ordinary), (skipped, skipped)):
        masks_for(llama, {"attention_mask": ones, "position_ids": torch.stack(rows)})
    with pytest.raises(UserError) as caught:
        masks_for(llama, {"attention_mask": ones, "position_ids": torch.stack((ordinary, skipped))})
    assert caught.value.code == "batch_needs_two_tables"
    yarn = pico_llama()
    set_rope_scaling(yarn, YaRN(), lengths)
    masks_for(yarn, {"attention_mask": ones, "position_ids": torch.stack((ordinary, skipped))})
