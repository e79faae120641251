"""Do servers compute what was trained? SmolLM2 with YaRN, on a text longer than its original window.

    python -m experiments.check_serving docs/results/serving.json --vllm VLLM_PYTHON --llama-cpp DIRECTORY

Extends SmolLM2 to 32k as configs/smollm2-32k.yaml says, but for the evaluations (in runs/serving; half an hour on one
core), exports it, and compares log-probabilities of 1,000 tokens beyond 8k, by transformers in float32 and by each
server that is given. As a control, transformers reads the same text with the RoPE that is left if an older reader finds
the new form of the config alone. llama.cpp is asked for passkeys at 12k as well. Servers that are not given keep what
was measured with them before, if it was on the same weights.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from rich.console import Console

from skipwise.config.files import parse_config, read_yaml
from skipwise.data.config import DocumentsConfig, SourceConfig
from skipwise.data.store import open_sources
from skipwise.evaluation.inference import score_tokens
from skipwise.evaluation.passkey import make_trials
from skipwise.evaluation.prompts import decode, encoder
from skipwise.export.gguf import find_converter, write_gguf
from skipwise.export.publish import Export, export_run
from skipwise.export.readers import transformers_5
from skipwise.models.config import ModelConfig
from skipwise.models.load import load_model, load_tokenizer
from skipwise.runs.directory import RunDir
from skipwise.runs.environment import describe_environment
from skipwise.utils.files import short_hash, write_json
from skipwise.workflows.extend import extend

# The text has so many tokens; the last ones are compared.
TOKENS, COMPARED = 9216, 1000
PASSKEY_LENGTH, PASSKEYS = 12288, 3
# Its threads wait for each other in loops, so more of them than there are free cores take many times as long.
LLAMA: dict[str, Any] = {"n_batch": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
CONFIG = Path("configs/smollm2-32k.yaml")


def exported(directory: Path, console: Console) -> Path:
    """The exported model, made if it is not there."""
    model = directory / "model"
    if not model.exists():
        run = RunDir(directory / "run")
        config = parse_config({**read_yaml(CONFIG), "evaluate": []})
        extend(config, run.path, given=CONFIG.read_text(), console=console, resume=True)
        export_run(run, parse_config(read_yaml(run.resolved)), model, Export(dtype="float32"))
    return model


def text(model: Path, console: Console) -> list[int]:
    """The first `TOKENS` of the Python documentation and sources, without what was held out."""
    data = DocumentsConfig(sources=(SourceConfig(source="builtin:python"),), held_out_share=0.1)
    (store,) = open_sources(data, load_tokenizer(ModelConfig(path=str(model))), console)
    return [int(token) for token in store.train.read(0, TOKENS)]


def by_transformers(model: Path, ids: list[int], scaled: bool = True) -> NDArray[np.float64]:
    """float64[COMPARED]: log-probabilities of the last tokens."""
    loaded = load_model(ModelConfig(path=str(model), dtype="float32"), torch.device("cpu"))
    if not scaled:
        rotary = loaded.model.rotary_emb
        rotary.inv_freq = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
        rotary.attention_scaling = 1.0
    scored = torch.zeros(1, len(ids), dtype=torch.bool)
    scored[:, -COMPARED:] = True
    return score_tokens(loaded, torch.tensor([ids]), scored).log_probs.double().numpy()


def by_vllm(python: str, model: Path, ids: list[int], directory: Path) -> NDArray[np.float64]:
    """The same by vLLM, in its own environment."""
    source, output = directory / "ids.json", directory / "vllm.json"
    source.write_text(json.dumps(ids))
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment.pop("PYTHONPATH", None)
    script = Path(__file__).with_name("vllm_logprobs.py")
    subprocess.run([python, str(script), str(model), str(source), str(output)], env=environment, check=True)
    return np.array(json.loads(output.read_text())[-COMPARED:])


def gguf_of(converter: Path, model: Path, directory: Path) -> Path:
    """The exported model as a GGUF file in float32, made if it is not there."""
    file = directory / "model-f32.gguf"
    if not file.exists():
        meant = transformers_5(json.loads((model / "config.json").read_text()))
        write_gguf(model, file, "f32", find_converter(converter), meant)
    return file


def by_llama_cpp(file: Path, ids: list[int]) -> NDArray[np.float64]:
    """The same by llama.cpp's Python binding."""
    from llama_cpp import Llama

    llama = Llama(str(file), n_ctx=TOKENS + 16, logits_all=True, **LLAMA)
    llama.eval(ids)
    logits = torch.from_numpy(llama.scores[len(ids) - COMPARED - 1 : len(ids) - 1].copy())
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[-COMPARED:])[:, None])[:, 0].double().numpy()


def passkeys_by_llama_cpp(file: Path, model: Path) -> dict[str, Any]:
    """What llama.cpp writes, greedily, when it is asked for passkeys beyond the original window."""
    from llama_cpp import Llama

    tokenizer = load_tokenizer(ModelConfig(path=str(model)))
    trials = make_trials(encoder(tokenizer, chat=False), PASSKEY_LENGTH, PASSKEYS, seed=0)
    answers = []
    for trial in trials:
        llama = Llama(str(file), n_ctx=PASSKEY_LENGTH + 16, **LLAMA)
        prompt, written = trial.ids[: -trial.answer], []
        for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
            written.append(token)
            if len(written) == trial.answer:
                break
        answers.append({"depth": trial.depth, "key": trial.key, "written": decode(tokenizer, written).strip()})
    return {"tokens": PASSKEY_LENGTH, "answers": answers}


def difference(one: NDArray[np.float64], other: NDArray[np.float64]) -> dict[str, float]:
    """How far two sets of log-probabilities are apart, in nats, and their perplexities."""
    apart = np.abs(one - other)
    return {
        "mean": float(apart.mean()),
        "largest": float(apart.max()),
        "perplexity": float(np.exp(-one.mean())),
        "perplexity_transformers": float(np.exp(-other.mean())),
    }


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--vllm", help="Python of an environment with vllm-cpu")
    parser.add_argument("--llama-cpp", type=Path, help="directory of llama.cpp; needs llama-cpp-python")
    arguments = parser.parse_args()
    directory, console = Path("runs/serving") / short_hash(CONFIG.read_bytes()), Console()
    model = exported(directory, console)
    ids = text(model, console)
    about = {
        "config": str(CONFIG),
        "weights": short_hash((model / "model.safetensors").read_bytes()),
        "tokens": TOKENS,
        "compared": COMPARED,
    }
    before: dict[str, Any] = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    found = before if {key: before.get(key) for key in about} == about else about
    expected = by_transformers(model, ids)

    def add(name: str, version: str, results: dict[str, Any]) -> None:
        """Keep what was measured, with what it was measured with, as soon as it is there."""
        found[name] = {**results, "version": version, "environment": describe_environment()}
        write_json(arguments.output, found)
        console.print(name, results)

    lost = difference(by_transformers(model, ids, scaled=False), expected)
    add("control, RoPE lost", f"transformers {transformers.__version__}", lost)
    if arguments.vllm:
        version = subprocess.run(
            [arguments.vllm, "-c", "from importlib.metadata import version; print(version('vllm-cpu'))"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        add("vllm", f"vllm-cpu {version}", difference(by_vllm(arguments.vllm, model, ids, directory), expected))
    if arguments.llama_cpp:
        import llama_cpp

        file = gguf_of(arguments.llama_cpp, model, directory)
        version = f"llama-cpp-python {llama_cpp.__version__}"
        add("llama_cpp", version, difference(by_llama_cpp(file, ids), expected))
        add("llama_cpp, passkeys", version, passkeys_by_llama_cpp(file, model))


if __name__ == "__main__":
    main()
