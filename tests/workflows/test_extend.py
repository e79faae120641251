"""`skipwise extend`, end to end."""

import json
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from skipwise.training import trainer
from skipwise.training.callbacks import TrainLog
from skipwise.training.preparation import PROBE_PASSED
from tests.commands import error_code, rows_of, skipwise
from tests.picomodels import byte_tokenizer, pico_llama


def test_extend_end_to_end(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    output = skipwise("extend", config_file, "--output", run)
    assert "64 -> 512 tokens" in output
    assert PROBE_PASSED in " ".join(output.split())
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "resolved.yaml",
        "environment.json",
        "report.html",
        "parts.json",
        "rope.json",
        "plan.json",
        "data.json",
        "train.jsonl",
        "timings.json",
        "results.jsonl",
        "examples",
        "model",
    }
    logged = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    losses = [line for line in logged if "loss" in line]
    assert [line["step"] for line in losses] == [1, 4]  # the first and the last
    assert all(line["tokens_per_second"] > 0 and line["peak_memory"] > 1e8 for line in losses)
    rows = rows_of(run)
    pooled = {(row.stage, row.evaluation, row.context_length): row for row in rows if row.depth is None}
    assert len(pooled) == 3 * 6
    assert pooled["original", "perplexity", 256].status == "beyond_window"
    assert pooled["extended", "perplexity", 256].status == "ok"
    assert pooled["extended", "passkey", 64].status == "failed"  # the prompt alone is longer
    assert pooled["extended", "passkey", 64].value is None
    assert "failed: A passkey prompt needs at least" in output
    assert "step 3 of 4: train" in output
    report = (run / "report.html").read_text()
    assert "not finished" not in report and " so far on " not in report
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert model.config.max_position_embeddings == 512
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert model.config.use_cache
    base = pico_llama()
    assert not torch.equal(model.lm_head.weight, base.lm_head.weight)
    assert error_code(skipwise("extend", config_file, "--output", run, code=2)) == "run_exists"


def test_a_finished_run_resumes_to_the_same_rows(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "Nothing to resume" in skipwise("extend", config_file, "--output", run, "--resume")
    lines = (run / "results.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["stage"] != "extended"]
    (run / "results.jsonl").write_text("\n".join(kept) + "\n")
    weights = (run / "model" / "model.safetensors").read_bytes()
    assert "Nothing to resume" not in skipwise("extend", config_file, "--output", run, "--resume")
    # Rows that failed are tried again and so come last.
    assert sorted((run / "results.jsonl").read_text().splitlines()) == sorted(lines)
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    other = skipwise("extend", config_file, "--output", run, "--resume", "--seed", 7, code=2)
    assert error_code(other) == "configuration_changed" and "seed was 0 and is 7" in other
    assert "context window" not in other  # no plan of what will not be done


def test_an_interrupted_run_saves_and_resumes(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the middle of training: exit code 75, then the same weights as without it."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--steps", 8, "--set", "evaluate=[]", "--set", "stages=[]", "--set", "train.save_steps=1000"]
    skipwise("extend", config_file, "--output", whole, *options)
    log = TrainLog.on_log

    def stop(self: TrainLog, *arguments: Any, **keywords: Any) -> None:
        log(self, *arguments, **keywords)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainLog, "on_log", stop)
    output = skipwise("extend", config_file, "--output", parts, *options, code=75)
    monkeypatch.undo()
    assert "--resume" in output
    assert not (parts / "model").exists()
    assert [path.name for path in (parts / "checkpoints").glob("checkpoint-*")] == [
        "checkpoint-2"
    ]  # of the step after the signal
    skipwise("extend", config_file, "--output", parts, *options, "--resume")
    files = [path / "model" / "model.safetensors" for path in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (whole / "report.html").is_file()  # though nothing was measured


def test_the_same_text_at_another_time_is_resumed_and_another_is_not(
    config_file: Path, text_file: Path, tmp_path: Path
) -> None:
    run, options = tmp_path / "run", ["--set", "evaluate=[]", "--method", "interpolate"]
    skipwise("extend", config_file, "--output", run, *options)
    content = text_file.read_text()
    text_file.write_text(content)
    os.utime(text_file, (1, 1))
    skipwise("extend", config_file, "--output", run, *options, "--resume")
    text_file.write_text(content.replace("document 1:", "document 9:"))
    assert error_code(skipwise("extend", config_file, "--output", run, *options, "--resume", code=2)) == "data_changed"


@pytest.mark.parametrize("method", ["randpos", "plain", "interpolate", "full"])
def test_methods(config_file: Path, tmp_path: Path, method: str) -> None:
    run = tmp_path / method
    evaluate = "[{name: perplexity, context_lengths: [64, 256], documents: 2}]"
    steps = [] if method == "interpolate" else ["--steps", 1]
    skipwise("extend", config_file, "--output", run, "--method", method, *steps, "--set", f"evaluate={evaluate}")
    stages = {row.stage for row in rows_of(run)}
    assert stages == {"original", "interpolated"} | (set() if method == "interpolate" else {"extended"})
    assert AutoModelForCausalLM.from_pretrained(run / "model").config.max_position_embeddings == 512


def test_a_model_whose_attention_is_cut_is_not_trained(config_file: Path, tmp_path: Path) -> None:
    """Trap 2: the probe stops the run before anything is written. Seen to fail without the probe."""

    def only_itself(module: torch.nn.Module, query: torch.Tensor, *more: Any, **keywords: Any) -> Any:
        key, value, _, *rest = more
        mask = torch.eye(query.shape[2], dtype=torch.bool)[None, None]
        return sdpa_attention_forward(module, query, key, value, mask, *rest, **{**keywords, "is_causal": False})

    AttentionInterface.register("only_itself", only_itself)
    AttentionMaskInterface.register("only_itself", sdpa_mask)
    flags = ["--set", "model.attn_implementation=only_itself", "--output", tmp_path / "run"]
    assert error_code(skipwise("extend", config_file, *flags, code=2)) == "skip_blocks_attention"
    assert not (tmp_path / "run").exists()


def test_what_this_machine_cannot_do_is_left_out_with_a_line(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    monkeypatch.setattr(trainer, "compiled_layers", lambda model: nullcontext(done.append("compiled")))
    flags = ["--set", "train.use_liger_kernel=true", "--set", "model.attn_implementation=flash_attention_2"]
    more = ["--set", "train.torch_compile=true", "--set", "evaluate=[]", "--output", tmp_path / "run"]
    output = skipwise("extend", config_file, *flags, *more)
    assert output.count("needs a GPU") == 2
    assert done == ["compiled"] or "train.torch_compile does not work here" in output


def test_echoes(config_file: Path, tmp_path: Path) -> None:
    flags = ["--set", "train.echo_share=0.7", "--set", "evaluate=[]"]
    skipwise("extend", config_file, "--output", tmp_path / "run", *flags)
    flex = ["--set", "model.attn_implementation=flex_attention", "--output", tmp_path / "flex"]
    assert error_code(skipwise("extend", config_file, *flags, *flex, code=2)) == "score_mask_not_supported"


def test_nothing_held_out_to_watch_the_loss_on(config_file: Path, tmp_path: Path, text_file: Path) -> None:
    """One long document among short ones: what is held out is shorter than a window."""
    texts = ["the long one " * 40, *(f"short {number}" for number in range(30))]
    text_file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    flags = ["--set", "data.held_out_share=0.001", "--set", "evaluate=[]", "--output", tmp_path / "run"]
    output = skipwise("extend", config_file, *flags, "--set", "train.eval_steps=2", code=2)
    assert error_code(output) == "held_out_documents_too_short"
    assert not (tmp_path / "run").exists()
    skipwise("extend", config_file, *flags)  # without it, nothing is wrong


def test_a_model_with_windowed_layers(config_file: Path, tmp_path: Path) -> None:
    """Masked by distance in training; and the line that says how far it can see at all."""
    config = MistralConfig(
        vocab_size=258,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        sliding_window=16,
        max_position_embeddings=64,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "windowed")
    byte_tokenizer().save_pretrained(tmp_path / "windowed")
    flags = ["--set", f"model.path={tmp_path / 'windowed'}", "--set", "evaluate=[]", "--output", tmp_path / "run"]
    assert "All 2 layers see only the last 16 tokens" in " ".join(skipwise("extend", config_file, *flags).split())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.sliding_window == 16
