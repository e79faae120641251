"""Pictures of report and explorer for the README: `python scripts/screenshots.py runs/demo docs/images`.

Needs Debian's chromium.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from skipwise.report.explore import THEME, build
from skipwise.report.page import write_report

# Of the page, in pixels: the summary, the first chart and the second.
WIDTH, HEIGHT = 1000, 1450


def main() -> None:
    """Draw the report of a run, in both colours, and the page of `skipwise explore`; take the beginning of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        page_file = Path(directory) / "report.html"
        write_report([arguments.run], page_file)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)
            page.goto(page_file.as_uri())
            page.wait_for_selector("body[data-drawn=yes]")
            page.screenshot(path=arguments.output / f"report-{scheme}.png")
        explorer = build(None)
        _, address, _ = explorer.launch(server_name="127.0.0.1", quiet=True, theme=THEME, prevent_thread_lock=True)
        page = browser.new_page(viewport={"width": 1200, "height": 860})
        page.goto(address)
        page.get_by_role("tab", name="Distances").click()
        page.wait_for_selector("svg.marks:visible, canvas.marks:visible")
        page.screenshot(path=arguments.output / "explore.png")
        explorer.close()
        browser.close()


if __name__ == "__main__":
    main()
