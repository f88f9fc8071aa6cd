"""The example page, and EventSource itself, in a real Chromium. Skipped where there is no browser or no playwright."""

from __future__ import annotations

import http.server
import json
import re
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fronts import FRONTS, Door, running
from inprocess import Live, live
from page_server import EXAMPLES, PageServer
from tools import needs

from streamd.mockllm import MockOptions

pytestmark = needs("chromium", "playwright")

PROMPT = "Tell me about streams."  # the page's initial prompt
SLOW = MockOptions(interval_s=0.02, ttft_s=0, tokens=80)
ENDLESS = MockOptions(interval_s=0.02, ttft_s=0, tokens=1_000_000)
SOON = {"retry_min_s": 0.01, "retry_max_s": 0.05}  # a browser waits as long as `retry:` says


def page_of(served: Live, cut_after: Callable[[int], int | None] = lambda number: None) -> PageServer:
    return served.in_front(PageServer(served.url, cut_after))


def wait_for_state(tab: Any, state: str, status: str = "status") -> None:
    tab.wait_for_selector(f"#{status}[data-state={state}]")


def wait_for_text(tab: Any, chars: int, text: str = "answer") -> None:
    tab.wait_for_function(f"document.getElementById('{text}').textContent.length >= {chars}")


def text_in(tab: Any, text: str = "answer") -> str:
    return str(tab.locator(f"#{text}").text_content())


# The page


def test_tokens_arrive_and_the_text_is_whole(tab: Any) -> None:
    with live(SLOW) as served:
        tab.goto(page_of(served).url)
        tab.get_by_label("Prompt").fill("Tell me about rivers.")
        tab.get_by_role("button", name="Send").click()
        wait_for_text(tab, 20)
        assert tab.locator("#status").get_attribute("data-state") == "streaming"
        wait_for_state(tab, "finished")
        assert text_in(tab) == served.said("Tell me about rivers.")
        assert served.generations() == 1
        assert tab.get_by_role("button", name="Stop").is_disabled()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
def test_the_page_reads_completions_and_responses(tab: Any, path: str) -> None:
    with live() as served:
        tab.goto(page_of(served).url)
        tab.get_by_text("Server, model and key").click()
        tab.get_by_label("API", exact=True).select_option(path)
        tab.get_by_role("button", name="Send").click()
        wait_for_state(tab, "finished")
        assert text_in(tab).startswith("This is mock-llm speaking")


def test_a_wrong_address_is_said_and_not_tried_for_ever(tab: Any) -> None:
    with socket.socket() as closed, live() as served:
        closed.bind(("127.0.0.1", 0))  # without listening: nothing else gets the port
        wrong = f"http://127.0.0.1:{closed.getsockname()[1]}"
        tab.goto(f"{page_of(served).url}/?server={wrong}&watch=s_x")
        tab.get_by_role("button", name="Send").click()
        for status in ("status", "watch-status"):
            wait_for_state(tab, "failed", status)
            assert f"Nothing answers at {wrong}" in text_in(tab, status)


def test_stop_ends_the_generation(tab: Any) -> None:
    with live(ENDLESS) as served:
        front = page_of(served)
        tab.goto(front.url)
        tab.get_by_role("button", name="Send").click()
        wait_for_text(tab, 20)
        tab.get_by_role("button", name="Stop").click()
        served.until(aborted=1, open=0)
        wait_for_state(tab, "stopped")
        assert front.asked("DELETE /v1/streams/s_") == 1


def test_a_lost_connection_resumes_exactly(tab: Any) -> None:
    """The connection is cut before the head, in the head, and repeatedly at odd places of the body."""
    limits = {0: 2000, 1: 0, 2: 100, 3: 640, 4: 700, 5: 560, 6: 690}  # bytes of each connection; a head is 350
    with live(SLOW, **SOON) as served:
        front = page_of(served, limits.get)
        tab.goto(front.url)
        tab.get_by_role("button", name="Send").click()
        wait_for_state(tab, "finished")
        assert text_in(tab) == served.said(PROMPT)
        assert [len(front.down[number]) for number in limits] == list(limits.values())
        assert served.generations() == 1


def test_a_connection_dropped_by_hand_comes_back(tab: Any) -> None:
    with live(SLOW, **SOON) as served:
        front = page_of(served)
        tab.goto(front.url)
        tab.get_by_role("button", name="Send").click()
        wait_for_text(tab, 20)
        tab.get_by_role("button", name="Lose the connection").click()
        wait_for_state(tab, "finished")
        assert text_in(tab) == served.said(PROMPT)
        assert front.asked("GET /v1/streams/s_") >= 1 and served.generations() == 1
        assert "1 lost connection made good" in text_in(tab, "status")


def test_a_204_finishes_a_stream_without_done(tab: Any) -> None:
    with live(**SOON) as served:
        served.fault("no-done")
        front = page_of(served)
        tab.goto(front.url)
        tab.get_by_role("button", name="Send").click()
        wait_for_state(tab, "finished")
        assert text_in(tab) == served.said(PROMPT) and last_status(front) == 204


def test_an_error_is_shown(tab: Any) -> None:
    with live() as served:
        served.fault("status=400")
        tab.goto(page_of(served).url)
        tab.get_by_role("button", name="Send").click()
        wait_for_state(tab, "failed")
        assert "mock-llm was told to answer 400" in text_in(tab, "status")


def test_a_truncation_is_shown_after_the_received_text(tab: Any) -> None:
    with live() as served:
        whole = served.said(PROMPT)
        served.fault("break-fin=7")
        tab.goto(page_of(served).url)
        tab.get_by_role("button", name="Send").click()
        wait_for_state(tab, "failed")
        assert 0 < len(text_in(tab)) < len(whole) and whole.startswith(text_in(tab))


def test_another_device_can_watch_a_generation(tab: Any, browser: Any) -> None:
    with live(SLOW, **SOON) as served:
        front = page_of(served)
        tab.goto(front.url)
        tab.get_by_role("button", name="Send").click()
        wait_for_text(tab, 20)
        other = browser.new_context().new_page()
        other.goto(tab.locator("#watch-link").get_attribute("href"))
        wait_for_state(other, "finished", "watch-status")
        wait_for_state(tab, "finished")
        assert text_in(other, "watched") == text_in(tab) == served.said(PROMPT)
        assert served.generations() == 1
        other.context.close()


def test_stop_ends_the_watching_device_too(tab: Any, browser: Any) -> None:
    with live(ENDLESS, **SOON) as served:
        tab.goto(page_of(served).url)
        tab.get_by_role("button", name="Send").click()
        wait_for_text(tab, 20)
        other = browser.new_context().new_page()
        other.goto(tab.locator("#watch-link").get_attribute("href"))
        wait_for_text(other, 20, "watched")
        tab.get_by_role("button", name="Stop").click()
        wait_for_state(other, "failed", "watch-status")
        assert "stopped" in text_in(other, "watch-status")
        other.context.close()


# From another origin


@pytest.fixture
def origin() -> Iterator[str]:
    """The page from a web server without streamd: `python -m http.server --directory examples`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FilesOfThePage) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class FilesOfThePage(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args, directory=str(EXAMPLES))

    def log_message(self, *args: Any) -> None:
        """Log nothing."""


def test_the_page_works_fully_from_an_allowed_origin(tab: Any, origin: str) -> None:
    """Preflights for every header that the page sets, and the headers that it reads: resume, stop, watch."""
    with live(SLOW, **SOON, cors_origins=(origin,)) as served:
        tab.goto(f"{origin}/?server={served.url}")
        tab.get_by_label("API key").fill("sk-anything")
        tab.get_by_role("button", name="Send").click()
        wait_for_text(tab, 20)
        tab.get_by_label("Stream id").fill(str(tab.locator("#watch-link").text_content()).partition("watch=")[2][:29])
        tab.get_by_role("button", name="Watch").click()
        tab.get_by_role("button", name="Lose the connection").click()
        wait_for_state(tab, "finished")
        wait_for_state(tab, "finished", "watch-status")
        assert text_in(tab) == text_in(tab, "watched") == served.said(PROMPT)
        assert "1 lost connection made good" in text_in(tab, "status")
        served.fault("", tokens=1_000_000)
        tab.get_by_role("button", name="Send").click()
        wait_for_text(tab, 20)
        tab.get_by_role("button", name="Stop").click()
        served.until(aborted=1)
        wait_for_state(tab, "stopped")


def test_a_page_of_another_origin_cannot_read_answers(tab: Any, origin: str) -> None:
    with live(cors_origins=("https://chat.example.com",)) as served:
        tab.goto(origin)
        asked = f"fetch('{served.url}/v1/models').then(() => 'read', () => 'refused')"
        assert tab.evaluate(asked) == "refused"


# HTTP/2

WATCH_ALL = """
(ids) => Promise.all(ids.map((id) => new Promise((resolve) => {
  new EventSource(`/v1/streams/${id}`).onmessage = () => resolve(id);
})))
"""


@needs("nginx", "openssl")
def test_over_http2_more_than_six_streams_run_at_once(browser: Any) -> None:
    """Over HTTP/1.1 a browser opens six connections to a server, and a seventh stream would wait forever."""
    with live() as served, tempfile.TemporaryDirectory(prefix="front-") as folder:
        served.fault("stall=5")
        ids = [start(served.url, keep_s=60) for _ in range(10)]
        with running(FRONTS["nginx"], served.url, Path(folder)) as socket:
            door = served.in_front(Door(socket))
            context = browser.new_context(ignore_https_errors=True)
            page = context.new_page()
            page.goto(door.url)
            assert page.get_by_role("button", name="Send").is_enabled()
            assert page.evaluate(WATCH_ALL, ids) == ids
            protocols = "performance.getEntriesByType('navigation').map((entry) => entry.nextHopProtocol)"
            assert page.evaluate(protocols) == ["h2"]
            context.close()


# EventSource by itself

READ_ALL = """
(url) => new Promise((resolve) => {
  const events = [], source = new EventSource(url);
  let opened = 0;
  source.onopen = () => { opened += 1; };
  source.onmessage = (event) => events.push([event.lastEventId, event.data]);
  source.onerror = () => {
    if (source.readyState === EventSource.CLOSED) resolve({events, opened});
  };
})
"""


def test_an_event_source_that_is_cut_off_has_no_hole_and_stops_at_the_end(tab: Any) -> None:
    cuts = {number: 600 + 23 * number for number in range(1, 8)}  # a head and an event, or less
    with live(SLOW, **SOON, detach_grace_s=60) as served:
        front = page_of(served, cuts.get)
        tab.goto(f"{front.url}/page.css")  # any page of that origin
        stream_id = start(front.url)
        read = tab.evaluate(READ_ALL, f"/v1/streams/{stream_id}")
        bodies = [json.loads(data) for _, data in read["events"] if data != "[DONE]"]
        text = "".join(choice["delta"].get("content") or "" for body in bodies for choice in body["choices"])
        assert text == served.said(PROMPT)
        assert read["events"][-1][1] == "[DONE]"
        # Each event once and in order; an event of several texts has the id of the last.
        seqs = [int(last_id.rpartition(":")[2]) for last_id, _ in read["events"]]
        assert seqs == sorted(set(seqs)) and {last_id.rpartition(":")[0] for last_id, _ in read["events"]} == {
            stream_id
        }
        # Cut off seven times, resumed each time from the id before, ended by 204: CLOSED never asks again.
        assert read["opened"] >= 8
        assert front.asked(f"GET /v1/streams/{stream_id}") == read["opened"] + 1
        assert last_status(front) == 204
        assert resumed_from(front, stream_id) == sorted(resumed_from(front, stream_id))
        assert served.generations() == 1


def start(url: str, keep_s: int = 0) -> str:
    """Begin a generation, leave it to its readers (for `keep_s`, if given), and return its id."""
    body = json.dumps({"model": "m", "stream": True, "messages": [{"role": "user", "content": PROMPT}]})
    headers = {"Content-Type": "application/json"} | ({"X-Stream-Detach-Grace": str(keep_s)} if keep_s else {})
    request = urllib.request.Request(f"{url}/v1/chat/completions", body.encode(), headers)
    with urllib.request.urlopen(request) as response:
        return str(response.headers["x-stream-id"])


def last_status(front: PageServer) -> int:
    """The status of the last answer on the last connection."""
    return int(re.findall(rb"HTTP/1\.1 (\d{3}) ", bytes(front.down[-1]))[-1])


def resumed_from(front: PageServer, stream_id: str) -> list[int]:
    """The seqs that the browser sent as Last-Event-ID, in order."""
    found = re.findall(rb"(?i)last-event-id: %b:(\d+)" % stream_id.encode(), b"".join(map(bytes, front.up)))
    return list(map(int, found))


def test_an_event_source_on_a_truncated_stream_gets_the_error_once(tab: Any) -> None:
    with live(**SOON) as served:
        served.fault("break-fin=5")
        front = page_of(served)
        tab.goto(f"{front.url}/page.css")
        read = tab.evaluate(READ_ALL, f"/v1/streams/{start(front.url)}")
        errors = [data for _, data in read["events"] if "error" in json.loads(data)]
        assert len(errors) == 1 and errors == [read["events"][-1][1]]
        assert last_status(front) == 204
