"""Skipwise inside Axolotl: windows with new skips at every visit, in a training that Axolotl runs.

    plugins: [skipwise.axolotl.SkipwisePlugin]
    skipwise: {lengths: {target: 32k}}

`sequence_len` of Axolotl is the length of its rows, and of a training window. See examples/axolotl.yaml.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel
from transformers import PreTrainedModel

from skipwise.config import LengthsConfig, Positions, Rope, Section, Share
from skipwise.config_files import parse_section
from skipwise.data.sentences import sentences_of
from skipwise.data.windows import WindowCollator
from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.models.probe import probe_attention
from skipwise.models.rope import read_rope, set_rope_scaling
from skipwise.models.windowed import check_windows, masks_for
from skipwise.planning import resolve_target
from skipwise.positions import LongRecipe, PoSE
from skipwise.rope import Mixed, YaRN

try:
    from axolotl.integrations.base import BasePlugin
except ModuleNotFoundError:  # this page can be read, and its tests run, without it
    BasePlugin = object

LOG = logging.getLogger(f"axolotl.{__name__}")  # below its own name, so that it is shown

# Of Axolotl's options those that draw or cut windows themselves, and why they do not go together with skips.
CONFLICTS = {
    "sample_packing": "packs texts that must not see each other into a row, with positions of their own",
    "eval_sample_packing": "packs texts that must not see each other into a row, with positions of their own",
    "use_pose": "is another collator, whose skips stay as they are when the data set is prepared",
    "streaming": "reads rows as they come, too short ones as well",
    "pretraining_dataset": "is read as it comes, rows that are too short as well",
    "rl": "has batches of its own",
}


class Settings(Section):
    """The section `skipwise` in a configuration of Axolotl; its parts are those of a Skipwise configuration.

    Attributes:
        lengths: `target`, and if wanted `train` (a row of Axolotl otherwise) and `original`.
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
    if not cfg.get("skipwise"):
        raise UserError(
            "plugins name skipwise.axolotl.SkipwisePlugin, but there is no section skipwise. Add one with the window "
            "that is wanted: skipwise: {lengths: {target: 32k}}."
        )
    for key, reason in CONFLICTS.items():
        if cfg.get(key):
            raise UserError(f"{key} {reason}, so it cannot be {cfg[key]!r} with skipwise. Leave it out.")
    settings = parse_section(Settings, dict(cfg["skipwise"]))
    row = int(cfg["sequence_len"])
    if settings.lengths.train is None:
        settings = settings.model_copy(update={"lengths": settings.lengths.model_copy(update={"train": row})})
    needed = tokens_of_a_row(settings)
    if row < needed:
        raise UserError(
            f"Windows of {settings.lengths.train:,} tokens are cut from {needed:,} by {settings.positions}, but "
            f"sequence_len is {row:,}. Set sequence_len to {needed}, or lower skipwise.lengths.train."
        )
    return settings


def tokens_of_a_row(settings: Settings) -> int:
    """How many tokens a row needs for a window to be cut from it."""
    train, target = settings.lengths.train, settings.lengths.target
    assert train is not None, "settings_of sets it"
    return settings.positions.tokens_needed(Lengths(original=train, train=train, target=target))


@dataclass(frozen=True)
class RowCollator:
    """`WindowCollator` for the rows of Axolotl, whose labels are -100 where they have no loss.

    Attributes:
        windows: what draws the windows.
        model: in layers that see only the last tokens it takes masks by distance.
    """

    windows: WindowCollator
    model: PreTrainedModel

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `position_ids` and `labels`, int64[batch, window], and masks as the model takes them."""
        rows = []
        for feature in features:
            scored = torch.as_tensor(feature["labels"]).ne(-100).numpy()
            answers = {} if scored.all() else {"answers": scored}
            rows.append({"input_ids": feature["input_ids"], **answers})
        batch = self.windows(rows)
        return {**batch, "attention_mask": masks_for(self.model, batch)}


class SkipwisePlugin(BasePlugin):  # type: ignore[misc]
    """Gives the model its new RoPE, asks it whether it sees across a skip, and draws the windows."""

    def get_input_args(self) -> str:
        """Where Axolotl finds the keys of this plugin."""
        return f"{__name__}.{SkipwiseArgs.__name__}"

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the section before anything is loaded, have shorter rows left out, and the new RoPE kept."""
        settings = settings_of(cfg)
        cfg["min_sample_len"] = max(cfg.get("min_sample_len") or 0, tokens_of_a_row(settings))
        # `axolotl merge-lora` otherwise copies the config of the base, and so the RoPE from before.
        cfg["merge_method"] = "legacy"

    def post_model_build(self, cfg: Mapping[str, Any], model: PreTrainedModel) -> None:
        """Set the RoPE, before adapters come around the layers."""
        settings, rope = settings_of(cfg), read_rope(model.config)
        self.lengths = resolve_target(settings, rope.original, rope.current)
        set_rope_scaling(model, settings.rope, self.lengths)

    def post_model_load(self, cfg: Mapping[str, Any], model: PreTrainedModel) -> None:
        """Ask the model, as it will be trained, whether its attention reaches across a skip."""
        if model.device.type == "meta":  # with FSDP the weights are on the first process
            return
        training = model.training
        model.train()
        probe_attention(model, self.lengths.target, int(cfg["micro_batch_size"]), dtype=model.dtype)
        check_windows(model, self.lengths.target, model.dtype)
        model.train(training)
        LOG.info("attention reaches across a skip, and sees how far it is: checked")

    def post_trainer_create(self, cfg: Mapping[str, Any], trainer: Any) -> None:
        """Have batches made of windows, in training and in evaluation. `trainer` is one of Axolotl's."""
        settings = settings_of(cfg)
        windows = WindowCollator(
            settings.positions,
            self.lengths,
            untouched_share=settings.untouched_share,
            whole_batches=isinstance(settings.rope, Mixed),
            sentences=sentences_of(trainer.processing_class) if isinstance(settings.positions, LongRecipe) else None,
        )
        trainer.data_collator = trainer.eval_data_collator = RowCollator(windows, trainer.model)
