"""What is built is whole: the wheel works on its own, the sdist can be tested, and there is one version."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import skipwise

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with both."""
    directory = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(directory), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return directory


def test_the_wheel_works_on_its_own(built: Path, tmp_path: Path) -> None:
    """Unpacked beside nothing of the project, it has its model, demo and templates, and runs."""
    (wheel,) = built.glob("*.whl")
    assert wheel.name.startswith(f"skipwise-{skipwise.__version__}-")
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        content.extractall(tmp_path / "site")
    assert {"skipwise/py.typed", "skipwise/workflows/demo.yaml"} <= set(names)
    assert not [one for one in names if one.startswith(("tests", "docs"))]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    script = (
        "import sys, skipwise.cli.main as cli; print(cli.__file__)\n"
        "sys.exit(cli.run(lambda: cli.app(['list'])) or cli.run(cli.app))"
    )
    tiny = ["extend", "builtin:tiny", "--target", "512", "--data", "builtin:python", "--steps", "0", "--output", "one"]
    done = subprocess.run(
        [sys.executable, "-c", script, *tiny, "--set", "evaluate=[]"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert (tmp_path / "one" / "report.html").is_file() and (tmp_path / "one/model/model.safetensors").is_file()


def test_the_sdist_holds_what_tests_and_docs_name(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    needed = [
        "Makefile",
        "CITATION.cff",
        "constraints.txt",
        ".ci/run",
        "benchmarks/results.json",
        "skipwise/workflows/demo.yaml",
    ]
    assert set(needed) <= names
    assert not [one for one in names if one.startswith(("runs/", ".venv/", "dist/"))]


def test_there_is_one_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == skipwise.__version__
    assert f"## {skipwise.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_extra_is_in_the_docs() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for extra in set(extras) - {"dev", "docs"}:
        assert f"skipwise[{extra}]" in pages, extra
