"""`skipwise search`: factors of the `mixed` RoPE scaling for one model, chosen by what the model does with them."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from rich.console import Console

from skipwise.config.files import to_yaml
from skipwise.config.run import RunConfig
from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.positions import example_rng
from skipwise.rope import Mixed
from skipwise.rope.search import Factors, evolve_factors, rounded
from skipwise.utils.files import append_line, read_lines, short_hash, write_text

if TYPE_CHECKING:
    from skipwise.workflows.context import RunContext

# Factors up to this multiple of Lt / Lc: the slowest dimensions may need more than their share (LongRoPE2).
MOST_OVER_FACTOR = 2.0
Fitness = Literal["needles", "text"]
Scored = tuple[NDArray[np.int64], NDArray[np.bool_]]


@dataclass(frozen=True)
class Search:
    """How to look for factors.

    Attributes:
        fitness: `needles`: the loss of answers in retrieval documents of the target length, as in LongRoPE2; `text`: of
            all tokens of the last half of training documents, as in LongRoPE.
        documents: of the target length, the same for all candidates.
        generations, population: of the evolution.
    """

    fitness: Fitness = "needles"
    documents: int = 8
    generations: int = 8
    population: int = 12


def search_factors(config: RunConfig, search: Search, output: Path, console: Console) -> Path:
    """Search, and write a configuration section with what was found.

    Every loss is kept in `output/losses.jsonl` as soon as it is known; the same search goes on from there.

    Args:
        config: of the extension that the factors are for; `rope` must be `mixed`.
        search: how.
        output: a directory, of this search or new.
        console: where progress goes.

    Returns:
        `output/rope.yaml`, a `rope` section.

    Raises:
        UserError: for wrong input.
    """
    if not isinstance(config.rope, Mixed):
        raise UserError(
            f"A search is for the scaling 'mixed', but rope is {config.rope.name!r}. Leave --rope out.",
            code="search_needs_mixed_rope",
        )
    from skipwise.export.inspection import inspect_run
    from skipwise.runs.directory import RunDir
    from skipwise.workflows.context import open_context
    from skipwise.workflows.extend import check_early

    check_early(config, RunDir(output), resume=True)
    untrained = config.train.model_copy(update={"max_steps": 0})
    info, run = inspect_run(config.model_copy(update={"train": untrained}))
    lengths = run.lengths
    context = open_context(run, console)
    depends_on = [to_yaml(config), str(lengths), json.dumps(context.data.summary, sort_keys=True)]
    depends_on += [search.fitness, str(search.documents), str(search.population)]
    loss_of = _remembered(
        _loss(context, _documents(context, search, lengths), lengths), output, short_hash("\n".join(depends_on))
    )
    ramp = rounded(config.rope.factors(info.rope.rotary_dim, info.rope.theta, lengths))
    linear = rounded(np.full(info.rope.rotary_dim // 2, lengths.factor))
    rng = np.random.default_rng(np.random.SeedSequence((config.seed, lengths.target)))
    best, since = ramp, time.monotonic()
    for generation in evolve_factors(
        [ramp, linear], loss_of, rng,
        generations=search.generations, population=search.population, most=MOST_OVER_FACTOR * lengths.factor,
    ):  # fmt: skip
        best = generation.best
        now = time.monotonic()
        # What an interrupted search had measured takes no time, so the last generation counts alone.
        left = round((now - since) * (search.generations - generation.number)) if generation.number else None
        since = now
        console.print(
            f"generation {generation.number} of {search.generations}: loss {generation.loss:.4f}, with the ramp "
            f"{loss_of(ramp):.4f}, with all dimensions interpolated {loss_of(linear):.4f}; {generation.tried} tried"
            + ("" if left is None else f", {timedelta(seconds=left)} left"),
            highlight=False,
        )
    section = {"rope": {"name": "mixed", "long_factors": list(best)}}
    write_text(output / "rope.yaml", yaml.safe_dump(section, sort_keys=False, default_flow_style=None))
    return output / "rope.yaml"


def _remembered(measure: Callable[[Factors], float], output: Path, setting: str) -> Callable[[Factors], float]:
    """`measure`, with every loss kept in the directory and none measured twice."""
    journal = output / "losses.jsonl"
    lines = read_lines(journal)
    if any(line["setting"] != setting for line in lines):
        raise UserError(
            f"{output} holds another search, of other data or settings. Choose another --output.",
            code="configuration_changed",
        )
    known = {tuple(line["factors"]): float(line["loss"]) for line in lines}

    def loss_of(factors: Factors) -> float:
        if factors not in known:
            known[factors] = measure(factors)
            append_line(journal, {"factors": factors, "loss": known[factors], "setting": setting})
        return known[factors]

    return loss_of


def _documents(context: "RunContext", search: Search, lengths: Lengths) -> list[Scored]:
    """Documents of the target length, and which of their tokens count."""
    from skipwise.data.mixture import retrieval_documents
    from skipwise.models.load import vocabulary_size

    if search.fitness == "needles":
        retrieval = retrieval_documents(
            context.tokenizer, vocabulary_size(context.model), context.data.sources, copies_share=0.0
        )
        streams = (example_rng(context.run.seed, 0, index) for index in range(search.documents))
        return [retrieval.draw(lengths.target, rng) for rng in streams]
    places = [
        (source.documents, int(start))
        for source in context.data.sources
        for start, stop in zip(source.documents.starts, source.documents.stops, strict=True)
        if stop - start >= lengths.target
    ]
    if not places:
        raise UserError(
            f"--fitness text needs documents of {lengths.target:,} tokens, but there is none. Give longer ones, or "
            "use --fitness needles.",
            code="documents_too_short",
        )
    scored = np.arange(lengths.target) >= lengths.target // 2
    order = np.random.default_rng(context.run.seed).permutation(len(places))[: search.documents]
    chosen = [places[number] for number in order]
    return [(documents.read(start, start + lengths.target), scored) for documents, start in chosen]


def _loss(context: "RunContext", documents: Sequence[Scored], lengths: Lengths) -> Callable[[Factors], float]:
    """Mean loss in nats of the tokens that count."""
    import torch

    from skipwise.evaluation.inference import score_tokens
    from skipwise.models.forward import autocast
    from skipwise.models.rope import set_rope_scaling

    @torch.no_grad()
    def loss(factors: Factors) -> float:
        """Mean over what is scored of all documents, in nats, under these factors."""
        set_rope_scaling(context.model, Mixed(long_factors=factors), lengths)
        total = count = 0.0
        for tokens, scored in documents:
            with autocast(context.model.device, context.dtype):
                scores = score_tokens(context.model, torch.from_numpy(tokens)[None], torch.from_numpy(scored)[None])
            total -= float(scores.log_probs.double().sum())
            count += int(scored.sum())
        return total / count

    return loss
