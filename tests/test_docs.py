"""What the pages say can be done is done: lines of skipwise run, shortened; links lead somewhere; the site builds."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from safetensors.torch import save_file
from transformers import GPTJConfig, GPTJForCausalLM, LlamaConfig

from skipwise.cli.main import app, run
from skipwise.models.locate import model_location
from tests.picomodels import BAICHUAN_SIZES as BAICHUAN
from tests.picomodels import baichuan_weights

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "docs/results/paper.md",
]
# What stands on the pages for something of the reader's, and what takes longer than a test may.
STANDS_FOR = {
    "HuggingFaceTB/SmolLM2-135M": "builtin:tiny",
    "meta-llama/Llama-2-7b-hf": "llama-2-7b",
    "some/model": "model",
    "MODEL [--target 32k] [--fix DIRECTORY] [--original 4k] [--json]": "model --target 32k --original 256 --json",
    "evaluate MODEL RUN": "evaluate model runs/mine",
    "evaluate MODEL": "evaluate model",
    "A B C": "model runs/mine builtin:tiny",
    "gptj DIRECTORY NEW": "gptj gptj converted-gptj",
    "baichuan DIRECTORY NEW": "baichuan baichuan converted-baichuan",
    "--lengths 8k,32k": "--lengths 128,256",
    "--lengths 4k,16k": "--lengths 128,256",
    "--lengths 256,1k": "--lengths 128,256",
    "--target 32k --data": "--target 512 --data",
    "--target 32k --train-length 2k": "--target 512 --train-length 128",
    "--target 2k": "--target 512",
    "--steps 60": "--steps 2",
    "--plot docs/images/coverage.svg": "--plot coverage.svg",
}
# What a command is given besides, so that it is quick: measuring little, planning and not training.
SHORTER = {
    "extend": "--dry-run",
    "study": "--dry-run",
    "evaluate": "--only passkey --lengths 128 --set passkey.trials=2",
    "search": "--documents 1 --generations 1 --population 2 --target 512",
}


# Does not end by itself: tests/report/test_explore.py.
SERVED = "skipwise explore"


def commands(page: Path) -> list[str]:
    """The command lines of Skipwise on a page, without prompts and comments."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^(?:    )?(skipwise .*)$", text, re.MULTILINE)
    found = [re.sub(r"\s+#.*|\s+> \S+$", "", line).strip() for line in lines]
    return [one for one in found if not one.startswith(SERVED)]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the pages speak of: models, documents, files of configuration, two runs."""
    desk = tmp_path_factory.mktemp("desk")
    shutil.copytree(model_location("builtin:tiny"), desk / "model")
    LlamaConfig().save_pretrained(desk / "llama-2-7b")
    gptj = GPTJForCausalLM(GPTJConfig(vocab_size=2048, n_positions=64, n_embd=32, n_layer=1, n_head=2, rotary_dim=8))
    gptj.save_pretrained(desk / "gptj")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(desk / "model" / file, desk / "gptj")
    (desk / "baichuan").mkdir()
    (desk / "baichuan" / "config.json").write_text(json.dumps(BAICHUAN))
    save_file(baichuan_weights(), desk / "baichuan" / "model.safetensors")
    for name in ("configs", "docs"):
        (desk / name).symlink_to(ROOT / name)
    text = "It was a fine day, and number 12 of the list was done. " * 60
    lines = "".join(json.dumps({"text": f"{n} {text}"}) + "\n" for n in range(40))
    for name in ("docs.jsonl", "books.jsonl", "books-development.jsonl"):
        (desk / name).write_text(lines)
    for file in (ROOT / "configs/studies").glob("*.yaml"):
        for named in re.findall(r"runs/[\w/.-]+\.jsonl", file.read_text(encoding="utf-8")):
            (desk / named).parent.mkdir(parents=True, exist_ok=True)
            (desk / named).write_text(lines)
    short: dict[str, Any] = {
        "model": {"path": "builtin:tiny"},
        "lengths": {"target": 512, "train": 128},
        "data": "docs.jsonl",
        "train": {"max_steps": 1, "per_device_train_batch_size": 1, "kl_weight": 0.0},
        "evaluate": [{"name": "passkey", "context_lengths": [128], "trials": 2}],
        "stages": ["extended"],
    }
    (desk / "run.yaml").write_text(yaml.safe_dump(short))
    (desk / "evaluate.yaml").write_text(yaml.safe_dump({"evaluate": short["evaluate"]}))
    (study,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/study.md").read_text(encoding="utf-8"), re.DOTALL)
    (desk / "study.yaml").write_text(study)
    for name in ("mine", "other", "demo", "first"):
        assert call(desk, "skipwise extend run.yaml --output runs/" + name) == 0
    return desk


def call(desk: Path, command: str) -> int:
    """Run a command of a page, in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        patch.setattr(sys, "argv", shlex.split(command))
        return run(app)


def shortened(command: str) -> str:
    """A command of a page with what is here in the place of what is the reader's, and small."""
    for said, meant in STANDS_FOR.items():
        command = command.replace(said, meant)
    if " evaluate " in command:
        command = re.sub(r" --(only|lengths) \S+", "", command)
    if command.split()[1] in SHORTER:
        command = re.sub(r"--output \S+", "--output new", command)
    if " --gguf " in command:  # needs llama.cpp's converter: tests/export/test_gguf.py
        command = re.sub(r" --(gguf|converter) \S+", "", command)
    if "--print-commands" in command or "--dry-run" in command:
        return command
    return f"{command} {SHORTER.get(command.split()[1], '')}"


# What else is on the pages: where it is run, or why it is not.
ELSEWHERE = {
    r"make (-f experiments/Makefile \S+|demo|test|check|demo-smollm2)\b": "by hand or in CI; tests run what they run",
    r"pip install skipwise": "needs the index; the wheel itself: tests/test_packaging.py",
    r"(torchrun|accelerate launch|deepspeed) .*skipwise extend": "tests/training/test_ranks.py",
    r"#!/bin/bash|#SBATCH|trap |port=|head=|srun |wait ": "Slurm is not here",
    r"(sbatch|OMP_NUM_THREADS=4 parallel) ": "schedulers; the commands they run: tests/study/test_study.py",
    r"(vllm serve|llama-server|git clone) ": "make -f experiments/Makefile check-serving",
    r"python (benchmarks/|-m experiments\.)": "experiments, whose rows are committed",
    r"[Pq]\(d\)": "no command",
}


def test_every_other_command_of_the_pages_is_accounted_for() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = re.findall(r"```(?:console|bash|sh)\n(.*?)```", text, re.DOTALL)
        indented = re.findall(r"^    (\S.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
        for line in [*"\n".join(blocks).splitlines(), *indented]:
            reporting = not line.strip() or line.startswith(("skipwise ", "- ", "|"))
            assert reporting or any(re.match(known, line) for known in ELSEWHERE), f"{page.name}: {line}"


def test_the_quickstart_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    """Each command on what those before it have left, only smaller."""
    smaller = ("--target 2k", "--steps 60", "--lengths 256,1k")
    page = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
    assert all(said in page for said in smaller)
    for command in commands(ROOT / "docs/quickstart.md"):
        for said in smaller:
            command = command.replace(said, STANDS_FOR[said])
        assert call(tmp_path, command) == 0, command
    assert (tmp_path / "runs/first/report.html").is_file()
    assert (tmp_path / "my-model/README.md").is_file()


def test_there_are_commands_to_run() -> None:
    assert len([one for page in PAGES for one in commands(page)]) > 30


@pytest.mark.parametrize(
    "command", sorted({one for page in PAGES for one in commands(page)}), ids=lambda one: one[:60].replace("/", " ")
)
def test_a_command_of_the_pages_runs(command: str, desk: Path) -> None:
    for written in ("new", "my-model", "converted-gptj", "converted-baichuan"):
        shutil.rmtree(desk / written, ignore_errors=True)
    assert call(desk, shortened(command)) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)|^\[[^\]]+\]: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE):
        target = "".join(target)
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor and file.suffix == ".md":
            heads = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{page.name}: {target}"


def dead_links(site: Path) -> Iterator[str]:
    for page in site.rglob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text(encoding="utf-8")):
            file = page.parent / unquote(target)
            if not re.match(r"[a-z]+:|/", target) and not (file.is_file() or (file / "index.html").is_file()):
                yield f"{page.relative_to(site)}: {target}"


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    built = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(built, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    api = (tmp_path / "site/api/index.html").read_text(encoding="utf-8")
    assert "skipwise.positions.PoSE" in api
    fetched = re.findall(r'<(?:link rel="stylesheet" href|script src)="([^"]+)"', api)
    assert len(fetched) > 2
    assert not [one for one in fetched if one.startswith(("http", "//"))]
    assert not list(dead_links(tmp_path / "site"))
    contributing = (tmp_path / "site/contributing/index.html").read_text(encoding="utf-8")
    assert 'href="../decisions/"' in contributing and "[decisions]" not in contributing
    assert "0.1.0" in (tmp_path / "site/changelog/index.html").read_text(encoding="utf-8")
