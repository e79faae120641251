"""Does attention reach across a skip, and does the size of the skip matter? Asked of the model itself.

Libraries have silently cut attention at position jumps: the loss looks fine, and nothing is learned
about distance. So every training run asks first, with the backend and mode it is going to use.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from skipwise.errors import UserError
from skipwise.models import attention
from skipwise.models.forward import autocast
from skipwise.models.load import vocabulary_size

PROBE_TOKENS = 16
# Two forward passes on equal inputs may differ by rounding; a real dependence is far larger.
MIN_CHANGE = 1e-6


@torch.no_grad()
def probe_attention(
    model: PreTrainedModel,
    target: int,
    batch_size: int,
    attention_mask: bool = True,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Check that tokens behind a skip see those before it, and see how far away they are.

    Args:
        model: as it will be trained; its mode and checkpointing state are kept.
        target: target length, in tokens; at least `2 * PROBE_TOKENS`.
        batch_size: of the training, since some backends treat batches of one differently.
        attention_mask: pass the all-ones mask that the collator makes. Off only to show that the
            probe notices.
        dtype: compute dtype of the training.

    Raises:
        UserError: naming the cause, when attention is cut or blind to the distance.
    """
    n, half = PROBE_TOKENS, PROBE_TOKENS // 2
    generator = torch.Generator().manual_seed(0)
    vocabulary = vocabulary_size(model)
    ids = torch.randint(vocabulary, (batch_size, n), generator=generator)
    other = ids.clone()
    other[:, half - 2] = (other[:, half - 2] + 1 + vocabulary // 2) % vocabulary
    largest, smaller = target - n, (target - n) // 2

    def behind(tokens: torch.Tensor, skip: int) -> torch.Tensor:
        """Logits of the tokens behind a skip in the middle."""
        positions = torch.arange(n).expand(batch_size, n) + skip * (torch.arange(n) >= half)
        inputs = {"input_ids": tokens, "position_ids": positions}
        if attention_mask:
            inputs["attention_mask"] = torch.ones_like(tokens)
        inputs = {key: value.to(model.device) for key, value in inputs.items()}
        with autocast(model.device, dtype):
            output = model(**inputs, use_cache=False)
        # The encoder of an encoder-decoder ends without logits.
        values: torch.Tensor = output.logits if "logits" in output else output.last_hidden_state
        return values[:, half:].float()

    with _without_dropout(model):
        base = behind(ids, largest)
        if float((behind(other, largest) - base).abs().amax()) < MIN_CHANGE:
            raise UserError(
                "Tokens after a position skip must attend to those before it, but a change before the skip changed "
                "nothing after it: the model was given a jump in position_ids and took it for a new packed sequence. "
                "Pass an explicit all-ones attention_mask (skipwise.WindowCollator does), or choose another "
                f"attn_implementation than {model.config._attn_implementation!r}.",
                code="skip_blocks_attention",
            )
        if float((behind(ids, smaller) - base).abs().amax()) < MIN_CHANGE:
            raise UserError(
                f"Logits must depend on the size of a skip, but {smaller:,} and {largest:,} gave the same: the model "
                "ignores position_ids. Choose a Hugging Face RoPE model that uses them.",
                code="positions_ignored",
            )


@torch.no_grad()
def probe_score_mask(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> None:
    """Check that a mask of attention scores does what echoes need: -inf hides a key, more than 0 raises it.

    Args:
        model: as it will be trained.
        dtype: compute dtype of the training.

    Raises:
        UserError: when the attention implementation takes no such mask, or takes it otherwise.
    """
    n = PROBE_TOKENS
    ids = torch.randint(vocabulary_size(model), (1, n), generator=torch.Generator().manual_seed(0)).to(model.device)
    causal = torch.full((1, 1, n, n), -torch.inf, device=model.device).triu(1)
    raised = causal.clone()
    raised[..., n // 2 :, 0] = 3.0

    def logits(mask: torch.Tensor) -> torch.Tensor:
        """Of all tokens, under this mask."""
        with autocast(model.device, dtype):
            result: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return result.float()

    if model.config._attn_implementation in ("sdpa", "eager", attention.NAME):
        with _without_dropout(model):
            ordinary = logits(torch.ones_like(ids))
            rounding = float((logits(causal) - ordinary).abs().amax())
            change = float((logits(raised) - ordinary).abs().amax())
        if rounding < 0.1 * change:
            return
    raise UserError(
        "train.echo_share needs attention that takes a mask of scores (sdpa or eager), but the model's "
        f"({model.config._attn_implementation!r}) does not. Set model.attn_implementation=sdpa, or train.echo_share=0.",
        code="score_mask_not_supported",
    )


@contextmanager
def _without_dropout(model: PreTrainedModel) -> Iterator[None]:
    """Dropout off, everything else (training mode, checkpointing) as it is."""
    dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.training]
    for module in dropouts:
        module.eval()
    try:
        yield
    finally:
        for module in dropouts:
            module.train()
