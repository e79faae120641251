"""What CONTRIBUTING.md adds works as it stands there: each diff is applied to a copy of the package, and run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SAMPLER = re.findall(r"```python\n(.*?)```", (ROOT / "docs/add-a-sampler.md").read_text(encoding="utf-8"), re.DOTALL)[0]
USE = {
    "halves": """
from skipwise.config.files import parse_config
from skipwise.lengths import Lengths
from skipwise.positions.coverage import coverage
config = parse_config({"model": {"path": "m"}, "lengths": {"target": 512}, "data": "d", "positions": "halves"})
assert config.method == "halves" and coverage(config.positions, Lengths(64, 64, 256), 50).seen.max() == 1.0
""",
    "halved": """
from skipwise.config.files import parse_config
config = parse_config({"model": {"path": "m"}, "lengths": {"target": 512}, "data": "d", "rope": "halved"})
assert config.rope.hf_parameters(16, 1e4, None)["factor"] == 2.0
""",
    "echo": """
import torch
from skipwise.cli.main import app, run
from skipwise.evaluation.specs import EVALUATIONS, main_metric
assert main_metric("echo").share and any(kind.__name__ == "Echo" for kind in EVALUATIONS)
flags = ["--only", "echo", "--lengths", "32,64", "--output", OUTPUT, "--data", TEXT]
assert run(lambda: app(["evaluate", "builtin:tiny", *flags])) == 0
assert sum('"evaluation": "echo"' in line for line in open(OUTPUT + "/results.jsonl")) == 2
""",
    "seed_oss": """
from skipwise.models.families import FAMILIES, family_of
assert family_of("seed_oss").models == "Seed-OSS" and FAMILIES[0].model_type == "seed_oss"
""",
}


def changes(block: str) -> list[tuple[str, str, str]]:
    """(file, lines that go, lines that come) of each part of a diff."""
    parts = re.split(r"^--- a/.*\n\+\+\+ b/", block, flags=re.MULTILINE)[1:]
    found = []
    for part in parts:
        file, *lines = part.rstrip("\n").split("\n")
        gone, new = ("".join(line[1:] + "\n" for line in lines if line.startswith(sign)) for sign in "-+")
        found.append((file, gone.rstrip("\n"), new.rstrip("\n")))
    return found


DIFFS = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
CODE = {
    "halves": ("skipwise/positions/halves.py", SAMPLER),
    **{
        Path(name).stem: (name, code)
        for name, code in re.findall(r"```python\n# (skipwise/\S+)\n(.*?)```", PAGE, re.DOTALL)
    },
}


def test_every_diff_is_run() -> None:
    assert len(DIFFS) == len(USE) == 4


@pytest.mark.parametrize(("name", "diff"), list(zip(USE, DIFFS, strict=True)), ids=list(USE))
def test_an_addition_works_as_the_page_shows_it(name: str, diff: str, tmp_path: Path, text_file: Path) -> None:
    """One file and one line: nothing else of the package is changed."""
    copied = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "skipwise", tmp_path / "skipwise", ignore=copied)
    if name in CODE:
        path, code = CODE[name]
        (tmp_path / path).write_text(code)
    for file, gone, new in changes(diff):
        content = (tmp_path / file).read_text(encoding="utf-8")
        assert content.count(gone) == 1, (file, gone)
        (tmp_path / file).write_text(content.replace(gone, new))
    given = f"OUTPUT, TEXT = {str(tmp_path / 'out')!r}, {str(text_file)!r}\n"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", given + USE[name]],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
