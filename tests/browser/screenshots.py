"""`make screenshots`: the pictures of the pages in docs/screenshots, each of a page in use and of less than 150 KB."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests"), str(PROJECT / "tests" / "browser")]

from accessible import FLAGS, PHONE  # noqa: E402
from inprocess import Live, live  # noqa: E402
from served import upstream  # noqa: E402
from tools import TOOLS, missing  # noqa: E402

from streamd.addresses import parse_address  # noqa: E402
from streamd.config import UpstreamSettings  # noqa: E402
from streamd.daemon import listen  # noqa: E402
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
        page.evaluate("window.scrollTo(0, 0)")
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


def answering(served: Live, number: int, tokens: int) -> http.client.HTTPResponse:
    """A generation of one of five keys. Its reader takes nothing beyond what a small receive buffer holds."""
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"))
    connection.sock = socket.socket()
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
    connection.sock.connect((connection.host, connection.port))
    model = ("llama-3.3-70b", "qwen3-32b", "gemma-3-27b")[number % 3]
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": f"Story {number}"}]}
    fields = {"X-Mock-Tokens": str(tokens), "X-Mock-Interval-Ms": str(20 + 7 * (number % 6))}
    fields["Authorization"] = f"Bearer team-{number % 5}"
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"} | fields)
    return connection.getresponse()


def read_on(answer: http.client.HTTPResponse) -> None:
    """Read to the end, which streamd's own end may break off."""
    with contextlib.suppress(http.client.IncompleteRead, OSError):
        answer.read()


def loaded(served: Live) -> None:
    """Thirty generations, one after the other. Every sixth reader is slow, the others read as it comes."""
    for number in range(30):
        answer = answering(served, number, 2000 if number % 3 else 300)
        if number % 6:
            threading.Thread(target=read_on, args=(answer,), daemon=True).start()
        else:
            SLOW.append(answer)


SLOW: list[http.client.HTTPResponse] = []  # kept: a connection that nothing refers to is closed


def look_at_readers(page: Any) -> None:
    """The readers, the slowest first."""
    page.get_by_role("tab", name="Readers").click()
    page.locator("#rows tr").first.wait_for()
    page.wait_for_timeout(12_000)  # the curves need time


def draw_operations(browser: Any) -> None:
    """The operations page of a daemon with three upstreams, of which one is gone."""
    with socket.socket() as gone, upstream() as one, upstream() as two:
        gone.bind(("127.0.0.1", 0))  # without listening: every connection is refused
        urls = (one, two, f"http://127.0.0.1:{gone.getsockname()[1]}")
        upstreams = tuple(UpstreamSettings(name=f"gpu{k}", url=url) for k, url in enumerate(urls, 1))
        with live(MockOptions(), upstreams=upstreams, stall_timeout_s=600.0) as served:
            sock = listen.bind(parse_address("127.0.0.1:0"))
            served.call(served.worker.listen([sock], "admin"))
            loaded(served)
            draw(browser, "operations", f"http://127.0.0.1:{sock.getsockname()[1]}", look_at_readers)


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
        draw_operations(browser)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
