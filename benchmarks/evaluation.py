"""How much cheaper our evaluations are than what one would write first, side by side in one run.

    python benchmarks/evaluation.py builtin:tiny --length 1024
    python benchmarks/evaluation.py runs/SmolLM2-135M-Instruct.gguf --length 2048

Prints ratios (theirs / ours) and writes them, with the times, to benchmarks/results/.
"""

import argparse
import copy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from skipwise.data.builtin import python_documents
from skipwise.evaluation.passkey import Trial, greedy_answers, make_trials
from skipwise.evaluation.perplexity import sliding_log_probs, truncated_sums
from skipwise.evaluation.prompts import encoder
from skipwise.evaluation.sliding_windows import sliding_windows
from skipwise.models.config import ModelConfig
from skipwise.models.load import compute_dtype, load_model, load_tokenizer
from skipwise.runs.environment import describe_environment
from skipwise.utils.files import write_json

LENGTHS = 16
TRIALS = 20
# `generate` without a cache takes so long that its time is that of a few trials, scaled up.
SLOW_TRIALS = 4
WINDOWS = 12


def seconds(work: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """The best of some runs, and what the last one returned."""
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = work()
        taken.append(time.perf_counter() - started)
    return min(taken), result


@torch.no_grad()
def whole_pass(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """float[n - 1]: losses of all tokens from one pass with all logits."""
    logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")


def truncated(model: PreTrainedModel, ids: np.ndarray) -> dict[str, Any]:
    """Perplexity at equally spaced lengths: a pass for each, or one for all."""
    lengths = [len(ids) * (i + 1) // LENGTHS for i in range(LENGTHS)]
    tensor = torch.from_numpy(ids)[None]
    with stock_attention(model):
        theirs, _ = seconds(lambda: [float(whole_pass(model, tensor[:, :n]).sum()) for n in lengths])
    ours, _ = seconds(lambda: truncated_sums(model, ids))
    # In float32, since logits in bfloat16 differ by as much as 0.2 % with the length of the pass alone.
    exact = copy.deepcopy(model).float()
    sums = truncated_sums(exact, ids)
    losses = [float(whole_pass(exact, tensor[:, :n]).sum()) for n in lengths]
    differences = [abs(-sums[n - 2] - loss) / loss for n, loss in zip(lengths, losses, strict=True)]
    return {
        "what": f"truncated perplexity at {LENGTHS} lengths up to {len(ids):,}",
        "baseline": "one pass per length",
        "baseline_seconds": theirs,
        "our_seconds": ours,
        "token_passes_ratio": sum(lengths) / len(ids),
        "largest_relative_difference": max(differences),
    }


@contextmanager
def stock_attention(model: PreTrainedModel) -> Iterator[None]:
    """What anybody would have measured with."""
    ours = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(ours)


@torch.no_grad()
def generated(model: PreTrainedModel, trial: Trial) -> list[int]:
    """What `generate` writes without a cache."""
    prompt = torch.tensor([trial.ids[: -trial.answer]])
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False, use_cache=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    answer: list[int] = written[0, prompt.shape[1] :].tolist()
    return answer


@torch.no_grad()
def one_pass(model: PreTrainedModel, trial: Trial) -> bool:
    """The verdict of one pass with a cache over prompt and answer, on its own."""
    ids = torch.tensor([trial.ids])
    output = model(ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=trial.answer + 1)
    return bool((output.logits[0, :-1].argmax(-1) == ids[0, -trial.answer :]).all())


def passkey(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict[str, Any]]:
    """Twenty trials at one length."""
    trials = make_trials(encoder(tokenizer, chat=False), length, TRIALS, seed=0)
    some = trials[:: TRIALS // SLOW_TRIALS][:SLOW_TRIALS]
    with stock_attention(model):
        slow, answers = seconds(lambda: [generated(model, trial) for trial in some])
        single, alone = seconds(lambda: [one_pass(model, trial) for trial in trials])
    ours, greedy = seconds(lambda: list(greedy_answers(model, trials, [True] * TRIALS)))
    verdicts = [answer == trials[number].ids[-trials[number].answer :] for number, answer in greedy]
    same = [
        verdicts[trials.index(trial)] == (answer[: trial.answer] == trial.ids[-trial.answer :])
        for trial, answer in zip(some, answers, strict=True)
    ]
    common = {"what": f"passkey, {TRIALS} trials of {length:,} tokens", "our_seconds": ours}
    return [
        {
            **common,
            "baseline": f"generate without a cache ({SLOW_TRIALS} trials, scaled)",
            "baseline_seconds": slow * TRIALS / SLOW_TRIALS,
            "same_verdicts": all(same),
        },
        {
            **common,
            "baseline": "one cached pass per trial",
            "baseline_seconds": single,
            "same_verdicts": alone == verdicts,
        },
    ]


def sliding(model: PreTrainedModel, ids: np.ndarray, context: int, stride: int) -> dict[str, Any]:
    """The usual loop (a window at a time, all its logits), or ours."""
    windows = sliding_windows(len(ids), context, stride)

    def loop() -> float:
        total = 0.0
        for window in windows:
            window = torch.from_numpy(ids[window.begin : window.end])[None]
            total += float(whole_pass(model, window)[window.score_from - window.begin - 1 :].sum())
        return total

    with stock_attention(model):
        theirs, plain = seconds(loop)
    ours, log_probs = seconds(lambda: sliding_log_probs(model, ids, windows))
    return {
        "what": f"sliding perplexity, {len(windows)} windows of {context:,}, stride {stride:,}",
        "baseline": "full forward with full logits per window",
        "baseline_seconds": theirs,
        "our_seconds": ours,
        "largest_relative_difference": abs(-log_probs.sum() - plain) / plain,
    }


def peak_memory(vocabulary: int, ours: bool) -> None:
    """Print by how many MB one 4,096-token document raises the peak memory of this process (Linux)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1,
        max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = np.random.default_rng(0).integers(0, vocabulary, size=4096)
    whole_pass(model, torch.from_numpy(ids[:32])[None])  # what any first pass allocates
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    if ours:
        truncated_sums(model, ids)
    else:
        whole_pass(model, torch.from_numpy(ids)[None])
    print((_status("VmHWM") - before) / 1024)


def _status(field: str) -> int:
    """A line of /proc/self/status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def memory() -> list[dict[str, Any]]:
    """Peak memory by size of the vocabulary, each in a process of its own."""
    rows = []
    for vocabulary in (32_000, 64_000, 128_000, 256_000):
        megabytes = [
            float(
                subprocess.run(
                    [sys.executable, __file__, "--memory-of", str(vocabulary), *flag],
                    capture_output=True, text=True, check=True,
                ).stdout
            )
            for flag in ([], ["--ours"])
        ]  # fmt: skip
        rows.append({"vocabulary": vocabulary, "baseline_megabytes": megabytes[0], "our_megabytes": megabytes[1]})
    return rows


def main() -> None:
    """Run all of them on one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="builtin:tiny")
    parser.add_argument("--length", type=int, default=1024, help="tokens of the long texts")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="sliding windows")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        peak_memory(arguments.memory_of, arguments.ours)
        return

    console, device = Console(), torch.device("cpu")
    config = ModelConfig(path=arguments.model)
    model, tokenizer = load_model(config, device, compute_dtype("auto", device)), load_tokenizer(config)
    text = "\n\n".join(text for _, text in python_documents())[:2_000_000]
    ids = np.array(tokenizer(text, verbose=False)["input_ids"])
    whole_pass(model, torch.from_numpy(ids[:256])[None])
    context = min(arguments.length, int(model.config.max_position_embeddings))
    rows = [
        truncated(model, ids[: arguments.length]),
        *passkey(model, tokenizer, arguments.length),
        sliding(model, ids[: context + (arguments.windows - 1) * context // 4], context, context // 4),
    ]
    table = Table("what", "instead of", "theirs", "ours", "ratio")
    for row in rows:
        row["ratio"] = row["baseline_seconds"] / row["our_seconds"]
        times = (f"{row['baseline_seconds']:.2f} s", f"{row['our_seconds']:.2f} s", f"{row['ratio']:.1f}x")
        table.add_row(row["what"], row["baseline"], *times)
    console.print(table)
    peaks = memory()
    console.print("peak memory of 4,096 tokens (MB), plain and ours:")
    for peak in peaks:
        console.print(
            f"  vocabulary {peak['vocabulary']:,}: {peak['baseline_megabytes']:.0f}, {peak['our_megabytes']:.0f}"
        )
    name = Path(arguments.model.rpartition(":")[2]).name.removesuffix(".gguf")
    output = Path(__file__).parent / "results" / f"evaluation-{name}.json"
    write_json(output, {"environment": describe_environment(), "rows": rows, "peak_memory": peaks})
    console.print(f"written: benchmarks/results/{output.name}")


if __name__ == "__main__":
    main()
