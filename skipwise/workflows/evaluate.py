"""`skipwise evaluate`: the same evaluations on one model or several; nothing is measured twice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.text import Text

from skipwise.config.files import to_yaml
from skipwise.config.run import EvaluateConfig
from skipwise.data.sources import check_source
from skipwise.errors import UserError
from skipwise.evaluation.results import EvalResult, result_key
from skipwise.evaluation.specs import EvaluationSpec, check_requirements, on_documents, result_keys
from skipwise.models.config import ModelConfig
from skipwise.runs.directory import RunDir
from skipwise.runs.environment import describe_environment
from skipwise.utils.files import short_hash, write_json, write_text
from skipwise.workflows.evaluation_arguments import ModelArgument, default_evaluations
from skipwise.workflows.evaluation_directory import (
    check_names,
    file_hashes,
    held_documents,
    identity,
    joined,
    same,
    without_values,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from skipwise.data.held_out import HeldOut


@dataclass(frozen=True)
class Prepared:
    """A model with all but its weights."""

    argument: ModelArgument
    config: "PreTrainedConfig"
    tokenizer: "PreTrainedTokenizerBase"
    held_out: "HeldOut"
    documents: dict[str, str]  # by source, a hash of what is in it


def compare(
    models: Sequence[ModelArgument], config: EvaluateConfig, output: Path, *, given: str, console: Console
) -> list[EvalResult]:
    """Measure every model, and keep rows and examples in `output`; what is there already is not measured again.

    Args:
        models: from `find_models`.
        config: what to measure.
        output: a directory of an earlier evaluation with the same settings, or a new one.
        given: the configuration as the user wrote it.
        console: where progress goes.

    Returns:
        The rows of these models and evaluations.

    Raises:
        UserError: for wrong input, before anything is written.
    """
    run = RunDir(output)
    check_early(config, run)
    prepared = [_prepare(one, config, console) for one in models]
    config = resolve(config, prepared, held_documents(run), console)
    resolved = to_yaml(joined(run, config))
    now = prepared[0].documents | file_hashes(config)
    documents = same(run, run.data, now, "content of", without_values(config, run))
    own = {
        one.argument.name: {
            "short": one.argument.short,
            **({} if one.argument.training_free is None else {"aid": str(one.argument.training_free)}),
            **identity(one.argument.path, one.config),
        }
        for one in prepared
    }
    identities = same(run, run.models, own, "model")
    check_names(run, identities)

    write_text(run.config, given)
    write_json(run.environment, describe_environment())
    write_json(run.data, documents)
    write_json(run.models, identities)
    write_text(run.resolved, resolved)
    for one in prepared:
        _measure(run, one, config, console)
    asked = set(result_keys(config.evaluate or ()))
    names = {one.name for one in models}
    return [row for row in run.read_results() if row.model in names and result_key(row) in asked]


def check_early(config: EvaluateConfig, run: RunDir) -> None:
    """Find what is wrong without importing anything heavy.

    Raises:
        UserError: for data, records, an evaluator or a directory that cannot be right, or a missing package.
    """
    for source in config.data.sources:
        check_source(source)
    if run.path.is_file():
        raise UserError(
            f"--output names a directory, but {run.path} is a file. Choose another --output.", code="output_is_file"
        )
    if run.path.exists() and any(run.path.iterdir()) and not run.models.exists():
        what = "a run of its own" if run.resolved.exists() else "no evaluation"
        raise UserError(f"{run.path} exists and is {what}. Choose another --output.", code="output_kind_mismatch")
    for spec in config.evaluate or ():
        check_requirements(spec)


def _prepare(one: ModelArgument, config: EvaluateConfig, console: Console) -> Prepared:
    from skipwise.data.chat import begin_of_text
    from skipwise.data.held_out import HeldOut, held_out_documents
    from skipwise.data.store import open_sources
    from skipwise.evaluation.prompts import encoder
    from skipwise.evaluation.training_free_attention import check_training_free
    from skipwise.models.load import check_weights_here, load_config, load_tokenizer

    own = model_config(one, config)
    known = load_config(own)
    check_weights_here(own)
    tokenizer = load_tokenizer(own)
    encoder(tokenizer, config.chat)  # refuses a chat without a template
    if one.training_free is not None:
        check_training_free(known, one.training_free)
    stores = open_sources(config.data, tokenizer, console)
    documents = held_out_documents(
        [[store.held_out] for store in stores], config.data.short_documents == "join", begin_of_text(tokenizer)
    )
    part = "" if config.data.held_out_share == 1 else "held-out "
    name = part + ", ".join(source.source for source in config.data.sources)
    hashes = {store.summary["source"]: _content(store.summary) for store in stores}
    return Prepared(one, known, tokenizer, HeldOut(name, documents), hashes)


def _content(summary: Mapping[str, Any]) -> str:
    """A hash of a source's documents; modules of the standard library are known by name, so its version counts."""
    version = summary["identity"].get("python")
    return short_hash("\n".join([*([version] if version else []), *summary["held_out"]["hashes"]]))


def model_config(one: ModelArgument, config: EvaluateConfig) -> ModelConfig:
    """How a model is loaded."""
    return ModelConfig(
        path=one.path,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        revision=one.revision,
    )


def resolve(
    config: EvaluateConfig, prepared: Sequence[Prepared], held: Mapping[str, tuple[str, ...]], console: Console
) -> EvaluateConfig:
    """The configuration with the default evaluations filled in, and with the documents that are scored.

    The tokens of the first model decide which; all models are then measured on those.

    Args:
        held: by evaluation, the documents it was measured on before, which it keeps.
    """
    from skipwise.models.rope import read_window

    specs = config.evaluate
    if specs is None:
        windows = [window for one in prepared if (window := read_window(one.config)) is not None]
        specs = default_evaluations(max(windows, default=2048))
    first = prepared[0].held_out
    resolved = [_with_documents(spec, config.seed, first, held.get(spec.name), console) for spec in specs]
    return config.model_copy(update={"evaluate": tuple(spec for spec in resolved if spec is not None)})


def _with_documents(
    spec: EvaluationSpec, seed: int, held_out: "HeldOut", held: tuple[str, ...] | None, console: Console
) -> EvaluationSpec | None:
    from skipwise.data.held_out import choose_documents

    documents = on_documents(spec)
    if documents is None or documents.document_ids is not None:
        return spec
    chosen, reached = choose_documents(
        held_out.documents, documents.context_lengths, documents.documents, seed, documents.min_document_tokens
    )
    for length in sorted(set(documents.context_lengths) - set(reached)):
        console.print(f"no {spec.name} at {length:,} tokens: no document is that long", highlight=False)
    if not reached:
        return None
    ids = tuple(document.id for document in chosen)
    if held is not None and held != ids:
        short = [document for document in held_out.documents if document.id in held and len(document) < reached[-1]]
        if short:
            raise UserError(
                f"{spec.name} was measured on documents of which {len(short)} have fewer than {reached[-1]:,} tokens, "
                "and all lengths share their documents. Choose another --output for all lengths together.",
                code="shared_documents_too_short",
            )
        ids = held
    return cast(EvaluationSpec, documents.with_documents(ids, tuple(reached)))


def _measure(run: RunDir, one: Prepared, config: EvaluateConfig, console: Console) -> None:
    from transformers.utils import logging as transformers_logging

    from skipwise.evaluation.measurement import EvaluationContext, ModelUnderTest
    from skipwise.evaluation.progress import ConsoleProgress
    from skipwise.evaluation.prompts import encoder
    from skipwise.evaluation.runner import evaluate
    from skipwise.evaluation.training_free_attention import use_training_free
    from skipwise.models.load import check_vocabulary, default_device, load_model, usable_attention, usable_dtype
    from skipwise.models.rope import read_window

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    argument = one.argument
    console.print(Text(argument.name, "bold"))
    device = default_device()
    with console.status(Text(f"evaluating {argument.name}")) as status:
        located, lines = usable_attention(model_config(argument, config), device)
        model = load_model(located, device)  # in float32 with autocast, as `extend` measures, for the same results
        dtype, more = usable_dtype(located, model, device)
        for line in [*lines, *more]:
            console.print(line, highlight=False)
        texts = [document.documents.largest_id() for document in one.held_out.documents]
        prompt = encoder(one.tokenizer, config.chat)("a")  # with the tokens of a chat
        check_vocabulary(model, one.tokenizer, max([*texts, *prompt], default=-1))
        if argument.training_free is not None:
            use_training_free(model, argument.training_free)
        window = read_window(one.config)
        tested = ModelUnderTest(model, one.tokenizer, argument.stage, argument.name, window, dtype, config.chat)
        context = EvaluationContext(one.held_out, config.seed, run.shared, ConsoleProgress(console, status))
        done = run.measured(argument.stage, argument.name)
        for rows in evaluate(tested, config.evaluate or (), context, run.examples(argument.short), done):
            run.add_results(rows)
            for row in rows:
                if row.status == "failed":
                    console.print(f"failed: {row.evaluation}: {row.reason}", highlight=False)
