"""The commands about configuration files: schema, init."""

import json
from typing import Annotated, Any

import typer

from skipwise.errors import UserError, nearest

app = typer.Typer(help="Print configuration files and their schema.", no_args_is_help=True)

STARTER = """\
# A run of skipwise extend. What is commented out has the value that is shown, or none.
model:
  path: HuggingFaceTB/SmolLM2-135M   # hub id, directory, .gguf file or builtin:tiny
  # dtype: auto                      # of matmuls: auto, float32, bfloat16
  # attn_implementation: sdpa
lengths:
  target: 32k                        # the window wanted; k means 1,024
  # train: 8k                        # tokens of a training window; the model's own window unless said
positions: {name: pose, chunks: 2}   # skipwise list names all
rope: {name: yarn}
data:
  sources:
    - {source: "builtin:python"}     # or docs.jsonl, a directory, a hub dataset
    # - {source: chats.jsonl, messages_field: messages}
  # held_out_share: 0.05
  # short_documents: skip            # or join, which runs neighbours together
  # retrieval_share: 0.25            # windows of synthetic retrieval, so that retrieval survives
train:
  max_steps: 200
  learning_rate: 1.0e-5
  warmup_steps: 10
  per_device_train_batch_size: 4
  # gradient_accumulation_steps: 1
  # gradient_checkpointing: false
  # untouched_share: 0.25            # windows with ordinary positions
  # kl_weight: 1.0                   # term to the untouched model; left out: where it can read a window
  # save_steps: 50
  # lora: {r: 16}
evaluate:                            # before, with the new RoPE alone, and after
  - {name: perplexity, context_lengths: [8k, 16k, 32k], stride: 1024, documents: 8, final_tokens: 1024}
  - {name: passkey, context_lengths: [8k, 16k, 32k], trials: 20}
seed: 0
"""


@app.command()
def schema(
    of: Annotated[str, typer.Argument(help="A file of what: run (extend), evaluate or study.")] = "run",
) -> None:
    """Print the JSON Schema of a configuration, for editors that check and complete YAML."""
    print(json.dumps(schema_of(of), indent=2))


def schema_of(kind: str) -> dict[str, Any]:
    """The schema of a kind of file, with the shorthands of `data`: a name alone, and one `source` with its settings.

    Raises:
        UserError: for a kind that does not exist.
    """
    from pydantic import BaseModel

    from skipwise.config.run import EvaluateConfig, RunConfig
    from skipwise.study.config import StudyConfig

    kinds: dict[str, type[BaseModel]] = {"run": RunConfig, "evaluate": EvaluateConfig, "study": StudyConfig}
    if kind not in kinds:
        raise UserError(
            f"There is a schema of {', '.join(kinds)}, not of {kind!r}.{nearest(kind, kinds)}", code="unknown_choice"
        )
    content = kinds[kind].model_json_schema()
    for name in ("DataConfig", "DocumentsConfig"):
        if (data := content["$defs"].get(name)) is not None:
            source = content["$defs"]["SourceConfig"]["properties"]
            data["properties"] |= {key: source[key] for key in ("source", "text_field", "messages_field", "split")}
            del data["required"]
            content["$defs"][name] = {"anyOf": [data, {"type": "string"}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **content}


@app.command()
def init() -> None:
    """Print a configuration to begin with, comments included: skipwise config init > run.yaml."""
    print(STARTER, end="")
