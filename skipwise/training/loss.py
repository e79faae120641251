"""Cross-entropy of a language model without ever holding the logits of a whole window."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from skipwise.models.forward import CHUNK_ROWS, PLAIN, LogitsRule


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    row_weights: torch.Tensor,
    bias: torch.Tensor | None = None,
    teacher_hidden: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
    kl_weights: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    chunk_rows: int = CHUNK_ROWS,
    rule: LogitsRule = PLAIN,
) -> torch.Tensor:
    """Weighted sum of token losses `-log softmax(rule(W h + b))[label]`, `chunk_rows` tokens at a time.

    Logits are made in the dtype of `hidden`; log-sum-exp, probabilities and all sums are float32. The
    gradients are formed in the forward pass, while the logits are there, so that the backward pass
    needs none.

    With a teacher, `KL(teacher || student)` times its weight is added to each row.

    Args:
        hidden: float[n, d], last hidden states of the tokens to predict from.
        weight: float[v, d], the output embedding.
        labels: int64[n], in [0, v).
        row_weights: float[n], what each token counts.
        bias: float[v] of the output layer.
        teacher_hidden: float[n, e], hidden states of the frozen model for the same tokens.
        teacher_weight: float[v, e], its output embedding.
        kl_weights: float[n], at least 0; needed with a teacher.
        teacher_bias: float[v] of its output layer.
        chunk_rows: tokens whose logits exist at a time.
        rule: how logits are scaled and capped, the teacher's as well.

    Returns:
        A float32 scalar with gradients for `hidden`, `weight` and `bias`.
    """
    return _ChunkedCrossEntropy.apply(  # type: ignore[no-any-return, no-untyped-call]
        hidden,
        weight,
        labels,
        row_weights,
        bias,
        teacher_hidden,
        teacher_weight,
        kl_weights,
        teacher_bias,
        chunk_rows,
        rule,
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        row_weights: torch.Tensor,
        bias: torch.Tensor | None,
        *others: Any,
    ) -> torch.Tensor:
        """The loss; its gradients are kept for `backward`."""
        # Under autocast the products below would silently change their dtype.
        with torch.autocast(hidden.device.type, enabled=False):
            total, *gradients = _loss_and_gradients(
                hidden, weight, labels, row_weights, bias, *others, weight_trained=ctx.needs_input_grad[1]
            )
        ctx.others = len(others)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The kept gradients times that of the loss."""
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        grad_weight = None if grad_weight is None else grad_weight * grad_total
        grad_bias = None if grad_bias is None else grad_bias * grad_total
        return (grad_hidden * grad_total, grad_weight, None, None, grad_bias, *[None] * ctx.others)


def _loss_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    row_weights: torch.Tensor,
    bias: torch.Tensor | None,
    teacher_hidden: torch.Tensor | None,
    teacher_weight: torch.Tensor | None,
    kl_weights: torch.Tensor | None,
    teacher_bias: torch.Tensor | None,
    chunk_rows: int,
    rule: LogitsRule,
    *,
    weight_trained: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Loss, and the gradients of hidden states, weight (None unless it is trained) and bias."""
    matrix = weight.to(hidden.dtype)
    teacher_matrix = (
        None if teacher_weight is None or teacher_hidden is None else teacher_weight.to(teacher_hidden.dtype)
    )
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if weight_trained else None
    grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(hidden), chunk_rows):
        rows = slice(start, start + chunk_rows)
        logits = (hidden[rows] @ matrix.T).float()
        if bias is not None:
            logits += bias.float()
        logits = rule.apply(logits)
        log_probs = logits.log_softmax(dim=-1)
        picked = labels[rows, None]
        scale = row_weights[rows].float()
        total -= (log_probs.gather(1, picked)[:, 0] * scale).sum()
        # d loss / d logits, built in place on the probabilities.
        if teacher_matrix is not None and teacher_hidden is not None:
            assert kl_weights is not None
            taught = (teacher_hidden[rows] @ teacher_matrix.T).float()
            if teacher_bias is not None:
                taught += teacher_bias.float()
            teacher = rule.apply(taught).log_softmax(dim=-1)
            expected, kl = teacher.exp(), kl_weights[rows, None].float()
            total += (teacher.sub_(log_probs).mul_(expected).sum(dim=-1) * kl[:, 0] * scale).sum()
            grad = log_probs.exp_().mul_(1 + kl).sub_(expected.mul_(kl))
        else:
            grad = log_probs.exp_()
        grad.scatter_add_(1, picked, grad.new_full(picked.shape, -1.0))
        grad = rule.chain(grad.mul_(scale[:, None]), logits)
        if grad_bias is not None:
            grad_bias += grad.sum(dim=0)
        grad = grad.to(hidden.dtype)
        grad_hidden[rows] = grad @ matrix
        if grad_weight is not None:
            grad_weight += grad.T @ hidden[rows]
    return total, grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), grad_bias


def window_weights(labels: torch.Tensor) -> torch.Tensor:
    """float32[batch, n]: weights with which every window counts the same, however many labels it has.

    A retrieval document has a handful of labelled tokens, a window of prose hundreds; a mean over
    tokens would let the former count for nothing.

    Args:
        labels: int64[batch, n], -100 where there is no loss.
    """
    labelled = (labels != -100).float()
    return labelled / labelled.sum(dim=1, keepdim=True).clamp(min=1) / len(labels)
