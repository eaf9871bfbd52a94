"""Takes the pictures of the playground under docs/: a real answer of a running server (`make serve`), in Chromium."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import BrowserType, Page, sync_playwright

DOCS = Path(__file__).parents[1] / "docs"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium(kind: BrowserType) -> str | None:
    """The path of an installed Chromium: the system's, or one that `playwright install` brought."""
    return next(filter(None, map(shutil.which, NAMES)), None) or (
        kind.executable_path if Path(kind.executable_path).exists() else None
    )


def ask(page: Page, question: str, *, max_tokens: int) -> None:
    """Asks the question about the example document."""
    page.get_by_role("button", name="Example").click()
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_text("Settings").click()
    page.get_by_label("Longest answer").fill(str(max_tokens))
    page.get_by_text("Settings").click()
    page.get_by_role("button", name="Ask").click()
    page.locator("#ask:enabled").wait_for(timeout=300_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--question", default="How does the station get its electricity?")
    parser.add_argument("--max-tokens", type=int, default=48)
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        path = chromium(playwright.chromium)
        if path is None:
            raise SystemExit("no Chromium is installed: apt-get install chromium, or playwright install chromium")
        browser = playwright.chromium.launch(executable_path=path)
        page = browser.new_page(viewport={"width": 1280, "height": 960})
        page.goto(arguments.url)
        ask(page, arguments.question, max_tokens=arguments.max_tokens)
        page.locator("body").click(position={"x": 2, "y": 2})
        page.screenshot(path=DOCS / "playground.png")
        page.emulate_media(color_scheme="dark")
        page.screenshot(path=DOCS / "playground-dark.png")
        page.emulate_media(color_scheme="light")
        page.set_viewport_size({"width": 360, "height": 780})
        page.get_by_role("article").scroll_into_view_if_needed()
        page.screenshot(path=DOCS / "playground-narrow.png", full_page=True)
        page.set_viewport_size({"width": 1280, "height": 960})
        page.get_by_role("checkbox", name="Compare with").check()
        page.get_by_role("button", name="Ask").click()
        page.locator("#ask:enabled").wait_for(timeout=300_000)
        page.screenshot(path=DOCS / "playground-compare.png")
        browser.close()


if __name__ == "__main__":
    main()
