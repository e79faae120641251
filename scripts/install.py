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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# pip's settings, and the variable that says the same to uv. An index may hold a password, so none goes into a command.
VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "cert": "SSL_CERT_FILE",
}
CONSTRAINTS = ["--constraint", str(ROOT / "constraints.txt")]
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"


def main() -> None:
    """Create the environment if it is not there, and install into it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", type=Path)
    parser.add_argument("extras", nargs="*", help="optional dependencies, as dev")
    given = parser.parse_args()
    python = make_environment(given.environment.resolve())
    project = f"{ROOT}[{','.join(given.extras)}]" if given.extras else str(ROOT)
    wanted = [*CONSTRAINTS, "--editable", project]
    settings = pip_settings(python)
    # The user's own choice: a variable, or a wheel that lies ready.
    torch_chosen = "UV_TORCH_BACKEND" in os.environ or has_torch(settings.get("find-links", ""))
    uv = find_uv(python)
    if uv is not None:
        environment = {**uv_variables(settings), **os.environ}
        command = [*uv, "pip", "install", "--python", str(python), *wanted]
        for more in ([],) if torch_chosen else (["--torch-backend", "auto"], []):
            if subprocess.run([*command, *more], env=environment, check=False).returncode == 0:
                return
    print("uv did not install the packages. pip does, which takes minutes.", flush=True)
    environment = dict(os.environ)
    if not torch_chosen and sys.platform == "linux" and shutil.which("nvidia-smi") is None:
        environment["PIP_EXTRA_INDEX_URL"] = f"{settings.get('extra-index-url', '')} {CPU_BUILDS}".strip()
    command = [str(python), "-m", "pip", "install", "--quiet", *wanted]
    sys.exit(subprocess.run(command, env=environment, check=False).returncode)


def make_environment(path: Path) -> Path:
    """The environment's Python. One without pip was left by an attempt that failed, and is made again."""
    python = path / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists() or subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode:
        done = subprocess.run([sys.executable, "-m", "venv", str(path)], check=False)
        if done.returncode:
            sys.exit(f"{sys.executable} cannot make a virtual environment with pip (on Debian: install python3-venv).")
    return python


def pip_settings(python: Path) -> dict[str, str]:
    """What pip's configuration says about where packages are; a later place has the last word, as for pip."""
    listed = subprocess.run([str(python), "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in found and name in VARIABLES:
            try:
                found[section][name] = str(ast.literal_eval(value))
            except (SyntaxError, ValueError):
                continue  # not as pip writes it
    return {**found["global"], **found["install"], **found[":env:"]}


def uv_variables(settings: dict[str, str]) -> dict[str, str]:
    """The same settings for uv, which then also compares all indexes, as pip does."""
    variables = {VARIABLES[name]: value for name, value in settings.items()}
    for name, separator in (("UV_INDEX", " "), ("UV_FIND_LINKS", ",")):
        if name in variables:
            variables[name] = separator.join(variables[name].split())
    return {**variables, "UV_INDEX_STRATEGY": "unsafe-best-match"} if variables else {}


def has_torch(places: str) -> bool:
    """Whether a local directory holds a wheel of torch for this Python."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    directories = (Path(place.removeprefix("file://")).expanduser() for place in places.split())
    return any(any(directory.glob(f"torch-*-{tag}-*.whl")) for directory in directories)


def find_uv(python: Path) -> list[str] | None:
    """The command that runs uv: the one on this machine, or one put into the environment; None if there is none."""
    there = shutil.which("uv")
    if there is not None:
        return [there]
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *CONSTRAINTS, "uv"]
    return [str(python), "-m", "uv"] if subprocess.run(command, check=False).returncode == 0 else None


if __name__ == "__main__":
    main()
