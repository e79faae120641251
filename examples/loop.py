"""Positional skip-wise training in a loop written by hand.

python examples/loop.py HuggingFaceTB/SmolLM2-135M book.txt out
"""

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipwise import Lengths, PoSE, WindowCollator, YaRN, masks_for, probe_attention, save, set_rope_scaling

name, text, output = sys.argv[1:4]
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = AutoModelForCausalLM.from_pretrained(name, dtype="float32").to(device)
tokenizer = AutoTokenizer.from_pretrained(name)

original = model.config.max_position_embeddings
lengths = Lengths(original=original, train=original // 4, target=4 * original)
set_rope_scaling(model, YaRN(), lengths)
probe_attention(model, target=lengths.target, batch_size=2)

ids = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"]
pieces = [{"input_ids": ids[i : i + lengths.train]} for i in range(0, len(ids) - lengths.train, lengths.train)]
loader = DataLoader(pieces, batch_size=2, shuffle=True, drop_last=True, collate_fn=WindowCollator(PoSE(), lengths))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)

model.train()
for step, batch in enumerate(loader):
    batch = {key: value.to(device) for key, value in batch.items()}
    # The mask is all ones, or for layers that see only the last tokens one by distance. Without any, transformers
    # takes a jump in position_ids for the start of another packed text and cuts attention there.
    loss = model(**{**batch, "attention_mask": masks_for(model, batch)}, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
save(model, tokenizer, output)
