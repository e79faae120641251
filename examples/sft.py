"""Positional skip-wise training in TRL's `SFTTrainer`.

    python examples/sft.py HuggingFaceTB/SmolLM2-135M-Instruct book.txt out

The data set is tokenised already, so TRL is told not to prepare it, and the batches come from the collator of Skipwise.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from skipwise import Lengths, PoSE, WindowCollator, YaRN, masks_for, probe_attention, save, set_rope_scaling

name, text, output = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(name)

original = model.config.max_position_embeddings
lengths = Lengths(original=original, train=original // 4, target=4 * original)
set_rope_scaling(model, YaRN(), lengths)
probe_attention(model, target=lengths.target, batch_size=2)

ids = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"]
pieces = [ids[i : i + lengths.train] for i in range(0, len(ids) - lengths.train, lengths.train)]
windows = WindowCollator(PoSE(chunks=2), lengths, untouched_share=0.25)


def collate(features: list[dict]) -> dict:
    """Windows with new skips at every visit; layers that see only the last tokens are masked by distance."""
    batch = windows(features)
    return {**batch, "attention_mask": masks_for(model, batch)}


arguments = SFTConfig(
    output,
    max_steps=100,
    per_device_train_batch_size=2,
    learning_rate=2e-5,
    packing=False,  # packed texts have positions of their own
    dataset_kwargs={"skip_prepare_dataset": True},
    remove_unused_columns=False,
    bf16=torch.cuda.is_available(),
    report_to="none",
)
trainer = SFTTrainer(
    model=model,
    args=arguments,
    train_dataset=Dataset.from_dict({"input_ids": pieces}),
    data_collator=collate,
    processing_class=tokenizer,
)
trainer.train()
save(model, tokenizer, output)
