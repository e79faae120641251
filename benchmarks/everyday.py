"""What every user waits for: start-up, position sampling, tokenising.

    python benchmarks/everyday.py [--megabytes 1000]

Writes ratios and times to benchmarks/results/everyday.json.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from skipwise.data.builtin import python_documents
from skipwise.data.config import DocumentsConfig, SourceConfig
from skipwise.data.store import open_store
from skipwise.data.windows import cut_spans
from skipwise.lengths import Lengths
from skipwise.models.config import ModelConfig
from skipwise.models.load import load_tokenizer
from skipwise.positions import PoSE
from skipwise.positions.window import Document, example_rng
from skipwise.runs.environment import describe_environment
from skipwise.utils.files import write_json

LENGTHS = Lengths(original=2048, train=2048, target=32768)
RUNS = 7


def median_seconds(work: Callable[[], Any], runs: int = RUNS) -> float:
    """The median of some runs."""
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def start_up() -> dict[str, float]:
    """Seconds of commands that should answer at once, in processes of their own."""
    commands = {
        "help_seconds": ["--help"],
        "plan_seconds": ["plan", "builtin:tiny", "--target", "4k"],
    }
    return {
        name: median_seconds(
            lambda command=command: subprocess.run(  # type: ignore[misc]
                [sys.executable, "-m", "skipwise", *command], check=True, capture_output=True
            )
        )
        for name, command in commands.items()
    }


def sampling(windows: int = 3000) -> dict[str, float]:
    """Ids per second of PoSE with two chunks, each window from a generator of its own, and by Python lists."""
    sampler, document = PoSE(), Document(LENGTHS.train)

    def ours() -> None:
        for index in range(windows):
            sampler.sample(document, LENGTHS, example_rng(0, 0, index))

    def with_lists() -> None:
        for index in range(windows):
            draw = random.Random(index)
            cut = draw.randint(1, LENGTHS.train - 1)
            skip = draw.randint(0, LENGTHS.target - LENGTHS.train)
            np.array(list(range(cut)) + list(range(cut + skip, LENGTHS.train + skip)))

    ids = windows * LENGTHS.train
    seconds, theirs = median_seconds(ours), median_seconds(with_lists)
    return {"sampler_ids_per_second": ids / seconds, "sampler_over_lists": theirs / seconds}


def write_documents(path: Path, megabytes: int) -> list[str]:
    """A JSONL file of generated text: the same words in another order for every document."""
    words = " ".join(text for _, text in python_documents()).split(" ")[:200_000]
    draw, texts, size = random.Random(0), [], 0
    while size < megabytes * 1_000_000:
        start = draw.randrange(len(words) - 3000)
        texts.append(" ".join(words[start : start + draw.randint(200, 3000)]))
        size += len(texts[-1])
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return texts


def first_step() -> dict[str, float]:
    """Seconds until `extend` has taken its first step, with its text tokenised before and not."""
    with tempfile.TemporaryDirectory() as directory:
        environment = {**os.environ, "SKIPWISE_CACHE": f"{directory}/cache"}
        result = {}
        for name in ("first_step_new_text_seconds", "first_step_seconds"):
            output = Path(directory) / name
            command = [
                *(sys.executable, "-m", "skipwise", "extend", "builtin:tiny", "--target", "4k"),
                *("--data", "builtin:python", "--steps", "2", "--set", "stages=[]", "--output", str(output)),
            ]
            started = time.perf_counter()
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
            while not (output / "train.jsonl").exists() and process.poll() is None:
                time.sleep(0.02)
            result[name] = time.perf_counter() - started
            assert process.wait() == 0
    return result


def tokenising(megabytes: int, runs: int = 3) -> dict[str, float]:
    """Rate of the store against the bare tokenizer, on the same text, by turns."""
    tokenizer = load_tokenizer(ModelConfig(path="builtin:tiny"))
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "texts.jsonl"
        texts = write_documents(file, megabytes)
        source = SourceConfig(source=str(file))

        def bare() -> None:
            for start in range(0, len(texts), 1000):
                tokenizer.backend_tokenizer.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False)

        def ours() -> None:
            with tempfile.TemporaryDirectory() as cache:
                os.environ["SKIPWISE_CACHE"] = cache
                open_store(source, DocumentsConfig(sources=(source,)), tokenizer)

        seconds = [(median_seconds(bare, 1), median_seconds(ours, 1)) for _ in range(runs + 1)][1:]  # one to warm up
    theirs, own = (statistics.median(side) for side in zip(*seconds, strict=True))
    size = sum(map(len, texts)) / 1e6
    return {"tokenize_ratio": theirs / own, "tokenize_megabytes_per_second": size / own, "tokenize_megabytes": size}


def many_documents(counts: tuple[int, ...] = (1_000, 10_000, 100_000)) -> list[dict[str, float]]:
    """Seconds to build and to open a store, and to cut its documents into windows, by their number."""
    tokenizer = load_tokenizer(ModelConfig(path="builtin:tiny"))
    words = " ".join(text for _, text in python_documents()).split(" ")[:200_000]
    rows = []
    for count in (counts[0], *counts):  # once to warm up
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "texts.jsonl"
            texts = (" ".join(words[number % 1000 : number % 1000 + 60]) for number in range(count))
            file.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
            source = SourceConfig(source=str(file))
            data = DocumentsConfig(sources=(source,), held_out_share=0.05)
            os.environ["SKIPWISE_CACHE"] = directory
            row: dict[str, float] = {"documents": count}
            row["build_seconds"] = median_seconds(lambda: open_store(source, data, tokenizer), 1)  # noqa: B023
            row["open_seconds"] = median_seconds(lambda: open_store(source, data, tokenizer))  # noqa: B023
            train = open_store(source, data, tokenizer).train
            row["cut_seconds"] = median_seconds(lambda: cut_spans(train, 64, 64, False))  # noqa: B023
            rows.append(row)
    return rows[1:]


def store_memory(megabytes: int) -> float:
    """By how many MB building a store raises the peak memory of a process (Linux)."""
    command = [sys.executable, __file__, "--memory-of", str(megabytes)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def print_store_memory(megabytes: int) -> None:
    """In a process of its own."""
    tokenizer = load_tokenizer(ModelConfig(path="builtin:tiny"))
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "texts.jsonl"
        chunk = Path(directory) / "chunk.jsonl"
        write_documents(chunk, min(10, megabytes))
        with file.open("wb") as opened:
            for _ in range(max(1, megabytes // 10)):
                opened.write(chunk.read_bytes())
        os.environ["SKIPWISE_CACHE"] = directory
        tokenizer(["some text"] * 1000)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        source = SourceConfig(source=str(file))
        open_store(source, DocumentsConfig(sources=(source,)), tokenizer)
        print((_status("VmHWM") - before) / 1024)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> None:
    """All of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="of text for the larger store")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print_store_memory(arguments.memory_of)
        return
    results = {**start_up(), **first_step(), **sampling(), **tokenising(20)}
    for size in (10, arguments.megabytes):
        results[f"store_memory_megabytes_at_{size}"] = store_memory(size)
    output = Path(__file__).parent / "results" / "everyday.json"
    rows = many_documents()
    write_json(output, {"environment": describe_environment(), **results, "documents": rows})
    Console().print(rows)
    Console().print(results)


if __name__ == "__main__":
    main()
