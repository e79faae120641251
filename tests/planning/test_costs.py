"""What training costs, by hand, against real models, and against the paper."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen3Config
from typer.testing import CliRunner

from skipwise import Lengths, UserError
from skipwise.cli.main import app
from skipwise.evaluation.applications import QuestionAnswering
from skipwise.evaluation.cost import describe_evaluation, tokens_read
from skipwise.evaluation.harness import Harness
from skipwise.evaluation.passkey import Passkey
from skipwise.evaluation.perplexity import Perplexity, TruncatedPerplexity
from skipwise.evaluation.ruler import Ruler
from skipwise.models.forward import CHUNK_ROWS
from skipwise.models.locate import TINY
from skipwise.models.shape import ModelShape, read_config, shape_of
from skipwise.planning.costs import LOGIT_ROWS, Step, activation_bytes, adapter_weights, step_flops, step_memory
from skipwise.report.plan import plan_warnings

SMALL = ModelShape(
    layers=2, heads=2, key_heads=1, head_dim=4, hidden_size=8, intermediate_size=16, vocabulary=10, tied=False
)
# Published sizes of LLaMA-7B (arXiv 2302.13971, Table 2).
LLAMA_7B = ModelShape(
    layers=32, heads=32, key_heads=32, head_dim=128, hidden_size=4096, intermediate_size=11008, vocabulary=32000,
    tied=False,
)  # fmt: skip

SMOLLM2 = ModelShape(
    layers=30, heads=9, key_heads=3, head_dim=64, hidden_size=576, intermediate_size=1536, vocabulary=49152
)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=100, tie_word_embeddings=True,
    ),
    "untied": LlamaConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=100,
        tie_word_embeddings=False,
    ),
    "wide heads": Qwen3Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=48, vocab_size=100, tie_word_embeddings=True,
    ),
    "two matrices": GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_of_matrices_are_those_of_the_model(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    matrices = {id(weight): weight for weight in model.parameters() if weight.dim() == 2}
    shape = shape_of(CONFIGS[kind].to_dict())
    assert shape.parameters - (2 * shape.layers + 1) * shape.hidden_size == sum(w.numel() for w in matrices.values())


def test_flops_by_hand() -> None:
    """Two windows of ten tokens: 7 matrices a layer, and of each token with five others on average."""
    attention_weights = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8
    weights = 2 * (attention_weights + 3 * 8 * 16) + 10 * 8
    flops = step_flops(SMALL, Step(window=10, windows=2))
    assert flops.matmuls == 3 * 2 * weights * 20
    assert flops.attention == 3 * (2 + 2) * 2 * 8 * 5 * 20
    both = step_flops(SMALL, Step(window=10, windows=1, accumulation=2, checkpointing=True, teacher=True))
    assert both.total == pytest.approx(flops.total * 5 / 3)


def test_memory_by_hand() -> None:
    assert LOGIT_ROWS == CHUNK_ROWS  # costs.py imports no torch
    parameters = SMALL.parameters
    memory = step_memory(SMALL, Step(window=10))
    assert (memory.weights, memory.optimizer) == (4 * parameters, 8 * parameters)
    layer = 4 * 4 * 8 + 5 * 2 * 8 + 2 * (8 + 4 + 4 + 8) + 4 * 2 * 16
    assert activation_bytes(SMALL) == layer
    assert memory.activations == 10 * 2 * layer
    checkpointed = step_memory(SMALL, Step(window=10, checkpointing=True))
    assert checkpointed.activations == 10 * (2 * 4 * 8 + layer)
    selective = step_memory(SMALL, Step(window=10, checkpointing="selective"))
    results = 8 + 4 + 4 + 8 + 8 + 16 + 16 + 8  # queries, keys, values, attention, projected; both of the gate, result
    assert selective.activations == 10 * (2 * (4 * 8 + 2 * results) + layer)
    assert step_flops(SMALL, Step(window=10, checkpointing="selective")) == step_flops(SMALL, Step(window=10))
    assert memory.peak == 12 * parameters + memory.copies + memory.activations + memory.logits
    accumulated = step_memory(SMALL, Step(window=10, accumulation=8))
    assert accumulated.peak == memory.peak + memory.gradients
    assert step_memory(SMALL, Step(window=10, teacher=True)).teacher == 2 * parameters


def test_adapters_by_hand() -> None:
    """Rank 3 beside seven matrices of two layers; only they have gradients and moments."""
    size = 3 * 2 * ((8 + 8) + 2 * (8 + 4) + (8 + 8) + 3 * (8 + 16))
    memory = step_memory(SMALL, Step(window=10, adapter_rank=3))
    assert adapter_weights(SMALL, 3) == size
    assert memory.weights == 4 * (SMALL.parameters + size)
    assert (memory.gradients, memory.optimizer) == (4 * size, 8 * size)
    more = step_memory(SMALL, Step(window=10, adapter_rank=3, embeddings_trained=True))
    assert more.gradients == 4 * (size + 10 * 8)
    four = step_memory(SMALL, Step(window=10, adapter_rank=3, four_bits=True))
    matrices = 2 * SMALL.layer_weights
    assert four.weights == pytest.approx(memory.weights - (4 - 0.515875) * matrices)
    whole, adapted = (step_flops(SMALL, Step(window=10, adapter_rank=rank)) for rank in (0, 3))
    assert adapted.matmuls == pytest.approx(whole.matmuls * 2 / 3)
    assert adapted.attention == whole.attention


def test_adapters_are_as_large_as_those_of_peft() -> None:
    from skipwise.training.adapters import add_adapters
    from skipwise.training.config import LoRAConfig

    pytest.importorskip("peft")
    for kind in ("wide heads", "two matrices"):
        adapted = add_adapters(AutoModelForCausalLM.from_config(CONFIGS[kind]), LoRAConfig(r=3))
        trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
        assert adapter_weights(shape_of(CONFIGS[kind].to_dict()), 3) == trained + _shared(kind)


def _shared(kind: str) -> int:
    """Where queries, keys and values are one matrix, one factor serves all three."""
    return 2 * 3 * 2 * 32 if kind == "two matrices" else 0


@pytest.mark.parametrize(("zero", "divided"), [(1, 1), (2, 2), (3, 3)])
def test_each_stage_divides_one_more_part(zero: int, divided: int) -> None:
    alone = step_memory(SMALL, Step(window=10))
    shared = step_memory(SMALL, Step(window=10), devices=4, zero=zero)
    parts = ("optimizer", "gradients", "weights")
    shares = [getattr(alone, part) / getattr(shared, part) for part in parts]
    assert shares == [4.0] * divided + [1.0] * (3 - divided)
    assert shared.activations == alone.activations


def test_the_paper_on_eight_devices_of_32_gb() -> None:
    """LLaMA-7B on the machine of the paper: 16k at full length does not fit, windows of 2k do."""
    full, pose = (step_memory(LLAMA_7B, Step(window), devices=8, zero=3).peak for window in (16384, 2048))
    assert LLAMA_7B.parameters == pytest.approx(6.74e9, rel=1e-3)
    assert pose < 32e9 < full


def test_memory_is_what_was_measured() -> None:
    """On CPUs, within 15 %: two sizes of models, windows from 256 to 4,096 tokens."""
    checked = 0
    for name, shape in (("lengths-tiny", shape_of(read_config(TINY))), ("training-SmolLM2-135M-Instruct", SMOLLM2)):
        rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
        for row in rows:
            if row["side"] == "ours" and row["train_length"] * row["batch"] <= 8192:
                planned = step_memory(shape, Step(row["train_length"], row["batch"]), cpu=True).peak
                assert planned / 2**20 == pytest.approx(row["peak_megabytes"], rel=0.15), row
                checked += 1
    assert checked >= 8


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**CONFIGS["llama"].to_dict(), "intermediate_size": [4, 8]}, "alike"),
        ({"hidden_size": 8}, "num_hidden_layers"),
        ({**CONFIGS["llama"].to_dict(), "num_experts": 8}, "mixture"),
    ],
)
def test_what_has_no_known_cost(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        shape_of(config)


def test_the_command() -> None:
    printed = (
        CliRunner()
        .invoke(app, ["plan", "builtin:tiny", "--target", "4k", "--flops", "1e11", "--device-memory", "0.5"])
        .output
    )
    assert "pose" in printed
    assert "full" in printed
    row = next(line for line in printed.splitlines() if "fits into 500 MB" in line)
    assert ("yes" in row, "no" in row) == (True, True)
    plan = json.loads(CliRunner().invoke(app, ["plan", "builtin:tiny", "--target", "4k", "--json"]).output)
    costs = plan["costs"]
    assert (plan["target_length"], plan["devices"]) == (4096, 1)
    assert [cost["method"] for cost in costs] == ["pose", "full"]
    assert costs[1]["step"]["window"] == 4096
    assert costs[0]["seconds"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["builtin:tiny", "--target", "256"], "above the model's window of 256"),
        (["builtin:tiny", "--target", "4k", "--method", "interpolate"], "trains nothing"),
        (["x.gguf", "--target", "4k"], "does not exist"),
        (["builtin:tiny", "--target", "4k", "--devices", "2", "--zero", "4"], "--zero"),
        (["builtin:tiny", "--target", "4k", "--measure", "--flops", "1e12"], "Leave one of them out"),
        (["builtin:tiny", "--target", "4k", "--steps", "0"], "at least one step"),
    ],
)
def test_what_cannot_be_planned(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code
    assert message in (str(result.exception) if isinstance(result.exception, UserError) else result.output)


def test_what_the_table_leaves_unsaid() -> None:
    flags = ["--set", "train.torch_compile=true", "--set", "model.attn_implementation=eager", "--devices", "2"]
    arguments = ["plan", "builtin:tiny", "--target", "4k", "--device-memory", "0.5", "--flops", "1e12", *flags]
    said = " ".join(CliRunner().invoke(app, arguments).output.split())
    for words in ("train.kl_weight=0", "half as long again", "torch_compile, the scores", "may with"):
        assert words in said
    quiet = CliRunner().invoke(app, ["plan", "builtin:tiny", "--target", "4k", "--set", "train.kl_weight=0"]).output
    assert "Teacher" not in quiet and "Not counted" not in quiet


def test_sizes_are_not_guessed() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100}
    with pytest.raises(UserError, match="no intermediate_size"):
        shape_of(sizes)


def test_what_an_evaluation_reads_is_what_its_windows_hold() -> None:
    """Counted window by window, for documents that are as long as the longest context."""
    spec = Perplexity(context_lengths=(64, 256, 1024), stride=48, documents=3, final_tokens=100)
    # The last 100 tokens of 1,024: windows end at 972, 1,020 and 1,024, but for the longest, which has them all.
    assert tokens_read(spec) == 3 * (3 * 64 + 3 * 256 + 1024)
    cut = Perplexity(context_lengths=(64,), stride=32, documents=2, max_document_tokens=100)
    assert tokens_read(cut) == 2 * 3 * 64  # they end at 64, 96 and 100
    assert tokens_read(Perplexity(context_lengths=(64,))) is None  # whole documents, however long
    assert tokens_read(Passkey(context_lengths=(100, 1000), trials=8, keys_per_prompt=4)) == 2 * 1100
    assert tokens_read(Ruler(context_lengths=(100,), tasks=("vt", "cwe"), samples=5)) == 1000
    named = TruncatedPerplexity(context_lengths=(100, 1000), documents=1, document_ids=("0:1", "0:2"))
    assert tokens_read(named) == 2000
    assert tokens_read(QuestionAnswering(source="x", context_lengths=(100, 1000), samples=2)) == 2200
    assert tokens_read(Harness()) is None
    assert describe_evaluation([Passkey(context_lengths=(1024,), trials=3), Harness(tasks=("boolq",))]) == (
        "passkey at 1k tokens, trials: 3, about 3,072 tokens to read\nharness: boolq"
    )


def test_a_target_that_nobody_has_reached_is_doubted() -> None:
    assert plan_warnings(Lengths(original=2048, train=2048, target=64 * 2048)) == []
    (said,) = plan_warnings(Lengths(original=256, train=256, target=2**20))
    assert "A factor of 4,096 is beyond 64" in said
    (nearly,) = plan_warnings(Lengths(original=2048, train=2048, target=131_100))
    assert "A factor of 64.014 is beyond 64" in nearly
    assert "Warning: A factor of 4,096" in CliRunner().invoke(app, ["plan", "builtin:tiny", "--target", "1m"]).output


def test_memory_says_whose_it_is() -> None:
    """A dry run counts a CPU's heap where it is one; a plan does when it is told."""
    plan = ["plan", "builtin:tiny", "--target", "4k"]
    assert "Memory of an accelerator" in CliRunner().invoke(app, plan).output
    assert "Memory of a CPU" in CliRunner().invoke(app, [*plan, "--cpu"]).output
    extend = ["extend", "builtin:tiny", "--target", "4k", "--data", "builtin:python", "--dry-run"]
    said = " ".join(CliRunner().invoke(app, extend).output.split())
    assert ("(with a CPU's heap" in said) == (not torch.accelerator.is_available())
