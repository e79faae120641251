"""How long the parts of a run take on this machine, measured before they begin, and how much time is left."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from skipwise.evaluation.cost import texts_read
from skipwise.evaluation.specs import EvaluationSpec, Passkey
from skipwise.models.forward import autocast
from skipwise.models.load import vocabulary_size
from skipwise.models.reading import score_tokens
from skipwise.training.batch import step_on
from skipwise.training.trainer import Teacher

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
        dtype: of matrix products.
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
        dtype: of matrix products.
    """
    texts = [texts_read(spec) for spec in specs]
    lengths = [length for one in texts for length in one or ()]
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
        specs: evaluations for which `texts_read` is known.
        measured: seconds to read a text, by its length in tokens.
    """
    total = 0.0
    for spec in specs:
        # Prompts with one key are sorted by its place, and each is read from where it differs from the one before.
        share = 0.5 if isinstance(spec, Passkey) and spec.keys_per_prompt == 1 else 1.0
        for length, count in (texts_read(spec) or {}).items():
            total += share * count * reading_seconds(length, measured)
    return total


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
