"""The configuration: strict, complete in its errors, the same after a round trip."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from skipwise import NTK, PoSE, RandPos, UserError, YaRN
from skipwise.config.files import merge, parse_assignment, parse_config, parse_evaluate_config, read_yaml, to_yaml
from skipwise.config.run import RunConfig, method_overrides
from skipwise.positions import SAMPLERS
from skipwise.rope import ROPE_SCALINGS
from skipwise.study.config import parse_study
from skipwise.training.config import read_deepspeed
from skipwise.utils.sections import name_of

MINIMAL: dict[str, Any] = {"model": {"path": "m"}, "lengths": {"target": "32k"}, "data": "docs.jsonl"}


def parse(**changes: Any) -> RunConfig:
    return parse_config(merge(MINIMAL, changes))


def test_defaults() -> None:
    config = parse_config(MINIMAL)
    assert config.lengths.target == 32768
    assert config.positions == PoSE()
    assert config.rope == YaRN()
    assert config.method == "pose"
    assert [source.source for source in config.data.sources] == ["docs.jsonl"]


def test_a_resolved_configuration_parses_back_to_itself() -> None:
    config = parse(
        positions={"name": "pose", "chunks": 3, "content": "uniform"},
        rope={"name": "yarn-revised", "beta_fast": 16},
        data={"sources": [{"source": "a", "weight": 2}, "b"]},
        evaluate=[{"name": "passkey", "context_lengths": ["4k", 128]}, {"name": "perplexity", "context_lengths": [64]}],
        train={"learning_rate": "2e-5"},
    )
    assert parse_config(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize("cls", [*SAMPLERS, *ROPE_SCALINGS], ids=name_of)
def test_everything_pluggable_can_be_chosen_by_name(cls: type) -> None:
    section = "positions" if cls in SAMPLERS else "rope"
    extra = {"theta": 5e5} if name_of(cls) == "abf" else {}
    chosen = getattr(parse(**{section: {"name": name_of(cls), **extra}}), section)
    assert type(chosen) is cls
    if not extra:
        assert getattr(parse(**{section: name_of(cls)}), section) == chosen


def test_all_errors_at_once_with_path_and_nearest_match() -> None:
    wrong = {
        "modl": {"path": "m"},
        "learning_rate": 1e-4,
        "lengths": {"target": "32q", "trian": 1},
        "data": {"source": "a", "text_fild": "x"},
        "rope": {"name": "yarm"},
        "positions": {"name": "pose", "chunk": 3},
        "train": {"max_stps": 1, "learning_rate": -1.0},
        "evaluate": [{"name": "passkey"}, {"name": "paskey", "context_lengths": [4]}],
    }
    with pytest.raises(UserError) as caught:
        parse_config(wrong)
    message = str(caught.value)
    for line in (
        "modl: unknown key. Did you mean 'model'?",
        "learning_rate: unknown key. Did you mean 'train.learning_rate'?",
        "model: required",
        "lengths.target: A length is a whole number of tokens such as 32768 or 32k, not '32q'.",
        "lengths.trian: unknown key. Did you mean 'train'?",
        "data.text_fild: unknown key. Did you mean 'text_field'?",
        "rope.name: 'yarm' is not known. Did you mean 'yarn'?",
        "positions.chunk: unknown key. Did you mean 'chunks'?",
        "train.max_stps: unknown key. Did you mean 'max_steps'?",
        "train.learning_rate: Input should be greater than 0",
        "evaluate.0.context_lengths: required",
        "evaluate.1.name: 'paskey' is not known. Did you mean 'passkey'?",
    ):
        assert line in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": {"name": "pose", "chunks": 0}}, "at least one chunk, not 0"),
        ({"positions": {"name": "pose", "chunks": "two"}}, "positions.chunks"),
        ({"rope": {"name": "abf"}}, "rope.theta: required"),
        ({"train": {"max_steps": 1.5}}, "train.max_steps"),
        ({"train": {"max_steps": 2**63}}, "train.max_steps"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate"),
        ({"rope": {"name": "yarn", "beta_fast": float("inf")}}, "rope.beta_fast"),
        ({"train": {"load_best_model_at_end": True}}, "needs eval_steps"),
        ({"data": {"sources": []}}, "at least one source"),
        ({"data": {"source": "a", "sources": ["b"]}}, "not both"),
        ({"evaluate": [{"name": "passkey", "context_lengths": []}]}, "different lengths"),
        ({"evaluate": [{"name": "passkey", "context_lengths": [64], "trials": 0}]}, "trials must be at least 1"),
        ({"seed": -1}, "seed"),
        ({"positions": "plain", "train": {"echo_share": 0.5}}, "echo_share is for windows with skips"),
        ({"positions": {"name": "pose", "chunks": 1}, "train": {"echo_share": 0.5}}, "echo_share is for windows"),
        ({"lengths": {"train": 0}}, "lengths.train"),
        ({"lengths": 32768}, "lengths"),
        (
            {
                "evaluate": [
                    {"name": "passkey", "context_lengths": [64]},
                    {"name": "passkey", "context_lengths": [64, 8]},
                ]
            },
            "passkey at 64 tokens twice",
        ),
        (
            {"evaluate": [{"name": "perplexity", "context_lengths": [64], "max_document_tokens": 32}]},
            "max_document_tokens must not be below",
        ),
    ],
)
def test_values_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    values = MINIMAL | changes if "data" in changes else merge(MINIMAL, changes)
    with pytest.raises(UserError, match=message):
        parse_config(values)


@pytest.mark.parametrize(
    ("text", "tokens"), [("32k", 32768), ("1m", 1048576), ("1.5k", 1536), (4096, 4096), ("8_192", 8192)]
)
def test_lengths_are_read_as_people_write_them(text: object, tokens: int) -> None:
    assert parse(lengths={"target": text}).lengths.target == tokens


def test_assignments_and_flags_override() -> None:
    values = merge(MINIMAL, parse_assignment("train.learning_rate=1e-4"))
    values = merge(values, parse_assignment("positions.chunks=4"))
    config = parse_config(values)
    assert config.train.learning_rate == 1e-4
    assert config.positions == PoSE(chunks=4)
    with pytest.raises(UserError, match="section\\.key=value"):
        parse_assignment("nonsense")


def test_another_name_replaces_a_section_instead_of_mixing_with_it() -> None:
    config = parse_config(merge({**MINIMAL, "rope": {"name": "yarn", "beta_fast": 8}}, {"rope": {"name": "ntk"}}))
    assert config.rope == NTK()


def test_other_sources_replace_those_of_a_file_and_nothing_else() -> None:
    base = {**MINIMAL, "data": {"source": "a", "text_field": "body", "retrieval_share": 0.5}}
    config = parse_config(merge(base, {"data": {"sources": ["b"]}}))
    assert [(s.source, s.text_field) for s in config.data.sources] == [("b", "body")]
    assert config.data.retrieval_share == 0.5
    config = parse_config(merge(MINIMAL, parse_assignment("data.text_field=body")))
    assert [(s.source, s.text_field) for s in config.data.sources] == [("docs.jsonl", "body")]


def test_methods() -> None:
    assert parse(**method_overrides("randpos")).positions == RandPos()
    assert parse(**method_overrides("interpolate")).method == "interpolate"
    with pytest.raises(UserError, match="Did you mean 'pose'"):
        method_overrides("posee")


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    for name in ("list.yaml", "bad.yaml", "missing.yaml"):
        with pytest.raises(UserError, match=name):
            read_yaml(tmp_path / name)


def test_ready_recipes_are_valid() -> None:
    root = Path(__file__).parents[2]
    recipes = [
        *(root / "configs").glob("*.yaml"),
        *(root / "configs/paper").glob("*.yaml"),
        *(path for path in root.glob("docs/results/*/config.yaml") if not (path.parent / "models.json").exists()),
        root / "skipwise/workflows/demo.yaml",
    ]
    assert len(recipes) >= 2
    for recipe in recipes:
        engine = parse_config(read_yaml(recipe)).train.deepspeed
        if engine:
            read_deepspeed(root / engine)
    for recipe in (root / "configs/evaluate").glob("*.yaml"):
        parse_evaluate_config(read_yaml(recipe))
    for study in (root / "configs/studies").glob("*.yaml"):
        parse_study(study)


@pytest.mark.parametrize(
    ("train", "rope", "rule"),
    [
        ({"fsdp": True, "deepspeed": "zero3.json"}, "yarn", "both shard the model"),
        ({"lora": {"rank": 4}}, "yarn", "train.lora.rank: unknown key"),
        ({"lora": {"target_modules": []}}, "yarn", "train.lora.target_modules"),
    ],
)
def test_engines_and_adapters_that_do_not_go_together(train: dict[str, Any], rope: str, rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        parse(train=train, rope=rope)


def test_seeds_are_those_that_numpy_takes() -> None:
    """Seen to end in a traceback when training began."""
    assert parse(seed=2**32 - 1).seed == 2**32 - 1
    with pytest.raises(UserError, match="seed"):
        parse(seed=2**32)
