"""Encoders, and the two halves of an encoder-decoder: positions, attention to both sides, masked tokens."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from skipwise import (
    Lengths,
    MaskedWindowCollator,
    PoSE,
    UserError,
    WindowCollator,
    YaRN,
    masks_for,
    probe_attention,
    set_rope_scaling,
)
from skipwise.models.windowed import sees_both_ways
from tests.picomodels import ENCODER_SIZES, LENGTHS, encoder_tokenizer, pico_encoder, pico_llama, t5gemma


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_windowed_layers_see_by_distance_to_both_sides(attention: str) -> None:
    """As masks by index over a text of the target length see, in which all but the window's tokens are hidden."""
    model = pico_encoder("modernbert", attention)
    model.config.max_position_embeddings = LENGTHS.target
    positions = torch.tensor(
        [[0, 1, 2, 3, 7, 8, 9, 30, 31, 32, 33, 34], [0, 1, 20, 21, 22, 23, 26, 27, 28, 29, 60, 61]]
    )
    text = torch.randint(4, 100, (2, 64), generator=torch.Generator().manual_seed(1))
    there = torch.zeros_like(text).scatter_(1, positions, 1)
    ids, ones = text.gather(1, positions), torch.ones_like(positions)
    with torch.no_grad():
        whole = model(text, attention_mask=there).logits
        expected = whole.gather(1, positions[..., None].expand(-1, -1, whole.shape[-1]))
        masks = masks_for(model, {"attention_mask": ones, "position_ids": positions})
        ours = model(ids, attention_mask=masks, position_ids=positions).logits
        by_index = model(ids, attention_mask=ones, position_ids=positions).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert float((by_index - expected).abs().max()) > 0.05


@pytest.mark.parametrize("skipping", ["encoder", "decoder", "both"])
def test_windowed_layers_of_both_halves_see_by_distance(skipping: str) -> None:
    """Beside Hugging Face masks by index, as above; what the decoder sees of the encoder's text is all of it."""
    model = t5gemma(window=4)
    positions = {
        "encoder": torch.tensor([[0, 1, 2, 3, 7, 8, 9, 30, 31, 32, 33, 34]]),
        "decoder": torch.tensor([[0, 1, 20, 21, 22, 23, 26, 27, 28, 29]]),
    }
    positions = {
        part: own if skipping in (part, "both") else torch.arange(own.shape[1])[None] for part, own in positions.items()
    }
    generator = torch.Generator().manual_seed(1)
    text = {part: torch.randint(4, 100, (1, 64), generator=generator) for part in positions}
    there = {part: torch.zeros_like(text[part]).scatter_(1, own, 1) for part, own in positions.items()}
    ids = {part: text[part].gather(1, own) for part, own in positions.items()}
    ones = {part: torch.ones_like(own) for part, own in positions.items()}
    masks = {}
    for part in positions:
        half = getattr(model.model, part)
        half.config.max_position_embeddings = LENGTHS.target
        masks[part] = masks_for(half, {"attention_mask": ones[part], "position_ids": positions[part]})

    @torch.no_grad()
    def logits(ids: dict[str, torch.Tensor], masks: dict[str, Any], **positions: torch.Tensor) -> torch.Tensor:
        return model(
            input_ids=ids["encoder"], attention_mask=masks["encoder"], decoder_input_ids=ids["decoder"],
            decoder_attention_mask=masks["decoder"], use_cache=False, **positions,
        ).logits  # fmt: skip

    whole = logits(text, there)
    expected = whole.gather(1, positions["decoder"][..., None].expand(-1, -1, whole.shape[-1]))
    given = {"position_ids": positions["encoder"], "decoder_position_ids": positions["decoder"]}
    torch.testing.assert_close(logits(ids, masks, **given), expected, rtol=1e-4, atol=1e-4)
    assert float((logits(ids, ones, **given) - expected).abs().max()) > 0.01


def test_the_halves_of_an_encoder_decoder_are_asked_one_by_one() -> None:
    """Both at once got the masks of a decoder."""
    batch = WindowCollator(PoSE(), LENGTHS)([{"input_ids": np.arange(4, 68)}])
    with pytest.raises(UserError, match=r"Give it model\.model\.encoder and model\.model\.decoder"):
        masks_for(t5gemma(), batch)


def test_a_decoder_is_no_encoder() -> None:
    """Nor is one with a tower for images, or with attention to an encoder."""
    text = {**ENCODER_SIZES, "num_key_value_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    gemma3 = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    assert not any(map(sees_both_ways, (pico_llama(), gemma3, t5gemma().model.decoder)))
    assert all(map(sees_both_ways, (pico_encoder("eurobert"), pico_encoder("modernbert"), t5gemma().model.encoder)))


def test_both_halves_of_an_encoder_decoder_take_a_scaling() -> None:
    """T5Gemma has a RoPE in each, and they read texts of their own."""
    model = t5gemma()
    ids = torch.arange(4, 100)[None]

    @torch.no_grad()
    def logits() -> torch.Tensor:
        return model(input_ids=ids, decoder_input_ids=ids[:, :8]).logits

    for part in (model.model.encoder, model.model.decoder):
        before = logits()
        set_rope_scaling(part, YaRN(), LENGTHS)
        assert float((logits() - before).abs().max()) > 1e-4
    probe_attention(model.model.encoder, LENGTHS.target, batch_size=1)
    batch = WindowCollator(PoSE(), LENGTHS)([{"input_ids": np.arange(4, 68)}])
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    assert torch.isfinite(model(**given, labels=batch["input_ids"][:, :8]).loss)


def test_a_share_of_the_tokens_is_masked_and_never_a_special_one() -> None:
    torch.manual_seed(0)
    text = np.concatenate([[1], np.arange(4, 64), [2, 2, 2]])
    collator = MaskedWindowCollator(WindowCollator(PoSE(), Lengths(64, 64, 512)), encoder_tokenizer(), share=0.3)
    batch = collator([{"input_ids": text, "visit": (0, number, 0)} for number in range(200)])
    chosen = batch["labels"] != -100
    plain = WindowCollator(PoSE(), Lengths(64, 64, 512))(
        [{"input_ids": text, "visit": (0, number, 0)} for number in range(200)]
    )
    assert torch.equal(batch["position_ids"], plain["position_ids"])
    assert torch.equal(batch["labels"][chosen], plain["input_ids"][chosen])
    assert torch.equal(batch["input_ids"][~chosen], plain["input_ids"][~chosen])
    assert not chosen[:, [0, -1]].any()
    # 12,200 draws: five standard deviations around each share.
    assert float(chosen.sum() / (plain["input_ids"] > 3).sum()) == pytest.approx(0.3, abs=0.021)
    assert float((batch["input_ids"][chosen] == 3).float().mean()) == pytest.approx(0.8, abs=0.035)


def test_what_cannot_be_masked_is_said() -> None:
    windows = WindowCollator(PoSE(), LENGTHS)
    with pytest.raises(UserError, match="between 0 and 1, not 15"):
        MaskedWindowCollator(windows, encoder_tokenizer(), share=15)
    with pytest.raises(UserError, match="need a mask token"):
        MaskedWindowCollator(windows, encoder_tokenizer(mask=None))
    with pytest.raises(UserError, match="echo_share must be 0, not 1"):
        MaskedWindowCollator(WindowCollator(PoSE(), LENGTHS, echo_share=1.0), encoder_tokenizer())
