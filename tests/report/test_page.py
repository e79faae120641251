"""The report: what it says, and that a browser shows it, alone and safely."""

import csv
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page

from skipwise import UserError
from skipwise.config.files import parse_config, read_yaml, to_yaml
from skipwise.report.charts import charts_of
from skipwise.report.evaluation import write_evaluation_page
from skipwise.report.page import write_charts, write_report
from skipwise.report.study import write_study_page
from skipwise.runs.directory import RunDir
from skipwise.runs.record import read_run, verdict
from skipwise.utils.files import write_json, write_text
from tests.report.runs import HOSTILE, made_run, row

ROOT = Path(__file__).parents[2]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return made_run(tmp_path / "one")


class Opened:
    """A page, and what it said and asked for."""

    def __init__(self, browser: Browser, file: Path, scheme: Any = "light") -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page: Page = browser.new_page(color_scheme=scheme)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("body[data-drawn=yes]", timeout=60_000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_every_chart_and_asks_for_nothing(browser: Browser, made: Path, scheme: str) -> None:
    charts = write_report([made], made / "report.html")
    assert {chart.key for chart in charts} == {
        "perplexity", "passkey", "suite", "training", "coverage", "rope", "window", "cost"
    }  # fmt: skip
    opened = Opened(browser, made / "report.html", scheme)
    for chart in charts:
        marks = opened.page.locator(f"#chart-{chart.key} svg.marks, #chart-{chart.key} > svg")
        if chart.spec is not None:
            assert marks.count() == 1, chart.key
            assert opened.page.locator(f"#chart-{chart.key} svg path").count() > 5, chart.key
        cells = opened.page.locator(f"section:has(#{chart.key}) tbody tr")
        assert cells.count() == len(chart.rows)
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("file:")] == []
    assert (made / "report.html").stat().st_size < 5_000_000
    back = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 24, 28)")


def test_hostile_text_stays_text(browser: Browser, made: Path) -> None:
    """Names of models, texts and processors, in the page, in tables and in what is drawn."""
    write_report([made], made / "report.html")
    opened = Opened(browser, made / "report.html")
    opened.page.hover("#chart-perplexity svg path[aria-roledescription]", force=True)
    assert opened.page.evaluate("document.body.dataset.hacked") is None
    assert opened.page.locator("img").count() == 0
    assert HOSTILE in opened.page.locator("pre").first.inner_text()


def test_it_prints_whole(browser: Browser, made: Path) -> None:
    """On paper nothing can be scrolled, and what was drawn for the dark is on white."""
    write_report([made], made / "report.html")
    page = Opened(browser, made / "report.html", "dark").page
    page.set_viewport_size({"width": 600, "height": 800})
    page.emulate_media(media="print")
    for chart in page.locator(".chart svg.marks").all():
        box = chart.bounding_box()
        assert box is not None and box["x"] + box["width"] <= 600
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    label = "getComputedStyle(document.querySelector('.role-axis-label text')).fill"
    assert page.evaluate(label) == "rgb(43, 47, 54)"
    assert len(page.pdf()) > 10_000


def test_it_can_be_read_with_the_keyboard(browser: Browser, made: Path) -> None:
    write_report([made], made / "report.html")
    page = Opened(browser, made / "report.html").page
    in_a_section = "document.activeElement.matches('section:has(h2) > details > summary')"
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate(in_a_section):
            break
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.parentElement.open") is True
    labels = page.locator(".chart svg[aria-label], .chart svg [aria-label]").count()
    assert labels > 5


def test_several_runs_side_by_side(browser: Browser, made: Path, tmp_path: Path) -> None:
    other = made_run(tmp_path / "two", learning_rate=1e-3)
    charts = write_report([made, other], tmp_path / "both.html")
    models = {line["model"] for line in next(chart for chart in charts if chart.key == "perplexity").rows}
    assert {"one: extended", "two: extended"} < models
    assert Opened(browser, tmp_path / "both.html").said == []


def test_the_page_of_a_study(browser: Browser, tmp_path: Path) -> None:
    """With every result of the summary in its tables; names stay text."""
    summary = json.loads((ROOT / "docs/results/tiny-x16/summary.json").read_text(encoding="utf-8"))
    summary["model"] = summary["figures"][0]["arm"] = HOSTILE
    losses = {"pose": [(10, 3.0), (20, 2.5)]}
    environments = [{"processor": HOSTILE}]
    page = tmp_path / "study.html"
    write_study_page(summary, losses, "skipwise study s.yaml", f"base: {HOSTILE}", environments, page)
    opened = Opened(browser, tmp_path / "study.html")
    assert opened.page.locator(".chart svg.marks").count() == 4
    assert (opened.said, [url for url in opened.asked if not url.startswith("file:")]) == ([], [])
    assert opened.page.evaluate("document.body.dataset.hacked") is None
    assert HOSTILE in opened.page.locator("pre").last.text_content().replace('\\"', '"')
    for evaluation in ("perplexity", "passkey"):
        shown = opened.page.locator(f"section:has(#{evaluation}) tbody tr").count()
        assert shown == sum(row["evaluation"] == evaluation for row in summary["figures"])
    assert opened.page.locator("section:has(#rates) tbody tr").count() == len(summary["learning_rates"])


def test_the_page_of_an_evaluation(browser: Browser, tmp_path: Path) -> None:
    """By the charts of a run, with every result in its tables; names stay text."""
    columns = {
        name: [row("original", "perplexity", length, value) for length in (256, 1024)]
        + [row("original", "passkey", 256, 0.5, depth=0.5)]
        for name, value in (("one", 20.0), (HOSTILE, 18.0))
    }
    result = {"metric": "perplexity", "value": -2.0, "interval_low": -3.0, "interval_high": -1.0}
    charts = write_evaluation_page(
        columns, "one", {HOSTILE: {("perplexity", 256): result}},
        command="skipwise evaluate one two", config="chat: false", environment={"processor": HOSTILE},
        output=tmp_path / "evaluation.html",
    )  # fmt: skip
    assert [chart.key for chart in charts] == ["perplexity", "passkey", "differences"]
    opened = Opened(browser, tmp_path / "evaluation.html")
    assert opened.page.locator(".chart svg.marks").count() == 3
    assert (opened.said, [url for url in opened.asked if not url.startswith("file:")]) == ([], [])
    assert opened.page.evaluate("document.body.dataset.hacked") is None
    for chart, rows in zip(charts, (4, 2, 1), strict=True):
        assert opened.page.locator(f"section:has(#{chart.key}) tbody tr").count() == rows


def test_pictures_and_tables_of_every_chart(made: Path, tmp_path: Path) -> None:
    charts = write_report([made], made / "report.html")
    write_charts(charts, tmp_path / "figures")
    for chart in charts:
        with (tmp_path / "figures" / f"{chart.key}.csv").open() as file:
            read = list(csv.DictReader(file))
        assert len(read) == len(chart.rows)
        assert [line[next(iter(chart.rows[0]))] for line in read] == [
            str(one[next(iter(chart.rows[0]))]) for one in chart.rows
        ]
        if chart.spec is not None:
            assert (tmp_path / "figures" / f"{chart.key}.svg").read_text().startswith("<svg")
            assert (tmp_path / "figures" / f"{chart.key}.png").read_bytes()[:4] == b"\x89PNG"


def test_the_verdict_is_one_sentence(made: Path) -> None:
    said = verdict(read_run(RunDir(made), "one"))
    inside = "inside the original window perplexity fell by 5.0%"
    assert said == f"256 to 1,024 tokens: perplexity 19 (untouched 20); 50% of passkeys (50%); {inside}."
    run = RunDir(made)
    run.results.unlink()
    config = parse_config(read_yaml(run.resolved)).model_copy(update={"stages": ()})
    write_text(run.resolved, to_yaml(config))
    assert "nothing was measured at the target" in verdict(read_run(run, "one"))


def test_a_run_that_is_not_finished_says_so(made: Path) -> None:
    run = RunDir(made)
    shutil.rmtree(run.model)
    rows = run.read_results()
    run.results.unlink()
    run.add_results(one for one in rows if one.stage != "extended")
    write_json(run.parts, {"evaluate original": True, "evaluate interpolated": False, "train": False,
                           "evaluate extended": False})  # fmt: skip
    said = verdict(read_run(run, "one"))
    assert said == (
        "256 to 1,024 tokens, not finished: the new RoPE alone measured in part, 5 of 20 steps trained, "
        "the extended model not measured yet. The same command with --resume goes on."
    )
    write_report([made], made / "report.html")
    page = (made / "report.html").read_text(encoding="utf-8")
    assert re.search(r"5 of 20 steps at \S+, 1,280 tokens", page) and "50 seconds so far" in page


def test_a_run_that_has_just_begun_has_what_it_has(made: Path) -> None:
    run = RunDir(made)
    for file in (run.results, run.train_log, run.timings, run.plan, run.rope):
        file.unlink()
    shutil.rmtree(run.model)
    assert {chart.key for chart in charts_of([read_run(run, "one")])} == {"coverage", "rope", "window"}
    write_report([made], made / "report.html")


def test_what_the_charts_show_is_what_was_measured(made: Path) -> None:
    charts = {chart.key: chart for chart in charts_of([read_run(RunDir(made), "one")])}
    perplexity = {(line["model"], line["context"]): line["perplexity"] for line in charts["perplexity"].rows}
    assert perplexity["extended", 1024] == 19.0 and perplexity["untouched", 256] == 20.0
    rope = {(line["frequencies"], line["pair"]): line["wavelength"] for line in charts["rope"].rows}
    assert rope["before", 0] == pytest.approx(6.283185, rel=1e-6)
    positions = [line for line in charts["window"].rows if line["window"] == "one"]
    assert positions[0]["position"] == 0 and 256 <= max(line["position"] for line in positions) < 1024
    spaces = np.diff([line["token"] for line in positions])
    assert (spaces == spaces[0]).all()  # the picture has no gaps but those of the window
    assert json.dumps(charts["coverage"].spec)


def test_every_metric_of_a_task_is_a_line_of_its_own(made: Path) -> None:
    """ROUGE has three; they were drawn as one line. Losses and results without a length are in a table."""
    more = [replace(row("extended", "summarization", length, value), metric=metric)
            for length in (256, 1024) for metric, value in (("rouge1", 0.3), ("rougeL", 0.2))]  # fmt: skip
    more += [replace(row("extended", "longppl", 1024, value), metric=metric)
             for metric, value in (("perplexity", 9.0), ("bits_per_byte", 0.8))]  # fmt: skip
    more += [replace(row("extended", "perplexity", 1024, 0.9), metric="bits_per_byte")]
    more += [replace(row("extended", "harness/piqa", 1024, 0.6), context_length=None)]
    RunDir(made).add_results(more)
    charts = {chart.key: chart for chart in charts_of([read_run(RunDir(made), "one")])}
    assert {line["task"] for line in charts["suite"].rows} == {
        "ruler/vt", "summarization rouge1", "summarization rougeL"
    }  # fmt: skip
    assert {line["task"]: line["score"] for line in charts["others"].rows} == {
        "longppl perplexity": 9.0, "longppl bits_per_byte": 0.8, "perplexity bits_per_byte": 0.9, "harness/piqa": 0.6
    }  # fmt: skip


def test_the_plan_stands_beside_what_it_took(made: Path) -> None:
    charts = {chart.key: chart for chart in charts_of([read_run(RunDir(made), "one")])}
    pairs = {line["what"]: (line["planned"], line["measured"]) for line in charts["cost"].rows}
    assert pairs["tokens of training"] == (5120, 5 * 4 * 256)
    assert pairs["peak memory, GB"] == (0.8, 1.0)
    assert pairs["planned FLOPs per second that training took"] == (None, 4.8e11 / 40)
    assert {"tokens per second", "peak memory so far, GB"} <= {line["what"] for line in charts["training"].rows}


def test_a_base_that_is_no_config_has_its_frequencies_in_the_run(made: Path) -> None:
    """A `.gguf` file; the chart had no `before`."""
    write_json(RunDir(made).rope, {"before": [1.0, 0.5], "short": [1.0, 0.25], "long": [1.0, 0.25]})
    charts = {chart.key: chart for chart in charts_of([read_run(RunDir(made), "one")])}
    waves = {(line["frequencies"], line["pair"]): line["wavelength"] / math.pi for line in charts["rope"].rows}
    assert waves == pytest.approx({("before", 0): 2, ("before", 1): 4, ("after", 0): 2, ("after", 1): 8})


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run of skipwise extend"):
        write_report([tmp_path], tmp_path / "x.html")
    with pytest.raises(UserError, match=r"There is no run .*nowhere"):
        write_report([tmp_path / "nowhere"], tmp_path / "x.html")
    write_text(RunDir(tmp_path).models, "{}")
    with pytest.raises(UserError, match="is of skipwise evaluate"):
        write_report([tmp_path], tmp_path / "x.html")
