"""Imports point down only, and the light rooms stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "skipwise"
# From the bottom up; a module may import from its own layer and those before it.
LAYERS = [
    ["errors", "sections", "lengths", "digests", "ranks"],
    ["positions", "rope"],
    ["evaluation.specs"],
    ["config", "config_files", "runs", "coverage", "models", "data", "environment"],
    ["costs"],
    ["training", "evaluation", "export", "planning"],
    ["duration"],
    ["workbench"],
    ["extension"],
    ["report"],
    ["demo", "study", "search", "comparison", "explore", "axolotl"],
    ["terminal"],
    ["config_commands", "model_commands", "planning_commands", "report_commands"],
    ["cli", "__main__", "__init__"],
]


def layer_of(module: str) -> int:
    """Of `a.b.c` below the package: the layer of the longest listed prefix."""
    prefixes = [module.split(".")[:n] for n in (2, 1)]
    for prefix in prefixes:
        for number, names in enumerate(LAYERS):
            if ".".join(prefix) in names:
                return number
    pytest.fail(f"skipwise.{module} is in no layer: add it to LAYERS")


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    named = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    plain = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    modules = {f"{node.module}.{alias.name}" for node in named for alias in node.names} | set(plain)
    return {name.removeprefix("skipwise.") for name in modules if name.startswith("skipwise.")}


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    own = layer_of(module)
    for imported in imports_of(path):
        if imported in ("__version__", "demo_file"):
            continue
        # The extension prints its plan and its table.
        allowed = own >= layer_of(imported) or (module == "extension" and imported.startswith("report."))
        assert allowed, f"{module} imports {imported}, which is above it"


@pytest.mark.parametrize(
    "room",
    [
        "positions",
        "rope",
        "planning",
        "costs",
        "models.shape",
        "report.table",
        "runs",
        "config_files",
        "cli",
        "extension",
        "comparison.request",
        "study.run",
        "report.study",
    ],
)
def test_light_rooms_import_no_torch(room: str) -> None:
    code = f"import sys, skipwise.{room}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("room", ["positions", "rope"])
def test_the_core_is_pure_numpy(room: str) -> None:
    allowed = {"numpy", "skipwise", "typing", "dataclasses", "collections", "math", "functools", "statistics"}
    for path in (PACKAGE / room).glob("*.py"):
        tree = ast.parse(path.read_text())
        found = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        found |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert found <= allowed
