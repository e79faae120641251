"""The commands that work on the files of a model: doctor, convert, export."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skipwise.cli.terminal import console, errors
from skipwise.errors import UserError

if TYPE_CHECKING:
    from skipwise.export.doctor import Diagnosis
    from skipwise.export.inspection import ModelInfo
    from skipwise.export.readers import Reading


def doctor(
    model: Annotated[str, typer.Argument(help="Model directory, hub id, or builtin:tiny.")],
    target: Annotated[
        str | None, typer.Option(help="Check whether the model can be extended to this length, e.g. 32k.")
    ] = None,
    original: Annotated[
        str | None, typer.Option(help="Set the original length, if the config does not state it.")
    ] = None,
    probe: Annotated[
        bool | None,
        typer.Option(
            "--probe/--no-probe",
            help="Probe the attention of the loaded model.  \\[default: if weights are on this machine]",
        ),
    ] = None,
    fix: Annotated[Path | None, typer.Option(help="Write a repaired copy to this new directory.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check how transformers, vLLM and llama.cpp read a model's RoPE, and whether it can be extended.

    --fix writes a repaired copy. Exit code 2: something is wrong with the model (after --fix: with the copy), or it
    cannot be extended.
    """
    from skipwise.export.doctor import diagnose, fixed_copy, read_siblings
    from skipwise.models.locate import model_location
    from skipwise.models.shape import read_config
    from skipwise.models.weight_files import has_weights

    wanted, first = _length(target), _length(original)
    directory = Path(model_location(model))
    beside = read_siblings(directory) if directory.is_dir() else {}
    info = _inspected(model, wanted, first)
    if isinstance(info, UserError) and info.code == "no_rope":
        raise info
    try:
        found = diagnose(read_config(model), beside, first)
    except UserError as error:
        raise (info if isinstance(info, UserError) else error) from None
    trained = directory.parent / "rope.json" if directory.name == "model" else None
    if trained is not None and trained.is_file():
        found = _with_run(found, read_config(model), trained)
    pairs = _about(info, found, model, wanted)
    weights_here = has_weights(directory) and not isinstance(info, UserError)
    if not has_weights(directory):
        pairs.append(("weights", "not here, so not looked at"))
    if probe or (probe is None and weights_here):
        with errors.status(f"asking {model}"):
            probed = _probe(model, found.current)
        pairs.append(("probe", str(probed)))
        info = probed if isinstance(probed, UserError) else info
    if as_json:
        print(json.dumps({**found.as_dict(), **dict(pairs)}))
    else:
        _show(found, pairs, model)
    if fix is not None and not any(finding.fixed for finding in found.findings):
        raise UserError(
            f"--fix repairs what is wrong, but it can fix nothing here. {fix} is not written.",
            code="nothing_to_repair",
        )
    if fix is not None:
        fixed_copy(directory, found, beside, fix)
        found = diagnose(read_config(str(fix)), read_siblings(fix), first)
        log = (errors if as_json else console).print
        log(f"Written: {fix}")
        log(_after_fix(found), soft_wrap=True)
    if any(not finding.limit for finding in found.findings):
        raise UserError(
            f"{fix} is not valid either, for the reasons above. Fix the rest by hand, or set --original if asked."
            if fix is not None
            else f"Something is wrong with {model}, as said above; --fix DIRECTORY writes a repaired copy."
            if any(finding.fixed for finding in found.findings)
            else f"Something is wrong with {model}, as said above, which --fix cannot fix.",
            code="model_has_faults",
        )
    if isinstance(info, UserError):
        raise info


def convert(
    family: Annotated[str, typer.Argument(help="gptj (becomes a Phi) or baichuan (of 7B; becomes a Llama).")],
    source: Annotated[Path, typer.Argument(help="Directory of the model, with safetensors.")],
    output: Annotated[Path, typer.Argument(help="New directory.")],
) -> None:
    """Rewrite a model whose RoPE no config can change as one whose RoPE a config can change; it computes the same."""
    from skipwise.errors import nearest
    from skipwise.export.convert import CONVERSIONS

    if family not in CONVERSIONS:
        raise UserError(
            f"There is no conversion of {family!r}.{nearest(family, CONVERSIONS)}", code="unknown_conversion"
        )
    with console.status(f"converting {source}"):
        CONVERSIONS[family](source, output)
    console.print(f"Written: {output}")


def export(
    run: Annotated[Path, typer.Argument(help="Run directory, or directory of a model that carries its RoPE.")],
    output: Annotated[Path, typer.Argument(help="New directory.")],
    dtype: Annotated[
        str | None, typer.Option(help="Store weights as float32, float16 or bfloat16.  \\[default: as they are]")
    ] = None,
    gguf: Annotated[str | None, typer.Option(help="Also write a file for llama.cpp: f32, f16, bf16 or q8_0.")] = None,
    converter: Annotated[
        Path | None, typer.Option(help="Use llama.cpp in this directory for --gguf.  \\[default: $LLAMA_CPP]")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="Accept that this reader computes something else; repeatable.")
    ] = None,
    push: Annotated[str | None, typer.Option(help="Upload to this repository of the Hugging Face hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the uploaded repository private.")] = False,
) -> None:
    """Write a model for others, with a card, after checking that servers read its RoPE as it was trained."""
    from skipwise.config.files import parse_written, read_yaml
    from skipwise.evaluation.results import retrieval_warnings
    from skipwise.export.publish import Export, export_model, export_run, push_to_hub
    from skipwise.report.tables import comparison_markdown, stage_columns
    from skipwise.runs.directory import RunDir

    directory = RunDir(run)
    choices = Export(dtype=dtype, gguf=gguf, converter=converter, without=tuple(without or ()), name=push)
    plain = (run / "config.json").is_file()
    if (run / "adapter_config.json").is_file():
        raise UserError(
            f"export takes a whole model, but {run} holds an adapter. In Python, put it on its base and save that: "
            "skipwise.save(skipwise.load_adapter(BASE, ADAPTER).merge_and_unload(), tokenizer, NEW).",
            code="adapter_not_merged",
        )
    if not plain and not all(
        file.is_file() for file in (directory.model / "config.json", directory.resolved, directory.rope)
    ):
        if directory.resolved.is_file():
            raise UserError(
                f"export takes a finished run, and {run} is not finished. Finish it with --resume.",
                code="run_not_finished",
            )
        raise UserError(
            f"export takes a run of skipwise extend or the directory of a model, and {run} is neither. Name the "
            "directory that was the --output of the run, or one with a config.json and weights.",
            code="not_a_run",
        )
    with console.status(f"exporting {run}"):
        if plain:
            said = export_model(run, output, choices)
        else:
            config, rows = parse_written(read_yaml(directory.resolved)), directory.read_results()
            table = comparison_markdown(stage_columns(rows)) if rows else ""
            warnings = tuple(retrieval_warnings(rows, config.lengths.original or 0, remedies=False))
            said = export_run(directory, config, output, replace(choices, table=table, warnings=warnings))
    console.print(f"Written: {output}")
    for line in said:
        console.print(line, soft_wrap=True)
    if push is not None:
        with console.status(f"uploading to {push}"):
            address = push_to_hub(output, push, private)
        console.print(f"Uploaded: {address}")


def _length(given: str | None) -> int | None:
    from skipwise.lengths import parse_length

    value = None if given is None else parse_length(given)
    assert value is None or isinstance(value, int)
    return value


def _inspected(model: str, target: int | None, original: int | None) -> "ModelInfo | UserError":
    """What is known of a model, or why `extend` would not take it."""
    from skipwise.export.inspection import inspect_model
    from skipwise.models.config import ModelConfig

    try:
        return inspect_model(ModelConfig(path=model), target, original)
    except UserError as error:
        return error


def _about(info: "ModelInfo | UserError", found: "Diagnosis", model: str, target: int | None) -> list[tuple[str, str]]:
    """How large a model is, and whether it can be extended (to a target): names and sentences."""
    from skipwise.report.plan import describe_parameters

    if isinstance(info, UserError):
        return [("extend", f"refused: {info}")]
    size = describe_parameters(info.parameters.total, info.parameters.active)
    rows = [("size", size), *(("note", note) for note in info.notes())]
    return [*rows, ("target", _prospect(found, model, target))] if target else rows


def _prospect(found: "Diagnosis", model: str, target: int) -> str:
    """Whether a model can be extended to a window, and what that means for it."""
    from skipwise.lengths import Lengths
    from skipwise.report.plan import plan_warnings

    if target <= found.current:
        return f"{target:,} tokens are not more than its window of {found.current:,} is: nothing to extend"
    factor = target / found.original
    doubted = "".join(f". {ambiguity}" for ambiguity in plan_warnings(Lengths(found.original, found.original, target)))
    before = "" if found.current == found.original else ", the scaling it has being replaced"
    command = f"skipwise extend {model} --target {target} --data ..."
    return f"{target:,} tokens are {factor:g} times its original window{before}: {command}{doubted}"


def _probe(model: str, window: int) -> str | UserError:
    """The attention probe on the model as it is, with its own window; the error where it fails or cannot be loaded."""
    from transformers.utils.logging import disable_progress_bar

    from skipwise.models.config import ModelConfig
    from skipwise.models.load import default_device, load_model
    from skipwise.models.probe import PROBE_TOKENS, probe_attention

    disable_progress_bar()
    if window < 2 * PROBE_TOKENS:
        return f"its window is too short for it ({2 * PROBE_TOKENS} tokens)"
    try:
        probe_attention(load_model(ModelConfig(path=model), default_device()), window, 1)
    except UserError as error:
        return error
    return "attention reaches across a skip, and sees how far it is"


def _with_run(found: "Diagnosis", config: Mapping[str, Any], trained: Path) -> "Diagnosis":
    """With what its run knows: the RoPE that it was trained with."""
    from skipwise.export.doctor import Finding
    from skipwise.export.publish import check_readers
    from skipwise.utils.files import read_json

    try:
        check_readers(dict(config), read_json(trained), [])
    except UserError as error:
        what, _, remedy = str(error).rpartition(": it was changed. ")
        return replace(found, findings=[Finding(f"{what}.", remedy, fixed=False), *found.findings])
    return replace(found, as_trained=True)


def _after_fix(found: "Diagnosis") -> str:
    """What a second look at the copy finds."""
    wrong = [finding for finding in found.findings if not finding.limit]
    if not wrong:
        return "A second look at it finds nothing wrong."
    return "\n".join(["Still wrong with it:", *(f"- {finding.what} {finding.remedy}" for finding in wrong)])


def _show(found: "Diagnosis", pairs: list[tuple[str, str]], model: str) -> None:
    """Tables of what it is, how it is read, and what is wrong."""
    from skipwise.export.readers import Reading, transformers_5
    from skipwise.report.tables import pairs_table, plain_table

    window = (
        f"{found.original:,} first, {found.current:,} now" if found.current != found.original else f"{found.current:,}"
    )
    about = [("family", found.family), ("window", window), ("layers", "\n".join(found.layers)), *pairs]
    console.print(pairs_table(model, about))
    meant = transformers_5(found.fixed)
    body = [["as it should be", *_cells(meant, meant)]]
    for reader, read in found.readings.items():
        body.append([reader, *(_cells(read, meant) if isinstance(read, Reading) else ["stops", *["-"] * 5])])
    header = ["", "type", "theta", "window", "longest wave", "attention", "apart"]
    console.print(plain_table("How it is read", header, body))
    for finding in found.findings:
        console.print(f"- {finding.what} {'--fix: ' if finding.fixed else ''}{finding.remedy}", soft_wrap=True)
    if all(finding.limit for finding in found.findings):
        sure = "It is the RoPE that its run trained." if found.as_trained else "What was trained they do not say."
        console.print(f"Nothing is wrong with the RoPE in its files. {sure}", soft_wrap=True)


def _cells(read: "Reading", meant: "Reading") -> list[str]:
    """A line of the table; the last cell is how many times frequencies are apart at most."""
    wave = 2 * math.pi / read.long.min()
    apart = "other size"
    if read.long.shape == meant.long.shape:
        apart = f"{max(float((a / b).max()) for a, b in ((read.long, meant.long), (meant.long, read.long))):.3g}x"
    return [
        read.rope_type, f"{read.theta:,.6g}", f"{read.window:,}", f"{wave:,.0f}", f"{read.attention_factor:.4f}", apart
    ]  # fmt: skip
