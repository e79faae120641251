"""Attention in blocks is attention: against the textbook formula and PyTorch's, with gradients."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import StaticCache

from skipwise.models import attention
from skipwise.models.attention import NAME, attend, causal_attention, prefer_blocks
from skipwise.models.forward import autocast
from tests.picomodels import VOCABULARY, pico_llama


def tensors(n: int, m: int, groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values of two texts; values are narrower."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 2 * groups, n, 8), (2, 2, m, 8), (2, 2, m, 5)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def textbook(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """One row at a time."""
    before, groups = key.shape[2] - query.shape[2], query.shape[1] // key.shape[1]
    out = torch.empty(*query.shape[:3], value.shape[-1], dtype=query.dtype)
    for head in range(query.shape[1]):
        for row in range(query.shape[2]):
            seen = before + row + 1
            scores = torch.einsum("bd,bmd->bm", query[:, head, row], key[:, head // groups, :seen]) * scale
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            out[:, head, row] = torch.einsum("bm,bme->be", weights, value[:, head // groups, :seen])
    return out.transpose(1, 2)


@pytest.mark.parametrize("rows_at_once", [4, 2, 1])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 4), (11, 11), (11, 18), (1, 7), (8, 9)])
def test_values_and_gradients(n: int, m: int, groups: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys of four rows at once; and where fewer rows come at a time, beyond four keys two of them at a time."""
    monkeypatch.setattr(attention, "BLOCK_ROWS", 4)
    monkeypatch.setattr(attention, "BLOCK_KEYS", 2)
    heads = 2 * 2 * groups
    monkeypatch.setattr(attention, "MOST_SCORES", heads * m * 4 if rows_at_once == 4 else heads * 4 * rows_at_once)
    ours, theirs = (tensors(n, m, groups, torch.float64) for _ in range(2))
    out, expected = causal_attention(*ours, 0.3), textbook(*theirs, 0.3)
    torch.testing.assert_close(out, expected)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):  # summed over blocks in float32
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=1e-6)


def masks(n: int, m: int) -> dict[str, torch.Tensor]:
    """What may be added to scores: causal with echoes, a window to both sides, one mask for all texts."""
    rows, keys = torch.arange(n)[:, None], torch.arange(m)
    lowest = torch.finfo(torch.float64).min
    echoes = torch.rand(2, 1, n, m, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    near = torch.zeros(n, m, dtype=torch.float64).masked_fill_((keys - rows).abs() > 2, lowest)
    return {
        "echoes": echoes.masked_fill(keys > rows + m - n, lowest),
        "window": near.expand(2, 1, n, m),
        "shared": echoes[:1].masked_fill(keys > rows + m - n, lowest),
    }


@pytest.mark.parametrize("rows_at_once", [4, 1])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", ["echoes", "window", "shared"])
def test_values_and_gradients_under_a_mask(
    kind: str, groups: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = m = 11
    monkeypatch.setattr(attention, "BLOCK_ROWS", 4)
    monkeypatch.setattr(attention, "MOST_SCORES", 2 * 2 * groups * m * rows_at_once)
    mask = masks(n, m)[kind]
    ours, theirs = (tensors(n, m, groups, torch.float64) for _ in range(2))
    out = causal_attention(*ours, 0.3, mask)
    keys, values = (one.repeat_interleave(groups, dim=1) for one in theirs[1:])
    scores = torch.einsum("bhnd,bhmd->bhnm", theirs[0], keys) * 0.3 + mask
    expected = torch.einsum("bhnm,bhme->bnhe", scores.softmax(-1), values)
    torch.testing.assert_close(out, expected)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=1e-6)


def test_a_row_that_sees_nothing_has_finite_values_and_gradients() -> None:
    """Padding on the left makes such rows."""
    inputs = tensors(6, 6, 1, torch.bfloat16)
    seen = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6).clone()
    seen[1, :, :2] = False
    for mask in (seen, torch.zeros(2, 1, 6, 6).masked_fill(~seen, float("-inf"))):
        out = attend(nn.Module(), *inputs, mask)[0]
        out.float().sum().backward()
        assert out.isfinite().all() and all(one.grad is not None and one.grad.isfinite().all() for one in inputs)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("permuted", [False, True])
def test_the_operator_is_what_it_says_to_compilers(permuted: bool, batch: int) -> None:
    """Shapes, strides and gradients; a model's heads come permuted."""
    inputs = [one.detach()[:batch].requires_grad_() for one in tensors(6, 9, 3, torch.float64)]
    if permuted:
        inputs = [one.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for one in inputs]
    checks = torch.library.opcheck(causal_attention, (*inputs, 0.3))
    checks |= torch.library.opcheck(causal_attention, (*inputs, 0.3, masks(6, 9)["shared"]))
    grad = torch.ones(causal_attention(*inputs, 0.3).shape, dtype=torch.float64)
    tests = ("test_schema", "test_faketensor")
    arguments = (grad, *(one.detach() for one in inputs), 0.3, None)
    checks |= torch.library.opcheck(attention._gradients, arguments, test_utils=tests)
    assert set(checks.values()) == {"SUCCESS"}


def test_as_exact_in_bfloat16_as_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, within twice the error of PyTorch's own."""
    n, d = 700, 64
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, n, d, generator=generator).bfloat16() for _ in range(3)]
    weights = torch.randn(1, n, 2, d, generator=generator).double()

    def gradients(out_of: object, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [one.to(dtype, copy=True).requires_grad_() for one in inputs]
        out = out_of(*leaves)  # type: ignore[operator]
        (out.double() * weights).sum().backward()
        return [out.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)]

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)

    exact = gradients(kernel, torch.float64)
    theirs = gradients(kernel, torch.bfloat16)
    monkeypatch.setattr(attention, "BLOCK_KEYS", 64)
    for most_scores in (2**24, 2**14):  # all keys of a block of rows at once, and 64 of 64 rows
        monkeypatch.setattr(attention, "MOST_SCORES", most_scores)
        ours = gradients(lambda *leaves: causal_attention(*leaves, d**-0.5), torch.bfloat16)
        for expected, other, mine in zip(exact, theirs, ours, strict=True):
            assert (mine - expected).norm() < 2 * (other - expected).norm()


def test_a_model_trains_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast and with a skip in the positions: loss and gradients within the rounding of bfloat16."""
    ids = torch.randint(2, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(40).expand(2, 40) + 9 * (torch.arange(40) >= 17)
    results = []
    for blocks in (False, True):
        model = pico_llama().train()
        if blocks:
            prefer_blocks(model)
            assert model.config._attn_implementation == NAME
        calls = 0
        original = causal_attention

        def counted(*arguments: torch.Tensor, original: object = original) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return original(*arguments)  # type: ignore[operator, no-any-return]

        monkeypatch.setattr(attention, "causal_attention", counted)
        with autocast(torch.device("cpu"), torch.bfloat16):
            loss = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, labels=ids, use_cache=False
            ).loss
        monkeypatch.undo()
        loss.backward()
        assert calls == (len(model.model.layers) if blocks else 0)
        results.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, gradient), (our_loss, our_gradient) = results
    assert float(our_loss) == pytest.approx(float(loss), rel=2e-3)
    assert (our_gradient - gradient).norm() < 0.03 * gradient.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_kept(dtype: torch.dtype) -> None:
    """A mask, or a text that goes on after others, gives the same as PyTorch's kernel."""
    query, key, value = (one.detach() for one in tensors(6, 9, 1, dtype))
    mask = torch.rand(2, 1, 6, 9, generator=torch.Generator().manual_seed(2)) < 0.7
    mask[..., 0] = True
    module = nn.Module()
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(attend(module, query, key, value, mask)[0], expected, atol=2e-2, rtol=2e-2)
    causal = torch.ones(6, 9, dtype=torch.bool).tril(3)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=causal).transpose(1, 2)
    torch.testing.assert_close(attend(module, query, key, value, None)[0], expected, atol=2e-2, rtol=2e-2)


def test_few_scores_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the keys are."""
    monkeypatch.setattr(attention, "BLOCK_KEYS", 4)
    monkeypatch.setattr(attention, "MOST_SCORES", 2 * 6 * 8 * 3)
    original, sizes = torch.bmm, []

    def noted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        result = original(left, right)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(torch, "bmm", noted)
    for keys in (18, 180):
        causal_attention(*(one.detach() for one in tensors(11, keys, 3, torch.float64)), 0.3)
    assert max(sizes) <= 2 * 6 * 8 * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_caches_work(dtype: torch.dtype) -> None:
    """They hold more keys than there are tokens. Seen to fail when a mask was left out for them."""
    ids = torch.randint(2, VOCABULARY, (1, 10), generator=torch.Generator().manual_seed(0))
    model = pico_llama().to(dtype)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        prefer_blocks(model)
        cache = StaticCache(config=model.config, max_cache_len=32)
        whole = model(input_ids=ids, past_key_values=cache).logits
    torch.testing.assert_close(whole, expected, atol=0.1 if dtype == torch.bfloat16 else 1e-4, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_masked(dtype: torch.dtype) -> None:
    """Batches of other programs may be padded."""
    ids = torch.randint(2, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    padded = torch.ones_like(ids)
    padded[1, :5] = 0
    model, ours = pico_llama().to(dtype), pico_llama().to(dtype)
    prefer_blocks(ours)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=padded).logits
        found = ours(input_ids=ids, attention_mask=padded).logits
    read = padded.bool()
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found[read], expected[read], atol=tolerance, rtol=0.05)


def test_float32_keeps_the_faster_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "causal_attention", None)
    query, key, value = (one.detach() for one in tensors(6, 6, 1, torch.float32))
    expected = scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(attend(nn.Module(), query, key, value, None)[0], expected)


def test_attention_to_everything_stays_so() -> None:
    query, key, value = (one.detach() for one in tensors(6, 9, 1, torch.bfloat16))
    expected = scaled_dot_product_attention(query, key, value).transpose(1, 2)
    torch.testing.assert_close(attend(nn.Module(), query, key, value, None, is_causal=False)[0], expected)


def test_families_that_ask_for_sdpa_by_name_keep_it() -> None:
    model = pico_llama()
    model.config.index_topk = 4
    prefer_blocks(model)
    assert model.config._attn_implementation == "sdpa"


def test_nothing_of_it_is_saved() -> None:
    model = pico_llama()
    prefer_blocks(model)
    assert NAME not in model.config.to_json_string()
