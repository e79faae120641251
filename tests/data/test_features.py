"""What features of other people's loops carry is honoured, or refused."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments

from skipwise import CREAM, Lengths, PoSE, UserError, WindowCollator
from skipwise.data.features import start_in, tokens_of
from skipwise.data.masked import MaskedWindowCollator
from tests.picomodels import byte_tokenizer

LENGTHS = Lengths(original=64, train=64, target=512)
COLLATOR = WindowCollator(PoSE(), LENGTHS)
IDS = list(range(1000, 1064))


def test_labels_and_masks_of_losses_are_honoured() -> None:
    """64 labelled tokens came out of a feature whose labels were all -100."""
    half = [0] * 32 + [1] * 32
    for feature in (
        {"labels": [-100] * 32 + IDS[32:]},
        {"completion_mask": half},
        {"assistant_masks": half},
        {"completion_mask": [0] * 16 + [1] * 48, "labels": [-100] * 32 + IDS[32:]},
    ):
        labels = COLLATOR([{"input_ids": IDS, **feature}])["labels"][0]
        assert labels.tolist() == [-100] * 32 + IDS[32:], feature
    assert (COLLATOR([{"input_ids": IDS, "labels": [-100] * 64}])["labels"] == -100).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(side: str) -> None:
    """Neither in a window nor at a position: the same window as without it."""
    padding, zeros = [7] * 30, [0] * 30
    ids, mask = ([*padding, *IDS], [*zeros, *[1] * 64]) if side == "left" else ([*IDS, *padding], [*[1] * 64, *zeros])
    padded = {"input_ids": ids, "attention_mask": mask, "labels": ids, "position_ids": [*range(94)], "visit": (0, 0, 0)}
    plain = {"input_ids": IDS, "visit": (0, 0, 0)}
    one, other = COLLATOR([padded]), COLLATOR([plain])
    for name, values in one.items():
        assert torch.equal(values, other[name]), name
    with pytest.raises(UserError) as caught:
        COLLATOR([plain, {**padded, "input_ids": ids[:94], "attention_mask": [0, 1] * 47}])
    assert caught.value.code == "mask_has_holes" and "Feature 1" in str(caught.value)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fewer labels": ({"labels": IDS[:60]}, "lengths_differ"),
    "a longer mask": ({"attention_mask": [1] * 65}, "lengths_differ"),
    "shifted labels": ({"labels": [*IDS[1:], 5]}, "labels_not_tokens"),
    "nothing but padding": ({"attention_mask": [0] * 64}, "mask_has_holes"),
    "packed positions": ({"position_ids": [*range(32), *range(32)]}, "feature_not_one_text"),
    "packed, by flash attention": ({"cu_seq_lens_q": [0, 32, 64]}, "feature_not_one_text"),
    "packed, by state": ({"seq_idx": [0] * 32 + [1] * 32}, "feature_not_one_text"),
    "an image": ({"pixel_values": np.zeros((3, 4, 4))}, "feature_not_one_text"),
    "a batch": ({"input_ids": [IDS]}, "feature_not_a_list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused(name: str) -> None:
    columns, code = REFUSED[name]
    with pytest.raises(UserError) as caught:
        tokens_of({"input_ids": IDS, **columns}, 3)
    assert caught.value.code == code and "Feature 3" in str(caught.value)


def test_other_columns_change_nothing() -> None:
    found = tokens_of({"input_ids": IDS, "token_type_ids": [0] * 64, "text": "words", "labels": None}, 0)
    assert found.ids.tolist() == IDS and found.scored is None


@pytest.mark.parametrize("sampler", [PoSE(), PoSE(content="uniform"), PoSE(chunks=3), CREAM()], ids=str)
def test_all_of_a_long_text_is_used(sampler: Any) -> None:
    """Of items of 640 tokens nothing beyond token 63 was seen in any epoch."""
    collator, tenths = WindowCollator(sampler, LENGTHS), np.zeros(10, dtype=int)
    torch.manual_seed(0)
    for _ in range(100):
        tenths += np.bincount(collator([{"input_ids": list(range(640))}])["input_ids"][0] // 64, minlength=10)
    assert tenths.min() > 0


def test_the_start_is_uniform_and_repeats_with_its_visit() -> None:
    draws = [start_in(72, 64, None, np.random.default_rng(seed)) for seed in range(4000)]
    counts = np.bincount(draws, minlength=9)
    assert len(counts) == 9 and counts.min() > 350  # 444 of each; 5 standard deviations below are 345
    long = {"input_ids": list(range(640)), "visit": (1, 2, 3)}
    assert torch.equal(COLLATOR([long])["input_ids"], COLLATOR([long])["input_ids"])
    other = COLLATOR([{**long, "visit": (2, 2, 3)}])["input_ids"]
    assert not torch.equal(COLLATOR([long])["input_ids"], other)


def test_a_window_of_a_long_text_has_a_loss_where_one_can() -> None:
    """Of a prompt of 600 tokens and an answer of 8, most windows would have none."""
    labels = [-100] * 600 + list(range(600, 608)) + [-100] * 32
    for visit in range(100):
        batch = COLLATOR([{"input_ids": list(range(640)), "labels": labels, "visit": (visit, 0, 0)}])
        assert (batch["labels"][:, 1:] != -100).any()


def test_an_encoder_is_not_asked_for_tokens_without_a_loss() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.mask_token = "~"
    collator = MaskedWindowCollator(COLLATOR, tokenizer, share=0.9)
    ids = list(range(10, 74))
    batch = collator([{"input_ids": ids, "labels": [-100] * 32 + ids[32:]}] * 8)
    assert (batch["labels"][:, :32] == -100).all() and (batch["labels"][:, 32:] != -100).any()


def test_workers_of_several_processes_draw_other_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker knows neither the environment of its process nor its group; both processes seed alike."""
    data = [{"input_ids": list(range(640))}] * 8
    drawn = []
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        torch.manual_seed(0)
        loader = DataLoader(data, batch_size=4, num_workers=1, collate_fn=COLLATOR)  # type: ignore[arg-type]
        drawn.append(torch.cat([batch["position_ids"] for batch in loader]))
    assert not torch.equal(*drawn)


def test_a_trainer_with_prompts_learns_from_answers_alone(llama: PreTrainedModel, tmp_path: Any) -> None:
    """The loss of a Hugging Face Trainer is that of the labelled tokens."""
    ids = list(range(10, 74))
    feature = {"input_ids": ids, "labels": [-100] * 60 + ids[60:], "attention_mask": [1] * 64}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False)
    trainer = Trainer(model=llama.eval(), args=arguments, train_dataset=[feature], data_collator=COLLATOR)
    torch.manual_seed(0)
    batch = COLLATOR([feature])
    with torch.no_grad():
        loss = trainer.compute_loss(llama, dict(batch))
        logits = llama(**{name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}).logits
    wanted = torch.nn.functional.cross_entropy(logits[0, 59:63], batch["input_ids"][0, 60:])
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-4)
