"""The chunked loss against float64, value and gradients."""

import pytest
import torch
from torch.nn import functional

from skipwise.models.forward import LogitsRule
from skipwise.training.loss import chunked_cross_entropy, window_weights


def ruled(product: torch.Tensor, rule: LogitsRule) -> torch.Tensor:
    scaled = product * rule.scale
    return scaled if rule.cap is None else rule.cap * torch.tanh(scaled / rule.cap)


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    scale: torch.Tensor,
    teacher: torch.Tensor | None,
    kl_weights: torch.Tensor,
    rule: LogitsRule,
) -> torch.Tensor:
    """The definition, with all logits at once."""
    logits = ruled(hidden @ weight.T + (0 if bias is None else bias), rule)
    teacher = None if teacher is None else ruled(teacher, rule)
    losses = functional.cross_entropy(logits, labels, reduction="none")
    if teacher is not None:
        losses = losses + kl_weights * functional.kl_div(
            logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
    return (losses * scale).sum()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("chunk_rows", [7, 1000])
@pytest.mark.parametrize("rule", [LogitsRule(), LogitsRule(scale=0.25), LogitsRule(scale=2.0, cap=3.0)])
def test_value_and_gradients(
    dtype: torch.dtype, tolerance: float, with_bias: bool, with_teacher: bool, chunk_rows: int, rule: LogitsRule
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, width, vocabulary = 50, 24, 331
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator) * 0.5
    bias = torch.randn(vocabulary, generator=generator) if with_bias else None
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    scale, kl_weights = torch.rand(2, rows, generator=generator)
    teacher_hidden = torch.randn(rows, 12, generator=generator).to(dtype) if with_teacher else None
    teacher_weight = torch.randn(vocabulary, 12, generator=generator) if with_teacher else None

    exact = [None if t is None else t.double().requires_grad_() for t in (hidden, weight.to(dtype), bias)]
    teacher_bias = torch.randn(vocabulary, generator=generator) if with_teacher and with_bias else None
    teacher = None if teacher_hidden is None else teacher_hidden.double() @ teacher_weight.to(dtype).double().T
    if teacher_bias is not None:
        teacher = teacher + teacher_bias.double()
    expected = reference(exact[0], exact[1], exact[2], labels, scale.double(), teacher, kl_weights.double(), rule)
    (3 * expected).backward()

    inputs = [None if t is None else t.clone().requires_grad_() for t in (hidden, weight, bias)]
    loss = chunked_cross_entropy(
        inputs[0],
        inputs[1],
        labels,
        scale,
        inputs[2],
        teacher_hidden,
        teacher_weight,
        kl_weights,
        teacher_bias,
        chunk_rows,
        rule,
    )
    (3 * loss).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    for ours, true in zip(inputs, exact, strict=True):
        if ours is not None:
            error = (ours.grad.double() - true.grad).norm() / true.grad.norm()
            assert error < tolerance


def test_logits_of_all_rows_never_exist_together() -> None:
    """Counted by the largest tensor that any operation makes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    hidden = torch.randn(512, 16, requires_grad=True)
    weight = torch.randn(1000, 16, requires_grad=True)
    with Watch():
        loss = chunked_cross_entropy(hidden, weight, torch.zeros(512, dtype=torch.long), torch.ones(512), chunk_rows=32)
        loss.backward()
    assert largest <= 32 * 1000


def test_every_window_counts_the_same() -> None:
    labels = torch.full((3, 8), -100)
    labels[0, 7] = 5
    labels[1, :] = 5
    weights = window_weights(labels)
    assert weights.sum(dim=1).tolist() == pytest.approx([1 / 3, 1 / 3, 0.0])
    assert weights[0, 7] == pytest.approx(1 / 3)
    assert weights[1, 0] == pytest.approx(1 / 24)
