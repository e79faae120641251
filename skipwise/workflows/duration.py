"""How long the parts of a run take on this machine, measured before they begin, and how much time is left."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from skipwise.evaluation.inference import score_tokens
from skipwise.evaluation.specs import EvaluationSpec
from skipwise.models.forward import autocast
from skipwise.models.load import vocabulary_size
from skipwise.training.trainer import Teacher
from skipwise.training.trial import step_on
from skipwise.utils.distributed import world_size
from skipwise.workflows.context import RunContext

# Tokens in a trial: enough to load the machine, few enough to be quick.
TRIAL_TOKENS = 4096
# The first pass of a process also prepares kernels, so a quick one is repeated.
QUICK = 3.0
# How the names of evaluations begin among the parts of a run.
EVALUATION = "evaluate"


@dataclass
class TimeLeft:
    """The time left of a run.

    Attributes:
        expected: seconds for each part that is not finished, in order; empty where they are not known.
    """

    expected: dict[str, float]

    def finish(self, part: str, seconds: float) -> None:
        """Note that a part took so many seconds. All evaluations of a run do the same work, and take as long."""
        if self.expected.pop(part, None) is not None and part.startswith(EVALUATION):
            others = [other for other in self.expected if other.startswith(EVALUATION)]
            self.expected.update(dict.fromkeys(others, seconds))

    def seconds(self) -> float | None:
        """Seconds left of the parts that are not finished; None where nothing is known.

        >>> left = TimeLeft({"evaluate original": 20.0, "train": 60.0, "evaluate extended": 20.0})
        >>> left.finish("evaluate original", 30.0)
        >>> left.seconds()
        90.0
        """
        return sum(self.expected.values()) if self.expected else None


def format_seconds(seconds: float) -> str:
    """A duration in words.

    >>> [format_seconds(seconds) for seconds in (4, 88, 200, 9000)]
    ['under 10 seconds', 'about 90 seconds', 'about 3 minutes', 'about 2.5 hours']
    """
    if seconds < 10:
        return "under 10 seconds"
    if seconds < 100:
        return f"about {10 * round(seconds / 10)} seconds"
    return f"about {seconds / 60:.0f} minutes" if seconds < 5400 else f"about {seconds / 3600:.1f} hours"


def expected_seconds(context: RunContext) -> dict[str, float]:
    """Seconds that each step of a run takes on this machine, measured with its model; empty where not known."""
    run, config = context.run, context.run.train
    if world_size() > 1 or config.lora or config.fsdp or config.deepspeed:
        return {}  # only a wrapped model would tell
    seconds = dict.fromkeys(run.steps, 0.0)
    evaluated = [step for step in run.steps if step.startswith(EVALUATION)]
    if evaluated:
        one = measure_evaluation(context.model, run.evaluate, context.dtype)
        if one is None:
            return {}
        seconds.update(dict.fromkeys(evaluated, one))
    if run.trains:
        one = measure_training(
            context.model,
            window=run.window_length,
            windows=config.per_device_train_batch_size * config.gradient_accumulation_steps,
            dtype=context.dtype,
            kl_weight=config.kl_weight or 0.0,
            skips=run.positions.has_skips,
            echoes=bool(config.echo_share),
        )
        if one is None:
            return {}
        seconds["train"] = one * config.max_steps
    return seconds


def measure_training(
    model: PreTrainedModel,
    *,
    window: int,
    windows: int,
    dtype: torch.dtype,
    kl_weight: float,
    skips: bool,
    echoes: bool,
) -> float | None:
    """Seconds of the forward and backward passes of `windows` windows; None where they fail, as without the memory.

    Args:
        window: tokens in a window.
        windows: in a training step of this process.
        dtype: compute dtype.
        kl_weight: of the term to the untouched model; the model itself stands in for it.
        skips: whether positions have skips.
        echoes: whether windows come with a mask of attention scores.
    """
    trial = max(1, min(windows, TRIAL_TOKENS // window))
    teacher = Teacher(model, kl_weight) if kl_weight else None
    step = step_on(model, window, dtype, teacher, skips=skips, echoes=echoes)
    seconds = _seconds(lambda: step(trial), model.device)
    return None if seconds is None else seconds * windows / trial


def measure_evaluation(model: PreTrainedModel, specs: Sequence[EvaluationSpec], dtype: torch.dtype) -> float | None:
    """Seconds to evaluate one stage, from texts that the model reads; None where the amount to read is not known.

    Args:
        specs: evaluations.
        dtype: compute dtype.
    """
    texts = [spec.texts_read() for spec in specs]
    lengths = [one.length for own in texts for one in own or ()]
    if any(one is None for one in texts) or not lengths:
        return None if texts else 0.0
    longest = max(2, min(max(lengths), TRIAL_TOKENS))
    measured = {}
    for tokens in sorted({max(2, min(*lengths, longest)), max(2, longest // 2), longest}):
        seconds = _seconds(partial(_read, model, tokens, dtype), model.device)
        if seconds is None:
            return None
        measured[tokens] = seconds
    return evaluation_seconds(specs, measured)


def _read(model: PreTrainedModel, tokens: int, dtype: torch.dtype) -> None:
    """Read a text of so many tokens, as an evaluation does."""
    ids = torch.randint(vocabulary_size(model), (1, tokens), generator=torch.Generator().manual_seed(0))
    with autocast(model.device, dtype):
        score_tokens(model, ids, torch.arange(tokens)[None] == tokens - 1)


def evaluation_seconds(specs: Sequence[EvaluationSpec], measured: Mapping[int, float]) -> float:
    """Seconds to evaluate one stage.

    Args:
        specs: evaluations that know what they read.
        measured: seconds to read a text, by its length in tokens.
    """
    texts = [one for spec in specs for one in spec.texts_read() or ()]
    return sum(one.share * one.count * reading_seconds(one.length, measured) for one in texts)


def reading_seconds(length: int, measured: Mapping[int, float]) -> float:
    """Seconds to read a text, from those of others: linear between them, and beyond them as a n + b n^2.

    The second term is attention.

    Args:
        length: of the text, in tokens.
        measured: seconds by length, at least one.

    >>> round(reading_seconds(15, {10: 1.0, 20: 4.0}), 6), round(reading_seconds(40, {10: 1.0, 20: 4.0}), 6)
    (2.5, 16.0)
    """
    lengths = sorted(measured)
    last = lengths[-1]
    if length <= last or len(lengths) == 1:
        return float(np.interp(length, lengths, [measured[n] for n in lengths])) * max(1.0, length / last)
    before = lengths[-2]
    growth = max(0.0, (measured[last] / last - measured[before] / before) / (last - before))
    return length * (measured[last] / last + growth * (length - last))


def _seconds(run: Callable[[], object], device: torch.device) -> float | None:
    """Seconds of a call, without the first one where that is quick; None where it fails."""
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        try:
            run()
        except Exception:  # an estimate never ends a run; what is wrong shows when it is really done
            return None
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - started
        if seconds > QUICK:
            break
    return seconds
