"""Training-free methods against their papers' definitions, computed token by token."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from skipwise import Lengths, Linear, Mixed, RopeScaling, UserError, YaRN, set_rope_scaling
from skipwise.evaluation.inference import score_tokens
from skipwise.evaluation.training_free import TrainingFree, split_training_free
from skipwise.evaluation.training_free_attention import (
    BLOCK,
    ROWS,
    SINKS,
    Turned,
    check_training_free,
    recent_scores,
    use_training_free,
)
from skipwise.models.families import FAMILIES, Family
from tests.picomodels import PICO_MODELS, WINDOW, pico_llama, picomodel

TRAINING_FREE = [TrainingFree("self-extend", 4), TrainingFree("sinks", 16), TrainingFree("memory", 2)]


def positions_of(training_free: TrainingFree, i: int, j: int) -> tuple[int, int] | None:
    """Where a query at i and a key at j stand for each other; None where the key is not seen."""
    distance = i - j
    if training_free.name == "self-extend":
        group, near = training_free.number or 8, WINDOW // 2
        return (i, j) if distance < near else (i // group + near - near // group, j // group)
    recent = training_free.number or 0
    if distance < recent:
        return i, j
    return (recent, 0) if j < SINKS else None


def reference(model: PreTrainedModel, training_free: TrainingFree, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a Llama whose attention is written out, with positions as in the papers. float[n, vocabulary]"""
    base, config = model.model, model.config
    heads, kv, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    frequencies = base.rotary_emb.inv_freq

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        angles = torch.cat([position * frequencies] * 2)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    x = base.embed_tokens(ids)
    n = len(ids)
    for layer in base.layers:
        y = layer.input_layernorm(x)
        attention = layer.self_attn
        q = attention.q_proj(y).view(n, heads, size)
        k, v = (p(y).view(n, kv, size).repeat_interleave(heads // kv, 1) for p in (attention.k_proj, attention.v_proj))
        rows = []
        for i in range(n):
            places = [positions_of(training_free, i, j) for j in range(i + 1)]
            seen = [j for j, place in enumerate(places) if place is not None]
            scores = torch.stack([(turned(q[i], places[j][0]) * turned(k[j], places[j][1])).sum(-1) for j in seen], -1)
            shares = (scores / math.sqrt(size)).softmax(-1)
            rows.append(torch.einsum("hj,jhd->hd", shares, v[seen]).reshape(-1))
        x = x + attention.o_proj(torch.stack(rows))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(base.norm(x))


@pytest.mark.parametrize("training_free", TRAINING_FREE[:2], ids=lambda training_free: training_free.name)
@torch.no_grad()
def test_attention_is_that_of_the_paper(training_free: TrainingFree) -> None:
    model = pico_llama()
    ids = torch.randint(2, 258, (2 * WINDOW,), generator=torch.Generator().manual_seed(0))
    expected = reference(model, training_free, ids)
    plain = model(ids[None]).logits[0]
    use_training_free(model, training_free)
    torch.testing.assert_close(model(ids[None]).logits[0], expected, rtol=1e-3, atol=1e-3)
    assert float((plain - expected)[-1].abs().max()) > 0.01


@pytest.mark.parametrize(
    "training_free",
    [*TRAINING_FREE, TrainingFree("self-extend"), TrainingFree("sinks"), TrainingFree("memory")],
    ids=str,
)
@pytest.mark.parametrize("kind", PICO_MODELS)
@torch.no_grad()
def test_inside_the_window_nothing_changes(kind: str, training_free: TrainingFree) -> None:
    """All distances are near: up to half of the window, or what the sinks' number says."""
    model, aided = PICO_MODELS[kind](), PICO_MODELS[kind]()
    use_training_free(aided, training_free)
    ids = torch.randint(2, 258, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(aided(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training_free", TRAINING_FREE, ids=lambda training_free: training_free.name)
@torch.no_grad()
def test_a_cache_changes_nothing(training_free: TrainingFree) -> None:
    """Wherever a text is cut in pieces."""
    model = pico_llama()
    use_training_free(model, training_free)
    ids = torch.randint(2, 258, (1, 3 * ROWS), generator=torch.Generator().manual_seed(0))
    whole = model(ids, use_cache=False).logits
    for cut in (ROWS, 201):
        first = model(ids[:, :cut], use_cache=True)
        rest = model(ids[:, cut:], past_key_values=first.past_key_values, use_cache=True)
        torch.testing.assert_close(rest.logits, whole[:, cut:], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_memory_sees_the_block_that_is_most_like_the_query() -> None:
    """Of one layer, against blocks chosen by hand; and everything that is not in a whole block yet."""
    recent, blocks, size = WINDOW // 2, 1, 16
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 2, 7 * BLOCK, size, generator=generator)
    frequencies = 10000.0 ** (-torch.arange(0, size, 2) / size)
    turned = Turned(query, key, frequencies, 1.0)
    n = query.shape[2]
    start = n - ROWS
    scores = recent_scores(turned, start, n, recent=recent, blocks=blocks)
    plain_query = turned.moved(query, -turned.keys_at)
    plain_key = turned.moved(key, -turned.keys_at)
    for head in range(2):
        for i in (start, start + 77, n - 1):
            whole = (i - recent + 1) // BLOCK
            means = torch.stack([plain_key[0, head, b * BLOCK : (b + 1) * BLOCK].mean(0) for b in range(whole)])
            best = int((means @ plain_query[0, head, i]).argmax())
            seen = {*range(SINKS), *range(best * BLOCK, (best + 1) * BLOCK), *range(whole * BLOCK, i + 1)}
            row = scores[0, head, i - start, : i + 1]
            assert set(torch.nonzero(row > -torch.inf)[:, 0].tolist()) == seen
            far = best * BLOCK + 3
            there = turned.moved(plain_query[:, head : head + 1, i : i + 1], torch.tensor([recent]))
            expected = (there * plain_key[0, head, far]).sum()
            assert float(row[far]) == pytest.approx(float(expected), abs=1e-3)


@torch.no_grad()
def test_dynamic_ntk_is_that_of_transformers(llama: PreTrainedModel) -> None:
    """theta grows with the text: theta * (n / Lc)^(d / (d - 2))."""
    use_training_free(llama, TrainingFree("dynamic-ntk"))
    ids = torch.randint(2, 258, (1, 4 * WINDOW), generator=torch.Generator().manual_seed(0))
    scored = torch.zeros_like(ids, dtype=torch.bool)
    scored[:, -10:] = True
    found = score_tokens(llama, ids, scored).log_probs
    size = llama.config.head_dim
    plain = pico_llama(rope_parameters={"rope_type": "default", "rope_theta": 10000.0 * 4 ** (size / (size - 2))})
    torch.testing.assert_close(found, score_tokens(plain, ids, scored).log_probs, rtol=1e-3, atol=1e-3)


REFUSED = {
    **dict.fromkeys(("mistral", "gemma2", "qwen2", "starcoder2"), "plain attention"),
    **dict.fromkeys(("gemma3_text", "olmo3", "modernbert-decoder"), "one rotary table"),
    **dict.fromkeys(("cohere", "glm4", "deepseek_v3", "smollm3"), "something else"),
    **dict.fromkeys(("gpt_neox_japanese", "falcon"), "cannot be set"),
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_families_that_rotate_otherwise_are_refused(family: Family) -> None:
    """Every other family is asked, layer by layer, whether moving a key is one more rotation."""
    model = picomodel(family)
    before = model.config._attn_implementation
    if family.model_type not in REFUSED:
        use_training_free(model, TrainingFree("self-extend"))
        return
    with pytest.raises(UserError, match=REFUSED[family.model_type]):
        use_training_free(model, TrainingFree("self-extend"))
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("rope", [YaRN(), Linear(), Mixed(beta_fast=4)], ids=lambda rope: rope.name)
def test_dynamic_ntk_is_for_plain_rope_alone(rope: RopeScaling, llama: PreTrainedModel) -> None:
    set_rope_scaling(llama, rope, Lengths(WINDOW, WINDOW, 4 * WINDOW))
    with pytest.raises(UserError, match="its own way beyond the window"):
        use_training_free(llama, TrainingFree("dynamic-ntk"))


@pytest.mark.parametrize("training_free", ["self-extend", "sinks"])
def test_frequencies_that_change_with_the_length_are_refused(training_free: str, llama: PreTrainedModel) -> None:
    """Seen to fail for both when `length_dependent` was not asked."""
    llama.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    with pytest.raises(UserError, match="its own way beyond the window"):
        check_training_free(llama.config, TrainingFree(training_free))


def test_padding_is_refused(llama: PreTrainedModel) -> None:
    use_training_free(llama, TrainingFree("sinks"))
    mask = torch.ones(1, 8, dtype=torch.int64)
    mask[:, :2] = 0
    with pytest.raises(UserError, match="without padding"):
        llama(torch.ones(1, 8, dtype=torch.int64), attention_mask=mask)


def test_more_sinks_than_the_window_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="at most the window"):
        use_training_free(llama, TrainingFree("sinks", WINDOW))


def test_a_directory_with_a_plus_is_one(tmp_path: Path) -> None:
    (tmp_path / "good+memory").mkdir()
    assert split_training_free(str(tmp_path / "good+memory")) == (str(tmp_path / "good+memory"), None)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("org/model+self-extend", ("org/model", TrainingFree("self-extend"))),
        ("runs/x+memory:4", ("runs/x", TrainingFree("memory", 4))),
        ("builtin:tiny+dynamic-ntk", ("builtin:tiny", TrainingFree("dynamic-ntk"))),
        ("org/c++", ("org/c++", None)),
        ("a+b/c", ("a+b/c", None)),
        ("model", ("model", None)),
    ],
)
def test_names(given: str, expected: tuple[str, Any]) -> None:
    assert split_training_free(given) == expected


@pytest.mark.parametrize("given", ["m+sink", "m+sinks:0", "m+sinks:x", "m+dynamic-ntk:2", "m+memory:9999999"])
def test_wrong_names(given: str) -> None:
    with pytest.raises(UserError):
        split_training_free(given)
