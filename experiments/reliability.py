"""What a run survives, and what it refuses: the evidence behind docs/results/reliability.md.

    python -m experiments.reliability docs/results/reliability.json --kills 20 --inputs 500

Kills: a run of the embedded model kills itself at random writes and is started again with --resume until it is
finished; its weights must be those of a run that nothing happened to. Inputs: broken configurations and data files;
each must end with exit code 0 or 2, at most one message, and no run that is half there.
"""

import argparse
import copy
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from rich.console import Console

from skipwise.cli import main as cli
from skipwise.runs.environment import describe_environment
from skipwise.utils.files import write_json
from tests.processes import command, started

KILLED: dict[str, Any] = {
    "model": {"path": "builtin:tiny"},
    "lengths": {"target": 1024},
    "data": {"source": "builtin:python", "retrieval_share": 0.3},
    "train": {
        "max_steps": 120,
        "save_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "kl_weight": 0.0,
    },
    "evaluate": [
        {"name": "perplexity", "context_lengths": [256, 1024], "documents": 4, "stride": 128, "final_tokens": 256},
        {"name": "passkey", "context_lengths": [256, 1024], "trials": 10},
    ],
}


def kills(count: int, directory: Path, seed: int, config: dict[str, Any] = KILLED) -> dict[str, Any]:
    """Kill one run `count` times; where it was each time, and whether it came to the same end.

    A run kills itself before a random one of its writes, or a moment later. So where it dies depends on what it does,
    and not on how fast the machine is.
    """
    file = directory / "killed.yaml"
    file.write_text(yaml.safe_dump(config))
    undisturbed, disturbed = directory / "undisturbed", directory / "disturbed"
    _run(file, undisturbed)
    writes = int((directory / "undisturbed.writes").read_text())
    rng, hits = random.Random(seed), Counter[str]()
    for _ in range(count):
        # A resumed run writes less than a whole one; in the mean all kills together take nine tenths of it.
        number = max(1, round(writes * rng.uniform(0.0, 1.8) / count))
        if not _run(file, disturbed, number, rng.choice((0.0, 0.0, 0.02, 0.1))):
            break  # it had finished
        hits[_where(disturbed)] += 1
        print(f"kill {hits.total()}: {_where(disturbed)}", flush=True)
    _run(file, disturbed)
    hashes = [_hash(one / "model" / "model.safetensors") for one in (undisturbed, disturbed)]
    rows = [_results(one) for one in (undisturbed, disturbed)]
    return {
        "kills": hits.total(),
        "killed_during": dict(sorted(hits.items())),
        "same_final_hash": hashes[0] == hashes[1],
        "same_results": rows[0] == rows[1],
        "logged_steps_once": _logged(undisturbed) == _logged(disturbed),
    }


def _run(file: Path, output: Path, number: int = 0, later: float = 0.0) -> bool:
    """A run, begun or resumed; whether it was killed.

    Args:
        number: of the write before which it is killed; 0 for none.
        later: seconds after that.
    """
    own = [str(number), str(later), str(output)]
    arguments = ["extend", str(file), "--output", str(output), *(["--resume"] if output.exists() else [])]
    with started(_killing_itself, own + arguments, output.with_suffix(".printed")) as process:
        code = process.wait()
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"a run ended with {code}:\n{process.printed[-4000:]}")
    return code != 0


def _killing_itself(arguments: list[str]) -> None:
    """`skipwise` in a process that dies at a write; without dying it notes how often it writes below the directory."""
    number, later, output = int(arguments[0]), float(arguments[1]), arguments[2]
    writes = 0

    def watch(event: str, values: tuple[Any, ...]) -> None:
        nonlocal writes
        if event not in ("open", "os.rename") or output not in str(values[0]):
            return
        if event == "open" and not values[2] & (os.O_WRONLY | os.O_RDWR):
            return
        writes += 1
        if writes == number:
            if later:
                threading.Timer(later, os.kill, (os.getpid(), signal.SIGKILL)).start()
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    try:
        command(arguments[3:])
    finally:
        Path(output).with_suffix(".writes").write_text(str(writes))


def _where(run: Path) -> str:
    """What a run is at, by its files."""
    if not (run / "resolved.yaml").exists():
        return "start"
    if (run / "checkpoints" / "unfinished").exists():
        return "writing a checkpoint"
    if (run / "model" / "config.json").exists():
        return "evaluation after training"
    return "training" if (run / "train.jsonl").exists() else "evaluation before training"


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _results(run: Path) -> list[str]:
    return sorted((run / "results.jsonl").read_text().splitlines())


def _logged(run: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run / "train.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


# A run that takes a second, to be broken.
SMALL: dict[str, Any] = {
    "model": {"path": "builtin:tiny", "dtype": "float32"},
    "lengths": {"target": 512, "train": 64, "original": 256},
    "data": {"source": "data.jsonl", "held_out_share": 0.1, "retrieval_share": 0.0, "short_documents": "skip"},
    "positions": {"name": "pose", "chunks": 2, "content": "contiguous"},
    "rope": {"name": "yarn", "beta_fast": 4.0},
    "train": {
        "max_steps": 1,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 1,
        "untouched_share": 0.25,
        "kl_weight": 0.0,
        "fsdp": False,
        "deepspeed": None,
        "lora": None,
    },
    "evaluate": [],
    "seed": 0,
}
JUNK: tuple[Any, ...] = (
    None, "", "x", "-1", "1k", "../../etc/passwd", "\u0000", "[red]", "{0}", "%s", -1, 0, 1, 3, 2**63, 0.5, -0.5, 1e308,
    float("nan"), float("inf"), True, False, [], [1, 2], ["x"], {}, {"name": "x"}, {"name": "pose", "x": 1}, b"\xff",
)  # fmt: skip
BROKEN_YAML: tuple[bytes, ...] = (
    b"", b"\x00\x01\x02", b"\xff\xfe", b"[1, 2", b"model: {path: builtin:tiny", b"- 1\n- 2\n", b"just text",
    b"a: b: c", b"!!python/object/apply:os.system ['true']", b"&a [*a]", b"\tmodel: x", b"model: !unknown x",
    b"model: {path: builtin:tiny}\nmodel: {path: builtin:tiny}\n", b"1: 2", b"? [a]\n: b\n", b"model:\n  path: 3\n",
)  # fmt: skip
WORDS = "the window of a model is how far it can look back over what it has read ".split()


def text_of(rng: random.Random, words: int) -> str:
    """Made-up words, as long as a document has to be."""
    return " ".join(rng.choice(WORDS) for _ in range(words))


def whole_data() -> tuple[str, bytes]:
    """A data file that nothing is wrong with."""
    rng = random.Random(0)
    return "data.jsonl", b"".join(json.dumps({"text": text_of(rng, 400)}).encode() + b"\n" for _ in range(12))


def broken_data(rng: random.Random) -> tuple[str, bytes]:
    """A name and a content of a data file, most of them not as they should be."""
    good = [json.dumps({"text": text_of(rng, 400)}) for _ in range(12)]
    bad = rng.choice((
        "", "{", "null", "3", "[]", '"x"', "{}", '{"text": null}', '{"text": 3}', '{"text": []}', '{"Text": "x"}',
        '{"text": ""}', '{"text": "\\ud800"}', '{"text": "a", "text": "b"}', "\u2028", '{"text": "x"} trailing', "NaN",
        '{"text": "' + "x" * 10_000 + '"}', '{"text": "\\u0000"}', "<html>",
    ))  # fmt: skip
    kind = rng.choice(("line", "line", "all", "binary", "cut", "name", "gzip", "text", "crlf"))
    if kind == "all":
        good = [bad] * 12
    elif kind == "line":
        good[rng.randrange(12)] = bad
    content = "\n".join(good).encode() + b"\n"
    if kind == "binary":
        content = rng.randbytes(3000)
    elif kind == "cut":
        content = content[: rng.randrange(len(content))]
    elif kind == "crlf":
        content = content.replace(b"\n", b"\r\n")
    names = {"name": ("data.csv", "data", "data.json", "data.parquet", "data.zst"), "gzip": ("data.jsonl.gz",)}
    names["text"] = ("data.txt", "data.md")
    return rng.choice(names.get(kind, ("data.jsonl",))), content


def _places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _places(value, (*path, key))


def broken_config(rng: random.Random) -> bytes:
    """A configuration with something else in a place or two, with a key too many, or that is no YAML."""
    if rng.random() < 0.15:
        return rng.choice(BROKEN_YAML)
    values = copy.deepcopy(SMALL)
    for _ in range(rng.choice((1, 1, 2))):
        path = rng.choice([path for path in _places(values) if path])
        inner: Any = values
        for key in path[:-1]:
            inner = inner[key]
        change = rng.random()
        if change < 0.7:
            inner[path[-1]] = rng.choice(JUNK)
        elif change < 0.85:
            del inner[path[-1]]
        else:
            inner[rng.choice(("x", "max_step", "__class__", "", "a b", 3))] = rng.choice(JUNK)
    if isinstance(values.get("train"), dict):
        values["train"].setdefault("max_steps", 1)  # or it would not take a second
    values.setdefault("evaluate", [])
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode()


def run_broken(config: bytes, data: tuple[str, bytes], directory: Path) -> tuple[int, str]:
    """One run in this process, in a directory of its own: exit code and all that was printed.

    Raises:
        Exception: whatever the command let through, which would be a traceback.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    name, content = data
    (directory / name).write_bytes(content)
    (directory / "config.yaml").write_bytes(config)
    printed = io.StringIO()
    console = Console(file=printed, width=200, markup=False, highlight=False)
    before = Path.cwd()
    os.chdir(directory)
    try:
        with (
            patch.object(cli, "console", console),
            patch.object(cli, "errors", console),
            redirect_stdout(printed),
            redirect_stderr(printed),
        ):
            code = cli.run(lambda: cli.app(["extend", "config.yaml", "--output", "run"]))
    finally:
        os.chdir(before)
    return code, printed.getvalue()


def verdict(code: int, printed: str, run: Path) -> str | None:
    """What is wrong with how a run ended; None if nothing is."""
    if code not in (0, 2):
        return f"exit code {code}"
    messages = printed.count("Error:")
    if messages != (code == 2):
        return f"{messages} messages"
    if code == 2 and run.exists() and not (run / "resolved.yaml").exists():
        return "half a run"
    return None


def inputs(count: int, directory: Path, seed: int) -> dict[str, Any]:
    """`count` broken inputs, half of them configurations and half data files; how they ended."""
    rng = random.Random(seed)
    codes, tracebacks, wrong = Counter[int](), 0, list[str]()
    for number in range(count):
        config, data = (broken_config(rng), whole_data()) if number % 2 else (b"", broken_data(rng))
        if not number % 2:
            values = copy.deepcopy(SMALL)
            values["data"]["source"] = data[0]
            config = yaml.safe_dump(values).encode()
        place = directory / "broken"
        try:
            code, printed = run_broken(config, data, place)
        except Exception as error:
            tracebacks += 1
            wrong.append(f"{type(error).__name__}: {error}; {config!r} {data[0]} {data[1][:300]!r}")
            continue
        codes[code] += 1
        problem = verdict(code, printed, place / "run")
        if problem:
            wrong.append(f"{problem}; {config!r} {data[0]} {data[1][:300]!r}\n{printed[-500:]}")
    for one in wrong:
        print(one, flush=True)
    exits = {str(code): number for code, number in sorted(codes.items())}
    return {"bad_inputs": count, "exit_codes": exits, "tracebacks": tracebacks, "wrong": len(wrong)}


def main() -> None:
    """Both, into one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--inputs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = inputs(arguments.inputs, Path(directory), arguments.seed)
        found |= kills(arguments.kills, Path(directory), arguments.seed)
    given = " ".join(["python -m experiments.reliability", *sys.argv[1:]])
    write_json(arguments.output, {**found, "command": given, "environment": describe_environment()})
    print(json.dumps(found, indent=2))
    raise SystemExit(bool(found["wrong"] or not found["same_final_hash"]))


if __name__ == "__main__":
    main()
