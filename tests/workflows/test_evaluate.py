"""`skipwise evaluate`, end to end."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import MistralConfig, MistralForCausalLM

from skipwise import UserError
from skipwise.config.files import parse_evaluate_config
from skipwise.config.run import EvaluateConfig
from skipwise.data.config import PRESETS, SourceConfig
from skipwise.evaluation.training_free import TrainingFree
from skipwise.workflows.evaluate import compare
from skipwise.workflows.evaluation_arguments import (
    NAMES,
    ModelArgument,
    default_output,
    find_models,
    select_evaluations,
    values_of_run,
)
from tests.commands import error_code, rows_of, skipwise
from tests.picomodels import byte_tokenizer, pico_llama

PASSKEY = {"name": "passkey", "context_lengths": [400], "trials": 3}
PERPLEXITY = {"name": "perplexity", "context_lengths": [32, 128], "stride": 16, "documents": 3}


@pytest.fixture
def two_models(tmp_path: Path) -> Iterator[list[Path]]:
    paths = [tmp_path / "first", tmp_path / "second"]
    for path, scale in zip(paths, (0.2, 0.3), strict=True):
        pico_llama(initializer_range=scale).save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
    yield paths


@pytest.fixture
def settings(tmp_path: Path, text_file: Path) -> Path:
    path = tmp_path / "evaluate.yaml"
    path.write_text(yaml.safe_dump({"data": str(text_file), "dtype": "float32", "evaluate": [PERPLEXITY, PASSKEY]}))
    return path


def test_models_side_by_side(two_models: list[Path], settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    output = skipwise("evaluate", *two_models, "--config", settings, "--output", out)
    assert "text.jsonl" in output.replace("\n", "")
    assert "in 12 documents" in output  # none is kept from the evaluation
    assert "Difference from first" in output
    assert "* longer than the window" in output
    rows = rows_of(out)
    assert {(row.model, row.evaluation, row.context_length) for row in rows} == {
        (str(model), *result)
        for model in two_models
        for result in (("perplexity", 32), ("perplexity", 128), ("passkey", 400))
    }
    assert {row.stage for row in rows} == {"original"}
    examples = [json.loads(line) for line in (out / "examples/first/passkey.jsonl").read_text().splitlines()]
    assert len(examples) == 3
    assert {"prompt", "depth", "prediction", "expected", "score"} <= set(examples[0])
    assert "| perplexity | 32 |" in (out / "table.md").read_text()
    assert parse_evaluate_config(yaml.safe_load((out / "resolved.yaml").read_text()))


def test_a_model_with_an_aid_beside_itself(two_models: list[Path], settings: Path, tmp_path: Path) -> None:
    """The same inside its window, another beyond."""
    models = [str(two_models[0]), f"{two_models[0]}+sinks:32"]
    skipwise("evaluate", *models, "--config", settings, "--output", tmp_path / "out", "--only", "perplexity")
    values = {
        (row.model, row.context_length): row.value for row in rows_of(tmp_path / "out") if row.metric == "perplexity"
    }
    assert values[models[0], 32] == pytest.approx(values[models[1], 32], rel=1e-5)
    assert values[models[0], 128] != pytest.approx(values[models[1], 128], rel=1e-3)
    assert (tmp_path / "out/examples/first-sinks-32/perplexity.jsonl").is_file()


def test_another_aid_is_another_model(two_models: list[Path], settings: Path, tmp_path: Path) -> None:
    """Under one name, as the cells of a study have one: results of one method are not taken for another's."""
    config = parse_evaluate_config({**yaml.safe_load(settings.read_text()), "evaluate": [PERPLEXITY]})

    def measured(training_free: TrainingFree | None) -> list[Any]:
        model = ModelArgument("cell", str(two_models[0]), "original", "cell", training_free=training_free)
        return compare([model], config, tmp_path / "out", given="", console=Console(quiet=True))

    assert measured(TrainingFree("sinks", 32))
    assert measured(TrainingFree("sinks", 32))
    for other in (TrainingFree("sinks", 16), None):
        with pytest.raises(UserError):
            measured(other)


def test_an_aid_that_a_model_cannot_have_is_refused_before_anything_is_measured(
    two_models: list[Path], settings: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=48, max_position_embeddings=64, sliding_window=16,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path / "windowed")
    byte_tokenizer().save_pretrained(tmp_path / "windowed")
    models = [two_models[0], f"{tmp_path / 'windowed'}+sinks"]
    output = skipwise("evaluate", *models, "--config", settings, "--output", tmp_path / "out", code=2)
    assert error_code(output) == "method_needs_plain_attention"
    assert not (tmp_path / "out").exists()


def test_a_run_with_an_aid_is_measured_as_the_run_was(config_file: Path, tmp_path: Path) -> None:
    skipwise("extend", config_file, "--output", tmp_path / "run")
    plain, aided = find_models([str(tmp_path / "run"), f"{tmp_path / 'run'}+sinks:16"])
    assert values_of_run([aided]) == values_of_run([plain]) != {}
    assert default_output([aided]) == default_output([plain]) == tmp_path / "run" / "evaluation"


def test_a_second_run_adds_what_is_missing(two_models: list[Path], settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    skipwise("evaluate", two_models[0], "--config", settings, "--output", out, "--only", "passkey")
    before = rows_of(out)
    kept = (out / "examples/first/passkey.jsonl").read_bytes()
    skipwise("evaluate", *two_models, "--config", settings, "--output", out)
    after = rows_of(out)
    assert after[: len(before)] == before
    assert (out / "examples/first/passkey.jsonl").read_bytes() == kept
    assert len(after) == 2 * (len(before) + 4)  # two perplexities and two bits per byte

    # A shorter length comes to the same documents, however often it is asked for.
    for _ in range(2):
        skipwise("evaluate", two_models[0], "--config", settings, "--output", out, "--only", "perplexity", "--lengths",
                 "16,32,128")  # fmt: skip
    skipwise(
        "evaluate", two_models[0], "--config", settings, "--output", out, "--only", "perplexity", "--lengths", "64"
    )
    assert len({row.data for row in rows_of(out) if row.evaluation == "perplexity"}) == 1
    extra = [row for row in rows_of(out) if row.context_length == 16]
    assert len(extra) == 2
    assert "| passkey | 400 |" in (out / "table.md").read_text()  # what this call did not ask for

    whole = tmp_path / "whole"
    skipwise("evaluate", *two_models, "--config", settings, "--output", whole)
    assert sorted(map(str, rows_of(whole))) == sorted(map(str, after))
    assert "Difference from first" in (whole / "table.md").read_text()


def test_what_was_measured_in_another_way_is_not_mixed(
    two_models: list[Path], settings: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["evaluate", two_models[0], "--config", settings, "--output", out]
    skipwise(*arguments)
    before = (out / "results.jsonl").read_bytes(), (out / "resolved.yaml").read_bytes()
    trials = skipwise(*arguments, "--set", "passkey.trials=4", code=2)
    assert error_code(trials) == "configuration_changed" and "trials 3" in trials
    seed = skipwise(*arguments, "--seed", "1", code=2)
    assert error_code(seed) == "configuration_changed" and "seed" in seed
    longest = max(len(json.loads(line)["text"]) for line in text_file.read_text().splitlines())
    longer = skipwise(*arguments, "--only", "perplexity", "--lengths", f"32,{longest}", code=2)
    assert error_code(longer) == "shared_documents_too_short"
    shutil.copytree(two_models[1], two_models[0], dirs_exist_ok=True)
    assert error_code(skipwise(*arguments, code=2)) == "content_changed"
    shutil.copytree(two_models[0], tmp_path / "elsewhere/first")
    other = skipwise("evaluate", tmp_path / "elsewhere/first", "--config", settings, "--output", out, code=2)
    assert error_code(other) == "duplicate_model_name"
    assert before == ((out / "results.jsonl").read_bytes(), (out / "resolved.yaml").read_bytes())
    assert error_code(skipwise("evaluate", two_models[1], "--output", tmp_path, code=2)) == "output_kind_mismatch"


def test_a_run_is_its_model_with_its_settings(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    skipwise("extend", config_file, "--output", run, "--set", "stages=[extended]")
    output = skipwise("evaluate", run, "--only", "truncated_perplexity")
    assert "held out" in output
    rows = rows_of(run / "evaluation")
    own = {
        row.context_length: row.value
        for row in rows_of(run)
        if (row.evaluation, row.metric) == ("truncated_perplexity", "perplexity")
    }
    values = {row.context_length: row.value for row in rows if row.metric == "perplexity"}
    assert set(values) == {64, 256}
    assert values == pytest.approx(own, rel=1e-6)  # the same held-out documents
    assert {row.stage for row in rows} == {"extended"}
    assert error_code(skipwise("evaluate", run, "--output", run, code=2)) == "output_kind_mismatch"
    shutil.rmtree(run / "model")
    assert error_code(skipwise("evaluate", run, code=2)) == "run_not_finished"


def test_the_embedded_model(tmp_path: Path) -> None:
    """Every evaluation that needs no file of one's own."""
    specs = [
        {"name": "perplexity", "context_lengths": [256], "stride": 128, "documents": 1, "max_document_tokens": 512},
        {"name": "truncated_perplexity", "context_lengths": [128, 256, 512], "documents": 2},
        {"name": "passkey", "context_lengths": [256], "trials": 10},
        {"name": "ruler", "context_lengths": [384], "samples": 1, "tasks": ["niah_single_1", "niah_single_2"]},
        {
            "name": "longppl", "context_lengths": [256], "evaluator": "builtin:tiny", "short_context": 64,
            "stride": 32, "documents": 2,
        },
    ]  # fmt: skip
    config = tmp_path / "all.yaml"
    config.write_text(yaml.safe_dump({"evaluate": specs}))
    output = skipwise("evaluate", "builtin:tiny", "--config", config, "--output", tmp_path / "out")
    assert "failed" not in output
    rows = {(row.evaluation, row.context_length): row for row in rows_of(tmp_path / "out") if row.depth is None}
    assert rows["passkey", 256].value is not None
    assert rows["passkey", 256].value >= 0.9
    assert rows["truncated_perplexity", 512].status == "beyond_window"
    assert {name for name, _ in rows} == {
        "perplexity", "truncated_perplexity", "passkey", "longppl", "ruler", "ruler/niah_single_1",
        "ruler/niah_single_2",
    }  # fmt: skip


# What is proposed for what was misspelt.
NEAREST = {"paskey": "'passkey'", "sed=1": "'seed'", "passkey.trails=1": "'trials'", "preset:pg18": "'pg19'"}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--only", "paskey"], "unknown_evaluation"),
        (["--lengths", "4k"], "evaluations_not_named"),
        (["--only", "longppl", "--lengths", "8k"], "missing_key"),
        (["--only", "passkey", "--lengths", "many"], "malformed_length"),
        (["--only", "passkey"], "missing_key"),
        (["--set", "sed=1"], "unknown_key"),
        (["--only", "passkey", "--lengths", "400", "--set", "passkey.trails=1"], "unknown_key"),
        (["--data", "preset:pg18"], "unknown_preset"),
        (["--output", __file__], "output_is_file"),
        (["--data", "nothing.jsonl"], "data_not_found"),
        (["--only", "passkey", "--lengths", "400", "--set", "perplexity.stride=9"], "setting_without_effect"),
        (["--only", "passkey", "--lengths", "400", "--chat"], "no_chat_template"),
        (
            ["--only", "question_answering", "--lengths", "400", "--set", "question_answering.source=no.jsonl"],
            "data_not_found",
        ),
        (
            ["--only", "longppl", "--lengths", "8k", "--set", "longppl.evaluator=builtin:tinny"],
            "unknown_builtin_model",
        ),
    ],
)
def test_wrong_input_writes_nothing(arguments: list[str], code: str, pico_directory: Path, tmp_path: Path) -> None:
    output = skipwise("evaluate", pico_directory, "--output", tmp_path / "out", *arguments, code=2)
    assert error_code(output) == code
    assert NEAREST.get(arguments[-1], "") in output
    assert not (tmp_path / "out").exists()


def test_a_model_without_tokenizer_writes_nothing(pico_directory: Path, tmp_path: Path) -> None:
    for file in pico_directory.glob("tokenizer*"):
        file.unlink()
    skipwise("evaluate", pico_directory, "--output", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


def test_changed_texts_are_not_mixed(two_models: list[Path], settings: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    skipwise("evaluate", two_models[0], "--config", settings, "--output", out, "--only", "perplexity")
    text_file.write_text("".join(json.dumps({"text": f"other {i} " * 200}) + "\n" for i in range(12)))
    output = skipwise("evaluate", two_models[1], "--config", settings, "--output", out, code=2)
    assert error_code(output) == "content_changed"


def test_a_mistake_can_be_mended(pico_directory: Path, tmp_path: Path) -> None:
    """What has no result yet may be asked for in another way."""
    records = tmp_path / "qa.jsonl"
    records.write_text(json.dumps({"context": "a", "question": "b", "answers": ["c"]}) + "\n")
    arguments = ["evaluate", pico_directory, "--output", tmp_path / "out", "--only", "question_answering",
                 "--lengths", "400", "--set", f"question_answering.source={records}"]  # fmt: skip
    assert error_code(skipwise(*arguments, code=2)) == "nothing_measured"  # nothing else was asked for
    records.write_text(json.dumps({"context": "a", "question": "b", "answers": ["d"]}) + "\n")
    assert "failed" not in skipwise(*arguments, "--set", "question_answering.question_field=question")


def test_models_are_told_apart(tmp_path: Path, two_models: list[Path]) -> None:
    twin = tmp_path / "elsewhere/first"
    shutil.copytree(two_models[0], twin)
    with pytest.raises(UserError, match="two are called 'first'"):
        find_models([str(two_models[0]), str(twin)])
    assert [one.short for one in find_models([*map(str, two_models), "org/name"])] == ["first", "second", "name"]


def test_flags_narrow_and_change_evaluations() -> None:
    values: list[dict[str, Any]] = [PERPLEXITY, PASSKEY]
    chosen = select_evaluations(values, ["passkey", "ruler"], ["4k"], [("passkey", "trials", 9)])
    assert chosen == [
        {"name": "passkey", "context_lengths": [4096], "trials": 9},
        {"name": "ruler", "context_lengths": [4096]},
    ]
    assert select_evaluations(values, [], [], []) == values
    assert select_evaluations(None, [], [], []) is None
    assert select_evaluations(None, ["harness"], ["4k"], []) == [{"name": "harness"}]
    assert select_evaluations(["harness"], [], ["4k"], []) == [{"name": "harness"}]
    for wrong in ({"name": "passkey"}, [{"trials": 3}], "passkey"):  # for the configuration to refuse
        assert select_evaluations(wrong, [], ["4k"], []) == wrong
    two = [PASSKEY, {**PASSKEY, "context_lengths": [900], "trials": 9}]
    assert select_evaluations(two, [], ["4k", "900"], []) == [
        {**PASSKEY, "context_lengths": [4096]}, {**PASSKEY, "context_lengths": [900], "trials": 9}
    ]  # fmt: skip
    assert "longppl" in NAMES


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sources(name: str) -> None:
    config = parse_evaluate_config({"data": {"sources": [{"source": f"preset:{name}", "max_documents": 5}]}})
    (source,) = config.data.sources
    assert source.source == "dwzhu/PoSE-Datasets"
    assert source.data_files is not None
    assert source.max_documents == 5
    assert config.data == parse_evaluate_config(json.loads(config.model_dump_json())).data
    assert config.data.held_out_share == 1.0


def test_without_settings_the_embedded_corpus_is_used() -> None:
    """Only the part that the embedded model was not trained on."""
    config = EvaluateConfig()
    assert config.data.sources == (SourceConfig(source="builtin:python"),)
    assert config.data.held_out_share == 0.05
