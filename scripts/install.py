"""Install the project into a virtual environment: `python scripts/install.py .venv [EXTRA ...]`.

uv installs it in seconds. Where uv cannot be had, or does not succeed, pip installs it in minutes. uv does not read
pip's configuration, so indexes and directories that are named there are passed on.

torch is the build for this machine: for its GPU if it has one, else the much smaller one for CPUs. A torch in a
directory that pip is told to look in (`find-links`) goes first.
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# pip's settings, and the variable that says the same to uv. An index may hold a password, so none goes into a command.
VARIABLES = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "find-links": "UV_FIND_LINKS"}
CONSTRAINTS = ["--constraint", str(ROOT / "constraints.txt")]


def main() -> None:
    """Create the environment if it is not there, and install into it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", type=Path)
    parser.add_argument("extras", nargs="*", help="optional dependencies, as dev")
    given = parser.parse_args()
    python = given.environment.resolve() / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(given.environment, with_pip=True)
    project = f"{ROOT}[{','.join(given.extras)}]" if given.extras else str(ROOT)
    wanted = [*CONSTRAINTS, "--editable", project]
    uv = find_uv(python)
    if uv is not None and install_with_uv([*uv, "pip", "install", "--python", str(python), *wanted], python):
        return
    print("uv did not install the packages. pip does, which takes minutes.", flush=True)
    done = subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=False)
    sys.exit(done.returncode)


def install_with_uv(command: list[str], python: Path) -> bool:
    """Run uv's command, first for the build of torch that suits this machine; return whether it succeeded."""
    settings = pip_settings(python)
    environment = {**uv_variables(settings), **os.environ}
    chosen = "UV_TORCH_BACKEND" in os.environ or has_torch(settings.get("find-links", []))
    for more in ([],) if chosen else (["--torch-backend", "auto"], []):
        if subprocess.run([*command, *more], env=environment, check=False).returncode == 0:
            return True
    return False


def pip_settings(python: Path) -> dict[str, list[str]]:
    """What pip's configuration says about where packages are, from files and from the environment."""
    listed = subprocess.run([str(python), "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    found: dict[str, list[str]] = {}
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name in VARIABLES:
            for one in str(ast.literal_eval(value)).split():
                if one not in found.setdefault(name, []):
                    found[name].append(one)
    return found


def uv_variables(settings: dict[str, list[str]]) -> dict[str, str]:
    """The same settings for uv, which then also compares all indexes, as pip does."""
    separator = {"find-links": ","}
    variables = {VARIABLES[name]: separator.get(name, " ").join(values) for name, values in settings.items()}
    return {**variables, "UV_INDEX_STRATEGY": "unsafe-best-match"} if variables else {}


def has_torch(places: list[str]) -> bool:
    """Whether a local directory holds a wheel of torch."""
    return any(any(Path(place.removeprefix("file://")).glob("torch-*.whl")) for place in places)


def find_uv(python: Path) -> list[str] | None:
    """The command that runs uv: the one on this machine, or one put into the environment; None if there is none."""
    there = shutil.which("uv")
    if there is not None:
        return [there]
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"], check=False
    )
    return [str(python), "-m", "uv"] if done.returncode == 0 else None


if __name__ == "__main__":
    main()
