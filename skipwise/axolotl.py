"""Skipwise inside Axolotl: windows with new skips at every visit, in a training that Axolotl runs.

    plugins: [skipwise.axolotl.SkipwisePlugin]
    skipwise: {lengths: {target: 32k}}

See examples/axolotl.yaml.
"""

import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from pydantic import BaseModel
from transformers import PreTrainedModel

from skipwise.config.files import parse_section
from skipwise.config.resolve import resolve_lengths
from skipwise.config.run import LengthsConfig, Positions, Rope
from skipwise.data.windows import WindowCollator
from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.models.rope import read_rope, set_rope_scaling, text_config, with_full_table
from skipwise.models.windowed import masks_for
from skipwise.positions import PoSE
from skipwise.rope import YaRN
from skipwise.training.adapters import write_rope
from skipwise.training.preparation import check_attention, window_collator
from skipwise.utils.distributed import is_first
from skipwise.utils.settings import Section, Share

try:
    from axolotl.integrations.base import BasePlugin
except ModuleNotFoundError as error:  # this page can be read, and its tests run, without Axolotl
    if error.name != "axolotl":
        raise
    BasePlugin = object

LOG = logging.getLogger(f"axolotl.{__name__}")  # below Axolotl's own name, so that it is shown
# What Axolotl takes for a row where its configuration says nothing.
ROW = 512
# Options of Axolotl that do not go together with skips, and why.
CONFLICTS = {
    "sample_packing": "packs texts that must not see each other into a row, with positions of their own",
    "eval_sample_packing": "packs texts that must not see each other into a row, with positions of their own",
    "use_pose": "is another collator, whose skips stay as they are when the data set is prepared",
    "streaming": "reads rows as they come, too short ones as well",
    "pretraining_dataset": "is read as it comes, rows that are too short as well",
    "skip_prepare_dataset": "leaves rows in that are too short for a window",
    "rl": "has batches of its own",
    "reward_model": "has batches of its own",
    "process_reward_model": "has batches of its own",
    "processor_type": "has batches of its own",
    "context_parallel_size": "cuts windows again",
    "fsdp": "shards the model before it can be asked whether it sees across a skip (skipwise extend can shard)",
    "fsdp_config": "shards the model before it can be asked whether it sees across a skip (skipwise extend can shard)",
    "deepspeed": "may shard the model before it can be asked whether it sees across a skip (skipwise extend can shard)",
}


class Settings(Section):
    """The section `skipwise` in a configuration of Axolotl; its parts are those of a Skipwise configuration.

    Attributes:
        lengths: `target`, and if wanted `train` (all of a row of Axolotl otherwise) and `original`.
        positions: position sampler.
        rope: RoPE scaling.
        untouched_share: share of windows with ordinary positions, to protect the original range.
    """

    lengths: LengthsConfig
    positions: Positions = PoSE()
    rope: Rope = YaRN()
    untouched_share: Share = 0.25


class SkipwiseArgs(BaseModel):
    """What Axolotl's own configuration gets besides."""

    skipwise: dict[str, Any]


def settings_of(cfg: Mapping[str, Any]) -> Settings:
    """The section, with a row of Axolotl for a window where it names no train length.

    Raises:
        UserError: when it is missing or not valid, something else in `cfg` does not go together with it, or a row is
            shorter than what windows are cut from.
    """
    section = cfg.get("skipwise")
    if not section or not isinstance(section, Mapping):
        raise UserError(
            f"plugins name skipwise.axolotl.SkipwisePlugin, but the section skipwise is {section!r}. Say which window "
            "is wanted: skipwise: {lengths: {target: 32k}}.",
            code="section_missing",
        )
    for key, reason in CONFLICTS.items():
        value = cfg.get(key)
        alone = key == "context_parallel_size" and value == 1
        if value and not alone:
            raise UserError(
                f"{key} {reason}, so it cannot be {value!r} with skipwise. Leave it out.",
                code="axolotl_option_conflict",
            )
    row = int(cfg.get("sequence_len") or ROW)
    try:
        settings = parse_section(Settings, dict(section))
        if settings.lengths.train is None:
            settings = settings.model_copy(update={"lengths": settings.lengths.model_copy(update={"train": row})})
        settings.positions.check(window_lengths(settings))
    except UserError as error:
        raise UserError(f"In the section skipwise: {error}", code=error.code) from None
    needed = tokens_of_a_row(settings)
    if row < needed:
        raise UserError(
            f"A window of {settings.lengths.train:,} tokens is cut from {needed:,} by {settings.positions.name}, but "
            f"sequence_len is {row:,}. Set sequence_len to {needed}, or lower skipwise.lengths.train.",
            code="sequence_len_too_short",
        )
    return settings


def window_lengths(settings: Settings) -> Lengths:
    """The lengths that windows are cut by; the original one may not be known yet, and makes no difference to that."""
    train = settings.lengths.train
    assert train is not None, "settings_of sets it"
    return Lengths(original=settings.lengths.original or train, train=train, target=settings.lengths.target)


def tokens_of_a_row(settings: Settings) -> int:
    """How many tokens a row needs for a window to be cut from it."""
    return settings.positions.tokens_needed(window_lengths(settings))


def shortest_row(rows: Dataset) -> int:
    """Its tokens."""
    tables = rows.select_columns("input_ids").with_format("arrow").iter(batch_size=10_000)
    return min(int(pc.min(pc.list_value_length(table["input_ids"])).as_py()) for table in tables)


@dataclass(frozen=True)
class RowCollator:
    """`WindowCollator` for the rows of Axolotl, whose labels are -100 where they have no loss.

    Attributes:
        windows: what draws the windows.
        model: in layers that see only the last tokens it takes masks by distance.
        fixed: a row gives the same window whenever it comes, as in evaluation.
    """

    windows: WindowCollator
    model: PreTrainedModel
    fixed: bool = False

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `position_ids` and `labels`, int64[batch, window], and masks as the model takes them."""
        batch = self.windows([self._feature(row) for row in features])
        return {**batch, "attention_mask": masks_for(self.model, batch)}

    def _feature(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """As much of a row as a window can use, with a token that has a loss in it."""
        ids, labels = (np.asarray(row[key], dtype=np.int64) for key in ("input_ids", "labels"))
        visit = (0, zlib.crc32(ids.tobytes()), 0)
        rng = np.random.default_rng(visit if self.fixed else int(torch.randint(2**62, ()).item()))
        scored = np.flatnonzero(labels != -100)
        used = min(len(ids), self.windows.sampler.tokens_used(self.windows.lengths))
        one = int(rng.choice(scored)) if len(scored) else 0
        begin = int(rng.integers(max(0, one - used + 1), min(one, len(ids) - used) + 1))
        piece = slice(begin, begin + used)
        feature: dict[str, Any] = {"input_ids": ids[piece]}
        if len(scored) < len(ids):
            feature["answers"] = labels[piece] != -100
        return feature | ({"visit": visit} if self.fixed else {})


class SkipwisePlugin(BasePlugin):  # type: ignore[misc]
    """Gives the model its new RoPE, asks it whether it sees across a skip, and draws the windows."""

    def get_input_args(self) -> str:
        """Where Axolotl finds the keys of this plugin."""
        return f"{__name__}.{SkipwiseArgs.__name__}"

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the section before anything is loaded, have shorter rows left out, and the new RoPE kept."""
        settings = settings_of(cfg)
        cfg["min_sample_len"] = max(cfg.get("min_sample_len") or 0, tokens_of_a_row(settings))
        if not cfg.get("adapter"):
            return
        if cfg.get("merge_method") == "memory_efficient":
            raise UserError(
                "merge_method memory_efficient copies the config of the base, and so the RoPE from before. Leave it "
                "out; with skipwise it is legacy.",
                code="merge_method_not_supported",
            )
        cfg["merge_method"] = "legacy"

    def post_model_build(self, cfg: Mapping[str, Any], model: PreTrainedModel) -> None:
        """Set the RoPE, before adapters come around the layers; a model that has it already is left as it is."""
        settings, rope = settings_of(cfg), read_rope(model.config)
        lengths = replace(window_lengths(settings), original=settings.lengths.original or rope.original)
        parameters = with_full_table(model.config, settings.rope, lengths)
        if rope.current != lengths.target or text_config(model.config).rope_parameters != parameters:
            lengths = resolve_lengths(settings.lengths, rope.original, rope.current)
            settings.positions.check(lengths)
            set_rope_scaling(model, settings.rope, lengths)
        self.lengths = lengths

    def post_model_load(self, cfg: Mapping[str, Any], model: PreTrainedModel) -> None:
        """Probe the model's attention, as it will be trained."""
        batches = {int(cfg["micro_batch_size"]), 1}  # some backends take another path for one
        for line in check_attention(model, settings_of(cfg).positions, self.lengths.target, batches, model.dtype):
            LOG.info(line)

    def post_trainer_create(self, cfg: Mapping[str, Any], trainer: Any) -> None:
        """Have batches made of windows, in training and in evaluation. `trainer` is one of Axolotl's."""
        settings = settings_of(cfg)
        needed = tokens_of_a_row(settings)
        for rows in (trainer.train_dataset, trainer.eval_dataset):
            shortest = shortest_row(rows) if isinstance(rows, Dataset) else needed
            if shortest < needed:
                raise UserError(
                    f"A window is cut from {needed:,} tokens, but a row of the prepared data set has {shortest:,}: it "
                    "was prepared before the section skipwise was as it is. Remove dataset_prepared_path "
                    "(last_run_prepared by default).",
                    code="prepared_rows_too_short",
                )
        windows = window_collator(
            settings.positions,
            settings.rope,
            self.lengths,
            trainer.processing_class,
            untouched_share=settings.untouched_share,
        )
        trainer.data_collator = RowCollator(windows, trainer.model)
        trainer.eval_data_collator = RowCollator(windows, trainer.model, fixed=True)

    def post_train(self, cfg: Mapping[str, Any], model: PreTrainedModel) -> None:
        """Put the RoPE beside an adapter, for `skipwise.load_adapter`."""
        if is_first():
            write_rope(Path(cfg["output_dir"]), model)
