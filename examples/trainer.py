"""Positional skip-wise training in a Hugging Face `Trainer`.

    python examples/trainer.py HuggingFaceTB/SmolLM2-135M book.txt out

The book is cut into pieces of one training window; a text of 200,000 words is enough to see the loss fall.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from skipwise import Lengths, PoSE, WindowCollator, YaRN, masks_for, probe_attention, save, set_rope_scaling

name, text, output = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")  # in bfloat16 small updates vanish
tokenizer = AutoTokenizer.from_pretrained(name)

original = model.config.max_position_embeddings
lengths = Lengths(original=original, train=original // 4, target=4 * original)
set_rope_scaling(model, YaRN(), lengths)
probe_attention(model, target=lengths.target, batch_size=2)  # does attention reach across a skip?

ids = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"]
pieces = [{"input_ids": ids[i : i + lengths.train]} for i in range(0, len(ids) - lengths.train, lengths.train)]
windows = WindowCollator(PoSE(chunks=2), lengths, untouched_share=0.25)


def collate(features: list[dict]) -> dict:
    """Windows with new skips at every visit; layers that see only the last tokens are masked by distance."""
    batch = windows(features)
    return {**batch, "attention_mask": masks_for(model, batch)}


arguments = TrainingArguments(
    output,
    max_steps=100,
    per_device_train_batch_size=2,
    learning_rate=2e-5,
    remove_unused_columns=False,
    report_to="none",
)
trainer = Trainer(model=model, args=arguments, train_dataset=pieces, data_collator=collate)
trainer.train()
save(model, tokenizer, output)
