"""Imports point down, from folder to folder and from file to file, and what must be fast to import imports no torch."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "skipwise"
TESTS = Path(__file__).parent
# A folder may import from itself and from folders with a smaller number.
FLOORS = {
    "errors": 0,
    "lengths": 1,
    "utils": 2,
    "positions": 3,
    "rope": 3,
    "data": 4,
    "models": 4,
    "evaluation": 5,
    "training": 5,
    "config": 6,
    "planning": 7,
    "runs": 7,
    "export": 8,
    "report": 9,
    "workflows": 10,
    "study": 11,
    "cli": 12,
    "axolotl": 12,
    "__init__": 12,
    "__main__": 13,
}
# Not an import of a module: names of the package itself.
OWN_NAMES = {"__version__"}
Imports = Mapping[str, set[str]]


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("skipwise.") for name in names if name.startswith("skipwise.")} - OWN_NAMES


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def folder_of(module: str) -> str:
    return module.split(".")[0]


FILES = {module_of(path): imports_of(path) for path in sorted(PACKAGE.rglob("*.py"))}
# Between files: the longest prefix of what is imported that is a module or a package.
ARROWS = {
    module: {
        target
        for name in names
        for target in (name, name.rpartition(".")[0], f"{name.rpartition('.')[0]}.__init__")
        if target in FILES and target != module
    }
    for module, names in FILES.items()
}


def upward(imports: Imports) -> list[str]:
    """Imports of folders that are not below the importing one; raises `KeyError` for a folder without a number."""
    return [
        f"{module} imports {name}"
        for module, names in imports.items()
        for name in sorted(names)
        if folder_of(name) != folder_of(module) and FLOORS[folder_of(name)] >= FLOORS[folder_of(module)]
    ]


def circle(arrows: Mapping[str, Iterable[str]]) -> list[str]:
    """One way that leads from a module back to it; empty without one."""
    finished: set[str] = set()

    def search(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in finished:
            return []
        for following in arrows.get(module, ()):
            if found := search(following, [*way, module]):
                return found
        finished.add(module)
        return []

    return next((found for module in arrows if (found := search(module, []))), [])


def test_imports_point_down() -> None:
    assert upward(FILES) == []


def test_an_import_that_points_up_is_seen() -> None:
    assert upward({"data.store": {"evaluation.specs"}, "study.run": {"data.store"}})
    # A circle of two folders needs one import that does not point down.
    assert upward({"data.store": {"models.load"}, "models.rope": {"data.chat"}})


def test_files_import_each_other_in_one_direction() -> None:
    assert circle(ARROWS) == []


def test_a_circle_of_files_is_seen() -> None:
    assert circle({"a": ["b"], "b": ["c"], "c": ["a"]}) == ["a", "b", "c", "a"]


def test_the_root_holds_no_rooms_of_its_own() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", "axolotl", "errors", "lengths"}


def test_no_test_imports_another() -> None:
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tests"):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                tests = [name for name in names if name.rpartition(".")[2].startswith("test_")]
                assert tests == [], path


# Plans, reports and every refusal are quick, so nothing that they need imports torch.
LIGHT = """
positions rope planning.plan planning.costs runs.directory runs.record report.tables report.charts report.page
report.study config.run config.files config.resolve data.config models.config models.shape
training.config evaluation.specs evaluation.results evaluation.statistics workflows.extend workflows.evaluate
workflows.evaluation_arguments study.run study.summary cli.main
"""


def test_what_must_be_fast_imports_no_torch() -> None:
    imports = "; ".join(f"import skipwise.{module}" for module in LIGHT.split())
    code = f"import sys; {imports}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("room", ["positions", "rope"])
def test_the_core_is_pure_numpy(room: str) -> None:
    allowed = {"numpy", "skipwise", "typing", "dataclasses", "collections", "math", "functools", "statistics"}
    for path in (PACKAGE / room).glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        found |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert found <= allowed
