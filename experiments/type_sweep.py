"""What becomes of every model type that transformers has a causal class for: it works, or is refused with a reason.

A small model of the type goes the way of `skipwise extend`: plan, load, probe, measuring, new RoPE, a step of training,
writing; and is read back by plain transformers.
"""

import gc
import multiprocessing
import resource
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from skipwise import Lengths, UserError
from skipwise.config.run import RunConfig
from skipwise.export.checkpoint import save_checkpoint
from skipwise.models.load import default_device
from skipwise.models.rope import is_rotary_table, same_table
from skipwise.workflows.extend import extend
from tests.picomodels import WINDOW, byte_tokenizer
from tests.picotypes import CONFIG_ONLY, small_config, small_model

# Above the window of models that were extended by a factor of 32.
TARGET = 8192
# Steps of training: with the second scaling the model is written untrained.
SCALINGS = {"yarn": 1, "linear": 0}
EVALUATIONS = [
    {"name": "perplexity", "context_lengths": [WINDOW, 256], "stride": 16, "documents": 1, "final_tokens": 32},
    {"name": "passkey", "context_lengths": [256], "trials": 1},
]
WORKS, REFUSED, CRASHED = "works", "refused", "crashed"
# Of a type: seconds, and bytes of address space (the libraries alone take 3 GB of it).
MOST_SECONDS, MOST_MEMORY = 180, 8 * 2**30


@dataclass(frozen=True)
class Outcome:
    """What became of a model type.

    Attributes:
        model_type: it.
        outcome: `works`, `refused` or `crashed`.
        at: where it was refused or crashed: `plan` is before any weights are loaded, `run` after that.
        code: of the refusal.
        reason: the message of the refusal, or the exception.
    """

    model_type: str
    outcome: str
    at: str = ""
    code: str = ""
    reason: str = ""

    def as_dict(self) -> dict[str, str]:
        """What there is to say."""
        return {name: value for name, value in asdict(self).items() if value}


def outcome_of(kind: str) -> Outcome:
    """What becomes of a model type, in a directory of its own."""
    at = "plan"
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        try:
            write_model(kind, directory / "base")
            configs = [run_config(directory, scaling, steps) for scaling, steps in SCALINGS.items()]
            for config in configs:
                extend(config, directory / "run", given="", console=Console(quiet=True), dry_run=True)
            at = "run"
            for config in configs:
                extend_and_compare(config, directory / config.rope.name)
        except UserError as error:
            return Outcome(kind, REFUSED, at, error.code, str(error).replace(name, ""))
        except Exception as error:
            first = next(iter(str(error).strip().splitlines()), "")
            return Outcome(kind, CRASHED, at, "", f"{type(error).__name__}: {first}".replace(name, ""))
        finally:
            gc.collect()
    return Outcome(kind, WORKS)


def outcome_apart(kind: str) -> Outcome:
    """`outcome_of` in a process that has so much time and memory, and gives both back."""
    forks = multiprocessing.get_context("fork")
    here, there = forks.Pipe(duplex=False)
    process = forks.Process(target=_send_outcome, args=(kind, there))
    process.start()
    there.close()
    try:
        if here.poll(MOST_SECONDS):
            outcome: Outcome = here.recv()
            return outcome
        return Outcome(kind, CRASHED, reason=f"takes longer than {MOST_SECONDS} seconds")
    except EOFError:
        process.join()
        return Outcome(kind, CRASHED, reason=f"the process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _send_outcome(kind: str, there: Connection) -> None:
    if default_device().type == "cpu":  # drivers of others reserve far more addresses than they use
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    there.send(outcome_of(kind))


def write_model(kind: str, path: Path) -> None:
    """A model directory as a user has it, and texts beside it."""
    if kind not in CONFIG_ONLY:
        small_model(kind).save_pretrained(path)
    small_config(kind).save_pretrained(path)  # of several models also where the weights are those of one
    byte_tokenizer().save_pretrained(path)
    texts = [f"document {i}: {' '.join(str(i * j) for j in range(100))}" for i in range(4)]
    (path.parent / "text.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))


def run_config(directory: Path, scaling: str, steps: int) -> RunConfig:
    """An extension of the model in this directory."""
    return RunConfig.model_validate(
        {
            "model": {"path": str(directory / "base")},
            "lengths": {"target": TARGET},
            "rope": {"name": scaling},
            "data": {"source": str(directory / "text.jsonl"), "held_out_share": 0.25, "retrieval_share": 0.0},
            "train": {"max_steps": steps, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
            "evaluate": EVALUATIONS if steps else [],
        }
    )


def extend_and_compare(config: RunConfig, output: Path) -> None:
    """Run an extension, and read back what it writes as soon as it is written."""

    def save_and_compare(
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        path: Path,
        lengths: Lengths,
        *more: Any,
        **named: Any,
    ) -> None:
        save_checkpoint(model, tokenizer, path, lengths, *more, **named)
        check_same(model, path, lengths)

    with patch("skipwise.workflows.save.save_checkpoint", save_and_compare):
        rows = extend(config, output, given="", console=Console(quiet=True))
    failed = [f"{row.evaluation} of the {row.stage} model: {row.reason}" for row in rows if row.status == "failed"]
    assert not failed, failed[0]


@torch.no_grad()
def check_same(model: PreTrainedModel, path: Path, lengths: Lengths) -> None:
    """Plain transformers reads the same model: logits beyond the original window, and rotary tables."""
    again = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    again.set_attn_implementation(model.config._attn_implementation)
    ids = torch.randint(2, 258, (1, 2 * WINDOW), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    torch.testing.assert_close(again(**given).logits, model.eval()(**given).logits, rtol=1e-4, atol=1e-4)
    tables = dict(again.named_modules())
    for name, table in model.named_modules():
        if is_rotary_table(table):
            assert same_table(tables[name], table, lengths), f"{name} differs when it is read back"


def types_markdown(rows: Iterable[dict[str, str]]) -> str:
    """The rows for people: how many model types there are of each outcome and reason, and which."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        kinds.setdefault((row["outcome"], row.get("code", "")), []).append(row["model_type"])
    lines = ["| outcome | model types | which |", "| --- | ---: | --- |"]
    for outcome, code in sorted(kinds, key=lambda key: (key[0] != WORKS, -len(kinds[key]), key)):
        reason = f"{outcome}: `{code}`" if code else outcome
        lines.append(f"| {reason} | {len(kinds[outcome, code])} | {', '.join(kinds[outcome, code])} |")
    return "\n".join(lines) + "\n"
