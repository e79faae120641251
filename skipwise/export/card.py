"""The model card that goes with a checkpoint."""

import re
from pathlib import Path
from typing import Any

import yaml

from skipwise.config import RunConfig
from skipwise.environment import without_directories
from skipwise.lengths import Lengths


def model_card(config: RunConfig, lengths: Lengths) -> str:
    """A README.md in the form model hubs read: what was done to which model, and how to repeat it."""
    name = shown_name(config.model.path)
    about = {"base_model": name, "library_name": "transformers", "tags": ["skipwise", "long-context"]}
    return f"""---
{yaml.safe_dump(about, sort_keys=False, allow_unicode=True).rstrip()}
---

# {name} with a window of {lengths.target:,} tokens

The context window of `{name}` was extended from {lengths.original:,} to {lengths.target:,} tokens with
Skipwise: method `{config.method}`, RoPE scaling `{config.rope.name}`, training windows of {lengths.train:,} tokens.
It opens with `transformers.AutoModelForCausalLM.from_pretrained`.

Configuration:

```yaml
{_published(config).rstrip()}
```
"""


def _published(config: RunConfig) -> str:
    """The configuration as YAML, without the directories of whoever made it."""
    return yaml.safe_dump(_without_directories(config.model_dump(mode="json")), sort_keys=False)


def _without_directories(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_directories(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_directories(inner) for inner in value]
    return without_directories(value) if isinstance(value, str) else value


def shown_name(path: str) -> str:
    """A hub id as it is; of a local path its last part; in either no character that means something in Markdown."""
    name = Path(path).name if Path(path).exists() else path
    return re.sub(r"[^\w./:@ -]+", "-", name)
