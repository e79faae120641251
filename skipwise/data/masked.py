"""Windows for encoders: some tokens are masked, and the model says which they were."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from skipwise.data.features import IGNORED
from skipwise.data.windows import WindowCollator
from skipwise.errors import UserError


class MaskedWindowCollator:
    """Draws windows as a `WindowCollator` does, and masks a share of their tokens.

    Of the tokens that are chosen 80 % become the mask token, 10 % another one and 10 % stay (BERT, arXiv 1810.04805,
    section 3.1). Which ones comes from torch's generator.

    Args:
        windows: draws the positions; without echoes, which are for causal attention.
        tokenizer: with a mask token; its special tokens are never chosen.
        share: of the tokens, in (0, 1). BERT has 0.15, ModernBERT 0.3.

    Raises:
        UserError: for a share out of its range, a tokenizer without a mask token, and echoes.
    """

    def __init__(self, windows: WindowCollator, tokenizer: PreTrainedTokenizerBase, share: float = 0.3) -> None:
        if not 0.0 < share < 1.0:
            raise UserError(
                f"The share of masked tokens must be between 0 and 1, not {share}. Take 0.3.", code="share_out_of_range"
            )
        if tokenizer.mask_token_id is None:
            raise UserError(
                "Masked windows need a mask token, but the tokenizer has none. Take that of the encoder, or give it "
                "one: tokenizer.add_special_tokens({'mask_token': '[MASK]'}).",
                code="no_mask_token",
            )
        if windows.echo_share:
            raise UserError(
                f"Echoes stand before a skip and an encoder sees both ways, so echo_share must be 0, not "
                f"{windows.echo_share}. Leave it out.",
                code="echoes_with_encoder",
            )
        self.windows = windows
        self._special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
        self._masking = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=share)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Tensors `input_ids`, `attention_mask`, `position_ids`, `labels`, each int64[batch, window]; labels are -100
        but for the tokens that were chosen.
        """
        batch = self.windows([dict(feature) for feature in features])
        special = torch.isin(batch["input_ids"], self._special) | (batch["labels"] == IGNORED)
        ids, labels = self._masking.torch_mask_tokens(batch["input_ids"].clone(), special_tokens_mask=special)
        return {**batch, "input_ids": ids, "labels": labels}
