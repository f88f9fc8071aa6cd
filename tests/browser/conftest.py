"""A Chromium for all tests of a file, and a tab of it for each test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from accessible import FLAGS
from inprocess import WAIT_S
from tools import TOOLS


# Why no longer than a file: it keeps an event loop running in this thread, and other tests run loops of their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=TOOLS["chromium"].path(), args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """An empty tab. At the end nothing was thrown in its page, and the page has not broken its own policy (CSP)."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(WAIT_S * 1000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if "Security Policy" in line.text else None)
    yield page
    context.close()
    assert wrong == []
