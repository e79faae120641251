"""The short form of `python -m experiments.reliability`: a few kills, a few dozen broken inputs."""

import random
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.reliability import KILLED, SMALL, broken_config, broken_data, kills, run_broken, verdict, whole_data


def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    """And the same rows of results, and every step logged once."""
    perplexity, passkey = KILLED["evaluate"]
    short = [{**perplexity, "documents": 2, "context_lengths": [256]}, {**passkey, "trials": 3}]
    config = {**KILLED, "evaluate": short, "train": {**KILLED["train"], "max_steps": 12}}
    found = kills(5, tmp_path, seed=1, config=config)
    assert found["same_final_hash"] and found["same_results"] and found["logged_steps_once"]
    assert found["kills"] >= 3


def test_the_run_to_be_broken_runs(tmp_path: Path) -> None:
    code, printed = run_broken(yaml.safe_dump(SMALL).encode(), whole_data(), tmp_path / "one")
    assert code == 0, printed
    assert (tmp_path / "one" / "run" / "model" / "config.json").exists()


@pytest.mark.parametrize("kind", ["config", "data"])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_broken_input_gets_one_message(tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int) -> None:
    rng = random.Random(seed)
    place = tmp_path_factory.mktemp("broken") / "one"
    data = whole_data() if kind == "config" else broken_data(rng)
    values = {**SMALL, "data": {**SMALL["data"], "source": data[0]}}
    config = broken_config(rng) if kind == "config" else yaml.safe_dump(values).encode()
    code, printed = run_broken(config, data, place)
    assert verdict(code, printed, place / "run") is None, printed
