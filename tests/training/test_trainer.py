"""Training runs of a few steps on picomodels."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from skipwise import PoSE, UserError, WindowCollator
from skipwise.models.config import ModelConfig
from skipwise.models.forward import last_hidden_states, logits_rule
from skipwise.models.load import load_model
from skipwise.training.callbacks import TrainLog
from skipwise.training.config import TrainConfig
from skipwise.training.loss import chunked_cross_entropy
from skipwise.training.trainer import (
    Teacher,
    WindowTrainer,
    check_loss,
    train,
    training_arguments,
    window_loss,
)
from tests.picomodels import pico_llama
from tests.picotypes import small_model
from tests.training.examples import CPU, LENGTHS, examples


def run(model: PreTrainedModel, output: Path, config: TrainConfig, callbacks: list[Any], **keywords: Any) -> bool:
    arguments = training_arguments(config, output, seed=0, dtype=keywords.get("dtype", torch.float32), device=CPU)
    return train(
        model=model,
        arguments=arguments,
        dataset=examples(config.max_steps * config.per_device_train_batch_size * config.gradient_accumulation_steps),
        collator=WindowCollator(PoSE(), LENGTHS),
        eval_dataset=examples(4) if config.eval_steps else None,
        callbacks=callbacks,
        teacher=keywords.get("teacher"),
        dtype=keywords.get("dtype", torch.float32),
    ).finished


def test_our_loss_is_that_of_the_model(llama: PreTrainedModel) -> None:
    """One window, all tokens labelled: transformers' own mean over tokens."""
    batch = WindowCollator(PoSE(), LENGTHS)([examples(1)[0]])
    hf = llama(**batch, use_cache=False).loss
    torch.testing.assert_close(window_loss(llama, llama, batch), hf, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "kind", ["modernbert-decoder", "gemma3n_text", "minicpm3", "nanochat", "cohere", "granite", "llama"]
)
def test_hidden_states_are_what_the_output_layer_is_given(kind: str) -> None:
    """In ModernBERT the module called `decoder` is the output layer; MiniCPM3 divides before it; others cap or scale
    what comes out, one of them by a setting that must be a number.
    """
    model = small_model(kind)
    ids = torch.randint(2, 258, (2, 24), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = model.config.to_dict()
    with torch.no_grad():
        hidden, head = last_hidden_states(model, inputs), model.get_output_embeddings()
        product = torch.nn.functional.linear(hidden, head.weight, getattr(head, "bias", None))
        logits = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(logits_rule(model.config).apply(product), logits, rtol=1e-4, atol=1e-5)
    check_loss(model)
    assert model.config.to_dict() == before


def test_a_model_of_several_is_trained_and_its_config_stays(tmp_path: Path) -> None:
    """Its config has no `use_cache`, which stands in that of its language model."""
    model = small_model("gemma3")
    assert "use_cache" not in model.config.to_dict()
    settings = TrainConfig(max_steps=1, per_device_train_batch_size=1, learning_rate=1e-3, save_steps=10)
    assert run(model, tmp_path, settings, [])
    assert "use_cache" not in model.config.to_dict() and model.config.text_config.use_cache


def test_the_teacher_term_vanishes_for_the_teacher_itself(llama: PreTrainedModel) -> None:
    batch = WindowCollator(PoSE(), LENGTHS, untouched_share=1.0)([examples(1)[0]])
    alone, held = (window_loss(llama, llama, batch, t) for t in (None, Teacher(pico_llama(), 5.0)))
    torch.testing.assert_close(alone, held, rtol=1e-5, atol=1e-5)
    other = Teacher(pico_llama(initializer_range=0.3), 5.0)
    assert window_loss(llama, llama, batch, other) > alone + 0.1


@torch.no_grad()
def test_where_the_text_skips_the_teacher_is_asked_up_to_there(llama: PreTrainedModel) -> None:
    """Loss and KL term from whole logits. Seen to fail when all tokens had the term."""
    collator = WindowCollator(PoSE(content="uniform"), LENGTHS, mark_text=True)
    batch = collator([{"input_ids": list(range(2, 200))}] * 4)
    teacher, targets = pico_llama(initializer_range=0.3), batch["input_ids"][:, 1:, None]
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "text_runs_on")}
    ours = llama(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
    theirs = teacher(batch["input_ids"], use_cache=False).logits[:, :-1].log_softmax(-1)
    before = batch["input_ids"][:, :-1] == batch["input_ids"][:, :1] + torch.arange(31)
    assert before[:, 0].all()
    assert not before.all(dim=1).any()
    kl = (theirs.exp() * (theirs - ours)).sum(-1) * before
    expected = -ours.gather(2, targets).mean() + 0.5 * kl.mean()
    torch.testing.assert_close(window_loss(llama, llama, batch, Teacher(teacher, 0.5)), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_only_the_student_hears_echoes(llama: PreTrainedModel) -> None:
    """Loss and KL term from whole logits: the student's with the batch's mask, the teacher's as it is used to."""
    batch = WindowCollator(PoSE(), LENGTHS, echo_share=1.0)(list(examples(4)))
    assert (batch["attention_mask"] > 0).any()
    teacher, targets = pico_llama(initializer_range=0.3), batch["input_ids"][:, 1:, None]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    ours = llama(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
    theirs = teacher(batch["input_ids"], use_cache=False).logits[:, :-1].log_softmax(-1)
    expected = -ours.gather(2, targets).mean() + 0.5 * (theirs.exp() * (theirs - ours)).sum(-1).mean()
    torch.testing.assert_close(window_loss(llama, llama, batch, Teacher(teacher, 0.5)), expected, rtol=1e-5, atol=1e-5)
    eager = pico_llama(attn_implementation="eager")
    torch.testing.assert_close(window_loss(eager, eager, batch, Teacher(teacher, 0.5)), expected, rtol=1e-5, atol=1e-5)
    silent = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    assert abs(window_loss(llama, llama, silent, Teacher(teacher, 0.5)) - expected) > 1e-3


def test_the_output_layer_multiplies_in_the_compute_dtype(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer's own autocast ends with the decoder; seen to fail without ours around the loss."""
    seen = []

    def spy(hidden: torch.Tensor, *args: Any, **keywords: Any) -> torch.Tensor:
        seen.append(hidden.dtype)
        return chunked_cross_entropy(hidden, *args, **keywords)

    monkeypatch.setattr("skipwise.training.trainer.chunked_cross_entropy", spy)
    run(llama, tmp_path, TrainConfig(max_steps=1, per_device_train_batch_size=1), [], dtype=torch.bfloat16)
    assert seen == [torch.bfloat16]
    assert llama.lm_head.weight.dtype == torch.float32


def test_held_out_windows_have_no_echoes(llama: PreTrainedModel, tmp_path: Path) -> None:
    """The loss that chooses a checkpoint is that of the model as it will be used."""
    losses = []
    for share in (0.0, 1.0):
        arguments = training_arguments(TrainConfig(), tmp_path, seed=0, dtype=torch.float32, device=CPU)
        collator = WindowCollator(PoSE(), LENGTHS, echo_share=share)
        trainer = WindowTrainer(model=llama, args=arguments, eval_dataset=examples(8), data_collator=collator)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_capped_logits_are_refused(llama: PreTrainedModel) -> None:
    check_loss(llama)
    head = llama.lm_head
    head.register_forward_hook(lambda module, args, output: 3.0 * torch.tanh(output / 3.0))
    with pytest.raises(UserError, match="makes something else of it"):
        check_loss(llama)


def test_resume_ends_with_the_same_weights(tmp_path: Path) -> None:
    """Stopped after step 3 of 6 and resumed, against one that ran through."""
    config = TrainConfig(max_steps=6, learning_rate=1e-3, per_device_train_batch_size=2, save_steps=3, warmup_steps=2)
    whole = pico_llama()
    assert run(whole, tmp_path / "whole", config, [])

    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 3

    assert not run(pico_llama(), tmp_path / "parts", config, [Stop()])
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["checkpoint-3"]
    resumed = pico_llama()
    assert run(resumed, tmp_path / "parts", config, [])
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(whole.lm_head.weight, pico_llama().lm_head.weight)


def test_accumulated_steps_equal_one_large_batch(tmp_path: Path) -> None:
    """In the norm of the gradients, since AdamW's steps do not depend on their scale.

    Seen to fail when `model_accepts_loss_kwargs` was left to the Trainer.
    """
    norms = []
    for batch, accumulation in ((4, 1), (1, 4)):
        log = tmp_path / f"{batch}.jsonl"
        config = TrainConfig(
            max_steps=1,
            logging_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        run(pico_llama(), tmp_path / str(batch), config, [TrainLog(log, 1)])
        norms.append(json.loads(log.read_text().splitlines()[0])["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_small_updates_survive(tmp_path: Path) -> None:
    """Trap 10: bfloat16 is for products only; weights are float32, so steps of 1e-6 are not rounded away.

    Seen to fail when `load_model` loaded weights in bfloat16.
    """
    pico_llama().save_pretrained(tmp_path / "pico")
    model = load_model(ModelConfig(path=str(tmp_path / "pico"), dtype="bfloat16"), CPU)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    config = TrainConfig(max_steps=1, learning_rate=1e-6, warmup_steps=0, lr_scheduler_type="constant")
    arguments = training_arguments(config, tmp_path / "out", seed=0, dtype=torch.bfloat16, device=CPU)
    trainer = WindowTrainer(
        model=model,
        args=arguments,
        train_dataset=examples(4),
        data_collator=WindowCollator(PoSE(), LENGTHS),
        dtype=torch.bfloat16,
    )
    matmuls: list[torch.dtype] = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: matmuls.append(output.dtype))
    trainer.train()
    assert set(matmuls) == {torch.bfloat16}
    after = model.model.layers[0].mlp.up_proj.weight
    assert after.dtype == torch.float32
    assert (after != before).float().mean() > 0.99
    assert (after.to(torch.bfloat16) != before.to(torch.bfloat16)).float().mean() < 0.05


def test_held_out_loss_during_training(tmp_path: Path) -> None:
    config = TrainConfig(max_steps=4, eval_steps=2, save_steps=2, load_best_model_at_end=True, logging_steps=1)
    run(pico_llama(), tmp_path, config, [TrainLog(tmp_path / "log.jsonl", 1)])
    log = (tmp_path / "log.jsonl").read_text()
    assert log.count('"eval_loss"') == 2
    assert '"loss"' in log
