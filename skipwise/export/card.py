"""The model card that goes with a checkpoint."""

from skipwise.config import RunConfig
from skipwise.config_files import to_yaml
from skipwise.lengths import Lengths


def model_card(config: RunConfig, lengths: Lengths) -> str:
    """A README.md in the form model hubs read: what was done to which model, and how to repeat it."""
    return f"""---
base_model: {config.model.path}
library_name: transformers
tags: [skipwise, long-context]
---

# {config.model.path} with a window of {lengths.target:,} tokens

The context window of `{config.model.path}` was extended from {lengths.original:,} to {lengths.target:,} tokens with
Skipwise: method `{config.method}`, RoPE scaling `{config.rope.name}`, training windows of {lengths.train:,} tokens.
It opens with `transformers.AutoModelForCausalLM.from_pretrained`.

Configuration:

```yaml
{to_yaml(config).rstrip()}
```
"""
