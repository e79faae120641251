"""The local page: what it shows in a browser, that it stays on this machine, what it says to wrong settings."""

import re
import shutil
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page, expect
from transformers import AutoModelForCausalLM

from skipwise import UserError
from skipwise.models.locate import model_location
from skipwise.runs.directory import RunDir
from skipwise.runs.record import read_run
from tests.processes import PATIENCE, command, free_port, started
from tests.report.runs import made_run

explore = pytest.importorskip("skipwise.report.explore")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the page is, with a run that can be asked."""
    run = made_run(tmp_path_factory.mktemp("explore") / "mine")
    written = AutoModelForCausalLM.from_pretrained(model_location("builtin:tiny"))
    torch.nn.init.zeros_(written.model.embed_tokens.weight)  # all logits are 0, and the first token is the best
    shutil.copytree(model_location("builtin:tiny"), run / "model", dirs_exist_ok=True)
    written.save_pretrained(run / "model")
    page = explore.build(read_run(RunDir(run), "mine"))
    _, address, _ = page.launch(server_name="127.0.0.1", quiet=True, theme=explore.THEME, prevent_thread_lock=True)
    yield address
    page.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The page, in a browser that notes what is asked of elsewhere and what fails."""
    context = browser.new_context(viewport={"width": 1300, "height": 900})
    page = context.new_page()
    page.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    elsewhere: list[str] = []
    errors: list[str] = []
    page.on(
        "request", lambda one: None if one.url.startswith((address, "data:", "blob:")) else elsewhere.append(one.url)
    )
    page.on("pageerror", lambda one: errors.append(str(one)))
    page.goto(address)
    yield page
    assert elsewhere == []
    assert errors == []
    context.close()


def test_settings_become_charts_costs_and_a_file(page: Page) -> None:
    page.get_by_label("Target window").fill("1k")
    page.get_by_role("button", name="Look").click()
    expect(page.locator("svg.marks, canvas.marks").first).to_be_visible()
    page.get_by_role("tab", name="YAML").click()
    expect(page.get_by_text("target: 1024")).to_be_visible()
    page.get_by_role("tab", name="Cost").click()
    expect(page.get_by_text("memory: peak").first).to_be_visible()
    page.get_by_label("TFLOP/s of a device").fill("100")
    page.get_by_label("Devices", exact=True).fill("8")
    page.get_by_role("button", name="Look").click()
    expect(page.get_by_text("seconds of a step").first).to_be_visible()
    page.get_by_role("tab", name="RoPE").click()
    expect(page.locator("svg.marks:visible, canvas.marks:visible").first).to_be_visible()


def test_what_is_set_while_an_answer_is_on_its_way_is_looked_at(page: Page) -> None:
    """The second click was forgotten."""
    page.get_by_role("tab", name="Cost").click()
    page.get_by_role("button", name="Look").click()
    page.get_by_label("TFLOP/s of a device").fill("100")
    page.get_by_role("button", name="Look").click()
    expect(page.get_by_text("seconds of a step").first).to_be_visible()


def test_a_wrong_setting_is_said_in_the_words_of_the_command(page: Page) -> None:
    page.get_by_label("Target window").fill("128")
    page.get_by_role("button", name="Look").click()
    expect(page.get_by_text("128").filter(has_text="window").last).to_be_visible()


def test_both_models_answer(page: Page) -> None:
    page.get_by_role("tab", name="Ask").click()
    page.get_by_label("A long text").fill("The pass key is 48213. Remember it. 48213 is the pass key.")
    page.get_by_label("and what comes after it").fill(" What is the pass key? The pass key is")
    page.get_by_role("button", name="Ask both").click()
    expect(page.get_by_label("untouched")).to_have_value(re.compile(r"\s*48213"))
    expect(page.get_by_label("extended")).to_have_value("")  # nothing but beginnings of texts
    page.get_by_role("button", name="An example").click()
    expect(page.get_by_label("A long text")).to_have_value(re.compile("The grass is green"))
    page.get_by_role("button", name="Ask both").click()
    expect(page.get_by_text(re.compile(r"7\d\d tokens; the original window has 256, the target 1,024"))).to_be_visible()


def test_the_command_serves_this_machine_alone(tmp_path: Path) -> None:
    """At a free port; other addresses of the machine do not answer."""
    with started(command, ["explore", "--port", str(free_port())], tmp_path / "printed") as server:
        server.wait_until(lambda: re.search(r"Open http://\S+.*\n", server.printed) is not None)
        address = re.search(r"http://127\.0\.0\.1:(\d+)", server.printed)
        assert address, server.printed
        with urllib.request.urlopen(f"http://127.0.0.1:{address[1]}", timeout=PATIENCE) as answer:
            assert b"Skipwise" in answer.read()
        with socket.socket() as knock:  # this machine as well, but not what it listens at
            assert knock.connect_ex(("127.0.0.2", int(address[1]))) != 0


def test_what_is_missing_or_too_much_is_said() -> None:
    with pytest.raises(UserError, match="one of them is empty"):
        explore.planned("builtin:tiny", "2k", "", "pose", 2, "yarn", None)
    with pytest.raises(UserError, match="up to 1,048,576 tokens"):
        explore.planned("builtin:tiny", "8M", "", "pose", 2, "yarn", 10)


def test_a_run_without_a_model_is_refused(tmp_path: Path) -> None:
    run = made_run(tmp_path / "mine")
    shutil.rmtree(run / "model", ignore_errors=True)
    with pytest.raises(UserError, match="has none yet"):
        explore.serve(run, "127.0.0.1", None, print)
