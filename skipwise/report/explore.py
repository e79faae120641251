"""A local page to look at an extension before it is run, and to ask a model before and after.

Gradio, on the loopback interface unless told otherwise. The network is asked for a model that is named by its hub id,
and for nothing else.
"""

import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import altair as alt
import gradio as gr

from skipwise.config.files import parse_config, to_yaml
from skipwise.config.run import RunConfig
from skipwise.errors import UserError
from skipwise.evaluation.passkey import QUESTION, Fact, filler_repeats, passkey_text
from skipwise.evaluation.prompts import encoder
from skipwise.export.inspection import inspect_run
from skipwise.models.config import ModelConfig
from skipwise.planning.plan import compare_costs
from skipwise.positions import SAMPLERS
from skipwise.report.charts import coverage_chart, wavelength_chart, window_chart
from skipwise.report.plan import COST_NOT_KNOWN, describe_costs, explain_costs, plan_warnings
from skipwise.report.vega import Chart
from skipwise.rope import ROPE_SCALINGS
from skipwise.runs.directory import RunDir
from skipwise.runs.record import Run, read_run
from skipwise.utils.sections import name_of

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Fonts of the system: others would be fetched.
THEME = gr.themes.Soft(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
# Tokens of an answer; the longest target, since distances are computed for each.
ANSWER, LONGEST = 32, 1 << 20
# The page answers in threads, and transformers changes torch for the whole process while it makes a model.
ONE_AT_A_TIME = threading.Lock()


def planned(model: str, target: str, train: str, sampler: str, chunks: int | None, rope: str, steps: int | None) -> Run:
    """What these settings mean, as a run that has not begun.

    Raises:
        UserError: for settings that cannot be right.
    """
    if steps is None or chunks is None:
        raise UserError(
            "Steps and chunks must be numbers, but one of them is empty. Fill it in.", code="number_missing"
        )
    positions: dict[str, Any] = {"name": sampler}
    if sampler == "pose":
        positions["chunks"] = int(chunks)
    values: dict[str, Any] = {
        "model": {"path": model.strip()},
        "lengths": {"target": target.strip(), "train": train.strip() or None},
        "positions": positions,
        "rope": rope,
        "data": "builtin:python",
        "train": {"max_steps": int(steps)},
    }
    config = parse_config(values)
    if config.lengths.target > LONGEST:
        raise UserError(
            f"The page draws targets up to {LONGEST:,} tokens, not {config.lengths.target:,}. Lower it.",
            code="target_too_long_to_draw",
        )
    with ONE_AT_A_TIME:
        _, run = inspect_run(config)
    return Run(sampler, RunDir(Path("not-there-yet")), config, run.lengths, [], [])


def look(
    model: str, target: str, train: str, sampler: str, chunks: int, rope: str, steps: int,
    memory: float | None, devices: int, zero: int, teraflops: float | None, cpu: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Charts, costs and YAML for the page.

    Args:
        model, target, train, sampler, chunks, rope, steps: as for `planned`.
        memory: of a device, in GB; None or 0 if it is not known.
        devices, zero, cpu: as for `costs.step_memory`.
        teraflops: that a device reaches in training; None or 0 if it is not known.

    Raises:
        gr.Error: with the message of what is wrong.
    """
    try:
        run = planned(model, target, train, sampler, chunks, rope, steps)
        with ONE_AT_A_TIME:
            info, resolved = inspect_run(run.config)
        shape = info.shape
        if shape is None:
            raise UserError(COST_NOT_KNOWN, code="cost_not_known")
        rate = teraflops * 1e12 if teraflops else None
        hardware: dict[str, Any] = {"devices": int(devices or 1), "zero": int(zero), "cpu": cpu}
        costs = compare_costs(resolved, shape, **hardware, flops_per_second=rate)
        heads, rows = describe_costs(costs, run.config.train.max_steps, memory * 1e9 if memory else None)
        windowed, size = info.layers is not None, memory * 1e9 if memory else None
        notes = explain_costs(resolved, costs, cpu=cpu, windowed=windowed, device_memory=size) + plan_warnings(
            run.lengths
        )
        drawn = [_drawn(maker([run])) for maker in (window_chart, coverage_chart, wavelength_chart)]
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error
    return (*drawn, {"headers": heads, "data": rows}, "\n".join(f"- {note}" for note in notes), _yaml(run.config))


def _drawn(chart: Chart | None) -> Any:
    if chart is None or chart.spec is None:
        return None
    return alt.Chart.from_dict({**chart.spec, "width": 600})


def _yaml(config: RunConfig) -> str:
    """The whole configuration, for `skipwise extend`."""
    return f"# skipwise extend run.yaml\n{to_yaml(config)}"


@lru_cache(maxsize=2)
def _loaded(given: ModelConfig) -> tuple[Any, Any]:
    """Model and tokenizer."""
    from skipwise.models.load import default_device, load_model, load_tokenizer

    return load_model(given, default_device()).eval(), load_tokenizer(given)


def answer(given: ModelConfig, prompt: str) -> str:
    """What a model writes after a prompt, greedily."""
    import torch

    with ONE_AT_A_TIME, torch.no_grad():
        model, tokenizer = _loaded(given)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False)
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


def ask(run: Run, text: str, question: str) -> tuple[str, str, str]:
    """Tokens of the prompt, and the answers of the model before and after.

    Raises:
        gr.Error: when there is nothing to read or more than the target, or a model cannot be had.
    """
    before, after = run.config.model, written_model(run)
    prompt = f"{text}{question}"
    try:
        if not text.strip():
            raise UserError("There is no text to ask about. Paste one, or take the example.", code="no_text_given")
        with ONE_AT_A_TIME:
            tokens = len(_loaded(after)[1](prompt)["input_ids"])
        if tokens > run.lengths.target:
            raise UserError(
                f"The text has {tokens:,} tokens, but the target is {run.lengths.target:,}. Shorten it.",
                code="text_exceeds_target",
            )
        said = (
            f"{tokens:,} tokens; the original window has {run.lengths.original:,}, the target {run.lengths.target:,}."
        )
        return said, answer(before, prompt), answer(after, prompt)
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error


def written_model(run: Run) -> ModelConfig:
    """What a run has written, to be loaded as its base was."""
    return run.config.model.model_copy(update={"path": str(run.directory.model), "revision": None})


def example_text(run: Run) -> tuple[str, str]:
    """A passkey in filler of three quarters of the target, and the question."""
    fact = Fact("48213", 0.3)
    tokenizer = _loaded(written_model(run))[1]
    repeats = filler_repeats(encoder(tokenizer, chat=False), run.lengths.target * 3 // 4)
    return passkey_text(repeats, [fact]), f"{fact.write(QUESTION)} The pass key is"


def build(run: Run | None) -> Any:
    """The page, as `gradio.Blocks`.

    Args:
        run: whose model can be asked; None for none.
    """
    with gr.Blocks(title="Skipwise", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("# Skipwise\nWhat an extension looks like before it is run.")
        with gr.Tab("Plan"):
            given, shown = _plan_tab()
        page.load(look, given, shown, api_visibility="private")
        if run is not None:
            with gr.Tab("Ask"):
                _ask_tab(run)
    return page


def _plan_tab() -> tuple[list[Any], list[Any]]:
    """What is asked for, and what is shown."""
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            given: list[Any] = [
                gr.Textbox("builtin:tiny", label="Model", info="directory, hub id or builtin:tiny"),
                gr.Textbox("2k", label="Target window"),
                gr.Textbox("", label="Training window", info="the model's own unless said"),
                gr.Dropdown([name_of(one) for one in SAMPLERS], value="pose", label="Position sampler"),
                gr.Slider(1, 8, 2, step=1, label="Chunks", info="of pose"),
                gr.Dropdown([name_of(one) for one in ROPE_SCALINGS], value="yarn", label="RoPE scaling"),
                gr.Number(200, label="Steps", minimum=1, precision=0),
                gr.Number(16, label="Memory of a device, GB", minimum=0),
                gr.Number(1, label="Devices", minimum=1, precision=0),
                gr.Slider(0, 3, 0, step=1, label="ZeRO stage", info="what devices share; 3 is also FSDP"),
                gr.Number(None, label="TFLOP/s of a device", info="in training; for the time", minimum=0),
                gr.Checkbox(False, label="Devices are CPUs"),
            ]
            button = gr.Button("Look", variant="primary")
        with gr.Column(scale=3), gr.Tabs():
            with gr.Tab("One window"):
                window = gr.Plot(show_label=False)
            with gr.Tab("Distances"):
                distances = gr.Plot(show_label=False)
            with gr.Tab("RoPE"):
                wavelengths = gr.Plot(show_label=False)
            with gr.Tab("Cost"):
                costs = gr.Dataframe(show_label=False, interactive=False)
                notes = gr.Markdown()
            with gr.Tab("YAML"):
                text = gr.Code(language="yaml", show_label=False)
    shown = [window, distances, wavelengths, costs, notes, text]
    changed = [button.click, *(one.change for one in given[3:6])]
    # What is set while an answer is on its way is looked at after it; by default it would be forgotten.
    gr.on(changed, look, given, shown, api_visibility="private", trigger_mode="always_last")
    return given, shown


def _ask_tab(run: Run) -> None:
    gr.Markdown(
        f"`{run.config.model.path}` beside `{run.directory.path.name}`: what each writes after the same prompt."
    )
    text = gr.Textbox(label="A long text", lines=10, max_lines=14)
    question = gr.Textbox(label="and what comes after it")
    with gr.Row():
        example, button = gr.Button("An example: a passkey"), gr.Button("Ask both", variant="primary")
    said = gr.Markdown()
    with gr.Row():
        before, after = gr.Textbox(label="untouched"), gr.Textbox(label="extended")
    example.click(lambda: example_text(run), None, [text, question], api_visibility="private")
    button.click(lambda *given: ask(run, *given), [text, question], [said, before, after], api_visibility="private")


def serve(run: Path | None, host: str, port: int | None, log: Callable[[str], None]) -> None:
    """Show the page until it is interrupted.

    Args:
        say: told where it is.

    Raises:
        UserError: for a directory that is no run with a model, and when the port is taken.
    """
    asked = None if run is None else read_run(RunDir(run), run.name)
    if asked is not None and not asked.directory.model.is_dir():
        raise UserError(
            f"explore asks the model of a run, and {run} has none yet. Finish it: extend with --resume.",
            code="run_not_finished",
        )
    page = build(asked)
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            theme=THEME,
            quiet=True,
            footer_links=[],
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(
            f"The page cannot be served at {host}: {error}. Choose another --port or --host.",
            code="address_not_available",
        ) from error
    if host not in LOOPBACK:
        log("Whoever reaches this machine can read names of its files and use its models: there is no password.")
    log(f"Open {address} (Ctrl-C ends it).")
    page.block_thread()
