"""What the support table says of every family, cell by cell, and why others are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig

from experiments.family_support import SCALINGS, YES, encoder_markdown, encoder_row, markdown, row_of
from skipwise import Lengths, UserError
from skipwise.export.doctor import diagnose
from skipwise.models.families import FAMILIES, REFUSED, Family, family_of
from skipwise.models.rope import read_rope, set_rope_scaling
from skipwise.rope import Mixed, YaRN
from tests.picomodels import ENCODERS, LENGTHS, picomodel
from tests.picotypes import small_model

DOCS = Path(__file__).parents[2] / "docs"
SUPPORT: dict[str, list[dict[str, Any]]] = json.loads((DOCS / "results/support.json").read_text())
COMMITTED, COMMITTED_ENCODERS = SUPPORT["families"], SUPPORT["encoders"]


def test_every_family_has_a_row_in_the_table() -> None:
    assert [row["family"] for row in COMMITTED] == [family.model_type for family in FAMILIES]
    assert [row["family"] for row in COMMITTED_ENCODERS] == list(ENCODERS)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_cell_is_what_the_table_says(family: Family) -> None:
    assert row_of(family) == next(row for row in COMMITTED if row["family"] == family.model_type)


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_cell_of_an_encoder_is_what_the_table_says(kind: str) -> None:
    assert encoder_row(kind) == next(row for row in COMMITTED_ENCODERS if row["family"] == kind)


def test_encoders_can_do_what_matters() -> None:
    for row in COMMITTED_ENCODERS:
        assert row["training"] == YES and set(row["backends"].values()) == {YES}, row["family"]
        for scaling in ("yarn", "linear", "ntk"):
            assert row["scalings"][scaling] == row["exports"][scaling]["transformers 5"] == YES


def test_the_table_has_what_matters() -> None:
    """All scalings and training for every family; every reader reads YaRN, linear and NTK, with known exceptions."""
    for row in COMMITTED:
        assert set(row["scalings"].values()) == {YES} and row["training"] == YES, row["family"]
        assert row["backends"]["eager"] == YES
        for scaling in (one.name for one in SCALINGS):
            assert row["exports"][scaling]["transformers 5"] == YES
    unknown = {("vLLM", family.model_type) for family in FAMILIES if family.vllm == "none"}
    unknown |= {("llama.cpp", family.model_type) for family in FAMILIES if family.llama_cpp != "usual"}
    strange = {
        (row["family"], scaling, reader)
        for row in COMMITTED
        for scaling in ("yarn", "linear", "ntk")
        for reader, found in row["exports"][scaling].items()
        if found != YES and (reader, row["family"]) not in unknown
    }
    assert strange == {
        ("phi3", "yarn", "llama.cpp"),
        ("phi3", "linear", "llama.cpp"),
        ("olmo3", "ntk", "transformers 4"),
        ("modernbert-decoder", "yarn", "transformers 4"),
        ("modernbert-decoder", "linear", "transformers 4"),
        ("modernbert-decoder", "ntk", "transformers 4"),
        ("nemotron", "yarn", "transformers 4"),
        ("nemotron", "linear", "transformers 4"),
        ("olmo2", "yarn", "transformers 4"),
        ("phi3", "yarn", "transformers 4"),
        ("phi3", "linear", "transformers 4"),
        ("deepseek_v3", "linear", "vLLM"),
    }


def test_the_page_shows_the_table() -> None:
    page = (DOCS / "models.md").read_text()
    assert markdown(COMMITTED) in page and encoder_markdown(COMMITTED_ENCODERS) in page


@pytest.mark.parametrize("kind", REFUSED)
def test_others_are_refused_with_the_reason(kind: str) -> None:
    with pytest.raises(UserError, match=REFUSED[kind][:40]):
        diagnose({"model_type": kind}, {})
    if kind in CONFIG_MAPPING:  # others are remote code
        with pytest.raises(UserError, match=REFUSED[kind][:40]):
            read_rope(AutoConfig.for_model(kind))


def test_a_falcon_with_alibi_is_refused() -> None:
    """It has RoPE parameters all the same. Seen to be called well."""
    config = AutoConfig.for_model("falcon", alibi=True)
    for asked in (lambda: read_rope(config), lambda: diagnose(config.to_dict(), {})):
        with pytest.raises(UserError, match="This falcon model has ALiBi"):
            asked()


def test_a_scaling_that_scales_all_of_attention_is_refused() -> None:
    """DeepSeek scales the product of queries and keys as well, by the extension it has."""
    config = picomodel(family_of("deepseek_v3")).config
    config.rope_parameters |= {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    with pytest.raises(UserError, match="mscale_all_dim"):
        read_rope(config)


def test_a_class_with_rules_of_its_own_is_left_as_it_was() -> None:
    """Phi-3.5-MoE switches its table with the length of a text, and computes with that of short texts all the same."""
    model = picomodel(Family("phimoe", "Phi-3.5-MoE"))
    before = model.config.to_dict()
    with pytest.raises(UserError, match="does not take 'mixed'") as refused:
        set_rope_scaling(model, Mixed(beta_fast=4.0), LENGTHS)
    assert refused.value.code == "scaling_not_supported"
    assert model.config.to_dict() == before


@pytest.mark.parametrize("kind", ["phi3", "phimoe", "phi4_multimodal"])
def test_a_class_that_knows_longrope_alone_is_given_that(kind: str) -> None:
    """Phi-3.5-MoE besides reads its attention factor from keys that YaRN does not have. Classes are asked."""
    model = small_model(kind)
    lengths = Lengths(original=64, train=64, target=512)
    set_rope_scaling(model, YaRN(), lengths)
    parameters = model.config.rope_parameters
    assert parameters["rope_type"] == "longrope" and parameters["long_mscale"] == parameters["attention_factor"]
    model.config.validate()  # as when it is written
    ids = torch.randint(2, 258, (1, 8), generator=torch.Generator().manual_seed(0))
    assert model(input_ids=ids, position_ids=torch.arange(8)[None] + 500, use_cache=False).logits.isfinite().all()
