"""Aids against their papers' definitions, computed token by token."""

import math
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from skipwise import UserError
from skipwise.models.aided import BLOCK, ROWS, SINKS, use_aid
from skipwise.models.aids import Aid, split_aid
from skipwise.models.reading import score_tokens
from tests.conftest import PICO_MODELS, WINDOW, pico_llama
from tests.support import FAMILIES, picomodel

AIDS = [Aid("self-extend", 4), Aid("sinks", 16), Aid("memory", 2)]


def positions_of(aid: Aid, i: int, j: int) -> tuple[int, int] | None:
    """Where a query at i and a key at j stand for each other; None where the key is not seen."""
    distance = i - j
    if aid.name == "self-extend":
        group, near = aid.number or 8, WINDOW // 2
        return (i, j) if distance < near else (i // group + near - near // group, j // group)
    recent = aid.number or 0
    if distance < recent:
        return i, j
    return (recent, 0) if j < SINKS else None


def reference(model: PreTrainedModel, aid: Aid, ids: torch.Tensor) -> torch.Tensor:
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
            places = [positions_of(aid, i, j) for j in range(i + 1)]
            seen = [j for j, place in enumerate(places) if place is not None]
            scores = torch.stack([(turned(q[i], places[j][0]) * turned(k[j], places[j][1])).sum(-1) for j in seen], -1)
            shares = (scores / math.sqrt(size)).softmax(-1)
            rows.append(torch.einsum("hj,jhd->hd", shares, v[seen]).reshape(-1))
        x = x + attention.o_proj(torch.stack(rows))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(base.norm(x))


@pytest.mark.parametrize("aid", AIDS[:2], ids=lambda aid: aid.name)
@torch.no_grad()
def test_attention_is_that_of_the_paper(aid: Aid) -> None:
    model = pico_llama()
    ids = torch.randint(2, 258, (2 * WINDOW,), generator=torch.Generator().manual_seed(0))
    expected = reference(model, aid, ids)
    plain = model(ids[None]).logits[0]
    use_aid(model, aid)
    torch.testing.assert_close(model(ids[None]).logits[0], expected, rtol=1e-3, atol=1e-3)
    assert float((plain - expected)[-1].abs().max()) > 0.01


@pytest.mark.parametrize("aid", [*AIDS, Aid("self-extend"), Aid("sinks"), Aid("memory")], ids=str)
@pytest.mark.parametrize("kind", PICO_MODELS)
@torch.no_grad()
def test_inside_the_window_nothing_changes(kind: str, aid: Aid) -> None:
    """All distances are near: up to half of the window, or what the sinks' number says."""
    model, aided = PICO_MODELS[kind](), PICO_MODELS[kind]()
    use_aid(aided, aid)
    ids = torch.randint(2, 258, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(aided(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("aid", AIDS, ids=lambda aid: aid.name)
@torch.no_grad()
def test_a_cache_changes_nothing(aid: Aid) -> None:
    """Pieces that end with a block of rows, as evaluation reads them."""
    model = pico_llama()
    use_aid(model, aid)
    ids = torch.randint(2, 258, (1, 3 * ROWS), generator=torch.Generator().manual_seed(0))
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :ROWS], use_cache=True)
    rest = model(ids[:, ROWS:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, whole[:, ROWS:], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_memory_finds_the_block_that_is_asked_for() -> None:
    """A token that is like one far away sees it, and without memory does not."""
    model = pico_llama(num_hidden_layers=1, tie_word_embeddings=False)
    ids = torch.randint(2, 200, (1, 6 * BLOCK), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, BLOCK + 5 : 2 * BLOCK - 5] = 250  # a block of its own kind
    ids[:, -ROWS:] = other[:, -ROWS:] = 250

    def difference(aid: Aid) -> float:
        aided = pico_llama(num_hidden_layers=1, tie_word_embeddings=False)
        aided.load_state_dict(model.state_dict())
        use_aid(aided, aid)
        return float((aided(ids).logits - aided(other).logits)[:, -1].abs().max())

    assert difference(Aid("sinks", WINDOW // 2)) == 0.0
    assert difference(Aid("memory", 5)) > 1e-4


@torch.no_grad()
def test_dynamic_ntk_is_that_of_transformers(llama: PreTrainedModel) -> None:
    """theta grows with the text: theta * (n / Lc)^(d / (d - 2))."""
    use_aid(llama, Aid("dynamic-ntk"))
    ids = torch.randint(2, 258, (1, 4 * WINDOW), generator=torch.Generator().manual_seed(0))
    scored = torch.zeros_like(ids, dtype=torch.bool)
    scored[:, -10:] = True
    found = score_tokens(llama, ids, scored).log_probs
    size = llama.config.head_dim
    plain = pico_llama(rope_parameters={"rope_type": "default", "rope_theta": 10000.0 * 4 ** (size / (size - 2))})
    torch.testing.assert_close(found, score_tokens(plain, ids, scored).log_probs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "gemma2"])
def test_other_kinds_of_attention_are_refused(kind: str) -> None:
    model = picomodel(next(family for family in FAMILIES if family.model_type == kind))
    with pytest.raises(UserError, match="The aid sinks needs"):
        use_aid(model, Aid("sinks"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("org/model+self-extend", ("org/model", Aid("self-extend"))),
        ("runs/x+memory:4", ("runs/x", Aid("memory", 4))),
        ("builtin:tiny+dynamic-ntk", ("builtin:tiny", Aid("dynamic-ntk"))),
        ("org/c++", ("org/c++", None)),
        ("a+b/c", ("a+b/c", None)),
        ("model", ("model", None)),
    ],
)
def test_names(given: str, expected: tuple[str, Any]) -> None:
    assert split_aid(given) == expected


@pytest.mark.parametrize("given", ["m+sink", "m+sinks:0", "m+sinks:x", "m+dynamic-ntk:2"])
def test_wrong_names(given: str) -> None:
    with pytest.raises(UserError):
        split_aid(given)
