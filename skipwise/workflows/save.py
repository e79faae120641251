"""Write the model of a run, and prove that what is written is that model."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from skipwise.export.card import model_card
from skipwise.export.checkpoint import save_checkpoint
from skipwise.export.proof import proof_loss, prove, randomness_kept
from skipwise.models.load import default_device
from skipwise.models.rope import live_rope, rotary_tables
from skipwise.runs.directory import RunDir
from skipwise.training.adapters import trained_weights
from skipwise.utils.distributed import is_first
from skipwise.utils.files import write_json
from skipwise.workflows.context import RunContext
from skipwise.workflows.train import Weights, load_trained, plain_model

# Name of the directory, in that of the run, where a model is written before it is proven.
PROOF = ".proof-"


def save_model(context: RunContext, directory: RunDir) -> None:
    """Write the checkpoint, unless it is there.

    Raises:
        UserError: when it cannot be written, or what is written is another model.
    """
    if not is_first() or (directory.model / "config.json").is_file():
        return
    run = context.run
    card = model_card(run.as_config(), run.lengths)
    # Before the model: nothing may claim another one later.
    write_json(directory.rope, {**live_rope(context.model, run.lengths), "before": context.frequencies_before})
    if run.trains:  # proven after the first step
        save_checkpoint(context.model, context.tokenizer, directory.model, run.lengths, card)
    else:
        with _place_to_prove(directory) as path:
            save_checkpoint(context.model, context.tokenizer, path, run.lengths, card)
            _prove_written(context, path, proof_loss(context.model), rotary_tables(context.model))
            path.rename(directory.model)  # only then: --resume takes the model that is there
    if context.model.device.type != default_device().type or run.four_bits:
        load_trained(context, directory)


def prove_trained(context: RunContext, directory: RunDir, gathered: Weights | None) -> None:
    """Write the model once, as at the end, and read it back with transformers; nothing of that is left.

    Args:
        context: context of the run.
        directory: run directory.
        gathered: weights of a model that several processes share; None where this one has them all.

    Raises:
        UserError: when it cannot be written, or what is written is another model.
    """
    if not is_first():
        return
    run = context.run
    with context.console.status("writing the model once, to see that it can be read"), randomness_kept():
        model = context.model
        if gathered is not None or run.train.lora:
            model = plain_model(context, trained_weights(context.model) if gathered is None else gathered)
        # Weights in 4 bits are others than those that are written.
        loss = proof_loss(model if gathered is not None or run.four_bits else context.model)
        with _place_to_prove(directory) as path:
            save_checkpoint(model, context.tokenizer, path, run.lengths, card="")
            tables = rotary_tables(model)
            del model  # before it is read: there may be no room for two
            _prove_written(context, path, loss, tables)
    context.console.print("After step 1 the model was written and read back with transformers: it is the same.")


def _prove_written(context: RunContext, path: Path, loss: float, tables: dict[str, nn.Module]) -> None:
    """Compare what was written with the loss and the rotary tables of what was in memory."""
    run = context.run
    prove(path, loss, context.tokenizer, tables, run.lengths, trust_remote_code=run.model.trust_remote_code)


@contextmanager
def _place_to_prove(directory: RunDir) -> Iterator[Path]:
    """Where a model is written before it is proven, beside that of the run; removed in the end."""
    for leftover in directory.path.glob(f"{PROOF}*"):  # of a run that was killed meanwhile
        shutil.rmtree(leftover, ignore_errors=True)
    with TemporaryDirectory(dir=directory.path, prefix=PROOF) as temporary:
        yield Path(temporary) / "model"
