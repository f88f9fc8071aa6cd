"""`make screenshots`: the pictures of the pages in docs/screenshots, each of a page in use and of less than 150 KB."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests"), str(PROJECT / "tests" / "browser")]

from accessible import FLAGS, PHONE  # noqa: E402
from inprocess import live  # noqa: E402
from tools import TOOLS, missing  # noqa: E402

from streamd.mockllm import MockOptions  # noqa: E402

FOLDER = PROJECT / "docs" / "screenshots"
BYTES_MAX = 150_000
DESKTOP = {"width": 1000, "height": 720}


def draw(browser: Any, name: str, url: str, ready: Callable[[Any], None]) -> None:
    """Draw a page in both colour schemes, and as a phone shows it. `ready` brings it into the state to show."""
    for look, scheme, size in (("light", "light", DESKTOP), ("dark", "dark", DESKTOP), ("390px", "light", PHONE)):
        context = browser.new_context(color_scheme=scheme, viewport=size)
        page = context.new_page()
        page.goto(url)
        ready(page)
        file = FOLDER / f"{name}-{look}.png"
        page.screenshot(path=file)
        context.close()
        size_bytes = file.stat().st_size
        assert size_bytes < BYTES_MAX, f"{file.name} has {size_bytes} bytes"
        print(f"{file.relative_to(PROJECT)}: {size_bytes // 1024} KB")


def read_slowly(page: Any) -> None:
    """A chat that was reloaded, beside a slow reader that has caught up."""
    page.get_by_role("button", name="Send").click()
    page.locator("#talk .assistant .said").filter(has_text="This is mock-llm").wait_for()
    page.reload()
    page.get_by_label("Reading").select_option("none")
    page.get_by_role("button", name="Start").click()
    page.wait_for_timeout(10_000)  # the reader has to be slow for a time: there is no condition to wait for
    page.get_by_label("Reading").select_option("full")
    page.locator("#notes li").filter(has_text="holds the text of").first.wait_for()
    page.wait_for_timeout(1_000)


def main() -> int:
    """Draw all pictures."""
    from playwright.sync_api import sync_playwright

    if absent := missing(("chromium", "playwright")):
        print(f"missing: {', '.join(absent)}; make test-tools installs them", file=sys.stderr)
        return 1
    FOLDER.mkdir(exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=TOOLS["chromium"].path(), args=FLAGS)
        with live(MockOptions(ttft_s=0.1), demo=True) as served:
            draw(browser, "chat", served.url, read_slowly)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
