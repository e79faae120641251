"""How long the parts of a run take on this machine, measured before they begin, and how much time is left."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from skipwise.evaluation.cost import tokens_read
from skipwise.evaluation.runner import is_out_of_memory
from skipwise.evaluation.specs import EvaluationSpec, Passkey
from skipwise.models.forward import autocast
from skipwise.models.load import vocabulary_size
from skipwise.models.reading import score_tokens
from skipwise.training.batch import step_on
from skipwise.training.trainer import Teacher

# A trial step has about so many tokens: enough to use the machine, few enough to be soon over.
TRIAL_TOKENS = 4096
# The first pass of a process also prepares kernels, so a quick one is repeated.
QUICK = 3.0


@dataclass
class TimeLeft:
    """The time left of a run, from the time expected for each part and the time that finished parts took.

    Attributes:
        expected: seconds for each part that is not done, in order; empty where they are not known.
        expected_done: seconds expected for the parts that are finished.
        taken: seconds that those took.
    """

    expected: dict[str, float]
    expected_done: float = field(default=0.0, init=False)
    taken: float = field(default=0.0, init=False)

    def finish(self, part: str, seconds: float) -> None:
        """Note that a part took so many seconds."""
        self.expected_done += self.expected.pop(part, 0.0)
        self.taken += seconds

    def seconds(self) -> float | None:
        """Seconds left of the parts that are not finished; None where nothing is known.

        >>> left = TimeLeft({"train": 60.0, "evaluate": 30.0})
        >>> left.finish("train", 120.0)
        >>> left.seconds()
        60.0
        """
        if not self.expected:
            return None
        pace = self.taken / self.expected_done if self.expected_done else 1.0
        return pace * sum(self.expected.values())


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
    echoes: bool,
) -> float | None:
    """Seconds of the forward and backward passes of `windows` windows; None where they do not fit into memory.

    Args:
        window: tokens in a window.
        windows: in a training step of this process.
        dtype: of matrix products.
        kl_weight: of the term to the untouched model; the model itself stands in for it.
        echoes: whether windows come with a mask of attention scores.
    """
    trial = max(1, min(windows, TRIAL_TOKENS // window))
    teacher = Teacher(model, kl_weight) if kl_weight else None
    step = step_on(model, window, dtype, teacher, echoes=echoes)
    seconds = _seconds(lambda: step(trial), model.device)
    return None if seconds is None else seconds * windows / trial


def measure_evaluation(model: PreTrainedModel, specs: Sequence[EvaluationSpec], dtype: torch.dtype) -> float | None:
    """Seconds to evaluate one stage, from two texts that the model reads; None where the amount to read is not known.

    Args:
        specs: evaluations.
        dtype: of matrix products.
    """
    if any(tokens_read(spec) is None for spec in specs):
        return None
    longest = max((length for spec in specs for length in spec.context_lengths if length is not None), default=0)
    if not longest:
        return 0.0
    length = max(2, min(longest, TRIAL_TOKENS))
    measured = {}
    for tokens in (length // 2, length):
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

    Reading n tokens takes a n + b n^2 seconds: the second term is attention. a and b come from two texts.

    Args:
        specs: evaluations with context lengths, for which `tokens_read` is known.
        measured: seconds to read a text, by its length in tokens; two lengths above 0, or one.
    """
    (shorter, fast), (longer, slow) = min(measured.items()), max(measured.items())
    growth = (slow / longer - fast / shorter) / (longer - shorter) if longer > shorter else 0.0
    growth = max(0.0, growth)
    base = slow / longer - growth * longer
    total = 0.0
    for spec in specs:
        # Prompts with one key are sorted by its place, and each is read from where it differs from the one before.
        share = 0.5 if isinstance(spec, Passkey) and spec.keys_per_prompt == 1 else 1.0
        for length in filter(None, spec.context_lengths):
            at_length: dict[str, Any] = {"context_lengths": (length,)}
            tokens = tokens_read(replace(spec, **at_length)) or 0
            total += share * tokens * (base + growth * length)
    return total


def _seconds(run: Callable[[], object], device: torch.device) -> float | None:
    """Seconds of a call, without the first one where that is quick; None where it does not fit into memory."""
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        try:
            run()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - started
        if seconds > QUICK:
            break
    return seconds
