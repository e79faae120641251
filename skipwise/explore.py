"""A local page to look at an extension before it is run, and to ask a model before and after.

Gradio, on the loopback interface unless told otherwise; nothing is asked of the network.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import altair as alt
import gradio as gr

from skipwise.config import ModelConfig, RunConfig
from skipwise.config_files import merge, parse_config, to_yaml
from skipwise.errors import UserError
from skipwise.evaluation.passkey import QUESTION, Fact, passkey_text
from skipwise.models.shape import read_config, read_windows, shape_of
from skipwise.planning import compare_costs, describe_costs, explain_costs, resolve_target
from skipwise.positions import SAMPLERS
from skipwise.report.charts import Chart, Run, coverage_chart, read_run, wavelength_chart, window_chart
from skipwise.rope import ROPE_SCALINGS
from skipwise.runs import RunDir
from skipwise.sections import name_of

# Fonts of the system: others would be fetched.
THEME = gr.themes.Soft(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
# Tokens of an answer.
ANSWER = 32


def planned(model: str, target: str, train: str, sampler: str, chunks: int, rope: str, steps: int) -> Run:
    """What these settings mean, as a run that has not begun.

    Raises:
        UserError: for settings that cannot be right.
    """
    positions: dict[str, Any] = {"name": sampler}
    if sampler == "pose":
        positions["chunks"] = int(chunks)
    values: dict[str, Any] = {
        "model": {"path": model.strip()},
        "lengths": merge({"target": target.strip()}, {"train": train.strip()} if train.strip() else {}),
        "positions": positions,
        "rope": rope,
        "data": "builtin:python",
        "train": {"max_steps": int(steps)},
    }
    config = parse_config(values)
    lengths = resolve_target(config, *read_windows(read_config(config.model.path)))
    return Run(sampler, RunDir(Path("not-there-yet")), config, lengths, [], [])


def look(
    model: str, target: str, train: str, sampler: str, chunks: int, rope: str, steps: int, memory: float
) -> tuple[Any, ...]:
    """Charts, costs and YAML for the page.

    Raises:
        gr.Error: with the message of what is wrong.
    """
    try:
        run = planned(model, target, train, sampler, chunks, rope, steps)
        shape = shape_of(read_config(run.config.model.path))
        costs = compare_costs(run.config, run.lengths, shape, devices=1, zero=0, cpu=False, flops_per_second=None)
        heads, rows = describe_costs(costs, run.config.train.max_steps, memory * 1e9 if memory else None)
        notes = explain_costs(run.config, costs, False, memory * 1e9 if memory else None)
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
def _loaded(path: str) -> tuple[Any, Any]:
    """Model and tokenizer."""
    from skipwise.models.load import default_device, load_model, load_tokenizer

    given = ModelConfig(path=path)
    return load_model(given, default_device()).eval(), load_tokenizer(given)


def answer(path: str, prompt: str) -> str:
    """What a model writes after a prompt, greedily."""
    import torch

    model, tokenizer = _loaded(path)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    with torch.no_grad():
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False)
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


def ask(run: Run, text: str, question: str) -> tuple[str, str, str]:
    """Tokens of the prompt, and the answers of the model before and after.

    Raises:
        gr.Error: when there is nothing to read.
    """
    if not text.strip():
        raise gr.Error("There is no text to ask about. Paste one, or take the example.", print_exception=False)
    prompt = f"{text}{question}"
    tokens = len(_loaded(str(run.directory.model))[1](prompt)["input_ids"])
    said = f"{tokens:,} tokens; the first window has {run.lengths.original:,}, the target {run.lengths.target:,}."
    return said, answer(run.config.model.path, prompt), answer(str(run.directory.model), prompt)


def example_text(run: Run) -> tuple[str, str]:
    """A passkey in filler of three quarters of the target, and the question."""
    fact = Fact("48213", 0.3)
    units = max(1, run.lengths.target * 3 // 4 // 24)  # a unit of filler has at most so many tokens
    return passkey_text(units, [fact]), f"{fact.write(QUESTION)} The pass key is"


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
    gr.on([button.click, *(one.change for one in given[3:6])], look, given, shown, api_name="look")
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
    button.click(lambda *given: ask(run, *given), [text, question], [said, before, after], api_name="ask")


def serve(run: Path | None, host: str, port: int | None, say: Callable[[str], None]) -> None:
    """Show the page until it is interrupted.

    Args:
        say: told where it is.

    Raises:
        UserError: for a directory that is no run with a model, and when the port is taken.
    """
    asked = None if run is None else read_run(RunDir(run), run.name)
    if asked is not None and not asked.directory.model.is_dir():
        raise UserError(f"explore asks the model of a run, and {run} has none yet. Finish it: extend with --resume.")
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
        raise UserError(f"The page cannot be served at {host}: {error}. Choose another --port.") from error
    say(f"Open {address} (Ctrl-C ends it).")
    page.block_thread()
