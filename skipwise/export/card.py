"""The model card that goes with a checkpoint."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from skipwise.config.run import RunConfig
from skipwise.lengths import Lengths
from skipwise.models.locate import is_hub_id
from skipwise.models.windows import Windows
from skipwise.runs.environment import without_directories


@dataclass(frozen=True)
class Published:
    """What a card says of a model that is given to others.

    Attributes:
        windows: how many all processes together trained on.
        window: tokens of each.
        table: results before and after, in Markdown; empty if none was measured.
        warnings: what got worse.
        base: id of the base model on a hub; None if it is not known to have one.
        licence: of the base model, as hubs call it; None if it says none.
        vllm: its command line.
        gguf: name of the file for llama.cpp; None if there is none.
    """

    windows: int = 0
    window: int = 0
    table: str = ""
    warnings: Sequence[str] = ()
    base: str | None = None
    licence: str | None = None
    vllm: str = ""
    gguf: str | None = None


def model_card(config: RunConfig, lengths: Lengths, published: Published | None = None) -> str:
    """A README.md in the form model hubs read: what was done to which model, and how to repeat it.

    Args:
        published: for a model that is given to others; results, licence, and how to serve it.
    """
    name = shown_name(config.model.path)
    about: dict[str, Any] = {"library_name": "transformers", "tags": ["skipwise", "long-context"]}
    base = (config.model.path if is_hub_id(config.model.path) else None) if published is None else published.base
    if base is not None:  # hubs make a link of it
        about["base_model"] = base
    if published is not None and published.licence is not None:
        about["license"] = published.licence
    return f"""---
{yaml.safe_dump(about, sort_keys=False, allow_unicode=True).rstrip()}
---

# {name} with a window of {lengths.target:,} tokens

The context window of `{name}` was extended from {lengths.original:,} to {lengths.target:,} tokens with
Skipwise: method `{config.method}`, RoPE scaling `{config.rope.name}`, training windows of {lengths.train:,} tokens.
It opens with `transformers.AutoModelForCausalLM.from_pretrained`.
{_for_others(config, lengths, published) if published is not None else ""}
<details><summary>Configuration</summary>

```yaml
{_published(config).rstrip()}
```

</details>
"""


def plain_card(path: str, windows: Windows, published: Published) -> str:
    """The card of a model of whose training nothing is known but what its config says."""
    about: dict[str, Any] = {"library_name": "transformers", "tags": ["skipwise", "long-context"]}
    about |= {"base_model": published.base} if published.base is not None else {}
    about |= {"license": published.licence} if published.licence is not None else {}
    grown = f", extended from {windows.original:,}" if windows.original != windows.current else ""
    return f"""---
{yaml.safe_dump(about, sort_keys=False, allow_unicode=True).rstrip()}
---

# {shown_name(path)} with a window of {windows.current:,} tokens

Its config says a context window of {windows.current:,} tokens{grown}. How it was trained is not recorded.
It opens with `transformers.AutoModelForCausalLM.from_pretrained`.

{_serving(windows.current, published)}"""


def _for_others(config: RunConfig, lengths: Lengths, published: Published) -> str:
    """Results, limits, licence, and commands to serve it."""
    sources = ", ".join(f"`{shown_name(source.source)}`" for source in config.data.sources)
    count = f"{published.windows:,} window{'s' * (published.windows != 1)}"
    read = f"{count} of {published.window:,} tokens from {sources}" if published.windows else "nothing"
    return f"""
Trained on {read}.

## Results

{published.table.rstrip() or "None were measured."}

{_serving(lengths.target, published)}"""


def _serving(window: int, published: Published) -> str:
    """Commands to serve it, limits and licence."""
    limits = [
        f"Nothing is known of texts longer than {window:,} tokens, nor of tasks that were not measured.",
        *published.warnings,
    ]
    licence = published.licence or "not said by the model that this one was made from; look at its page"
    llama = f"    llama-server -m {published.gguf} -c {window}\n" if published.gguf else ""
    return f"""## To serve it

    {published.vllm}
{llama}
## Limits

{chr(10).join(f"- {limit}" for limit in limits)}

Licence: {licence}.
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
