"""The operations page in a real Chromium, through a TCP port that leads to a Unix socket, as `ssh -L` makes it."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accessible import violations
from fronts import Door
from inprocess import WAIT_S, Live, live
from tools import needs

from streamd.addresses import parse_address
from streamd.daemon import listen
from streamd.mockllm import MockOptions

pytestmark = needs("chromium", "playwright")

ENDLESS = MockOptions(interval_s=0.1, ttft_s=0, tokens=1_000_000)
FAST_MS = {"X-Mock-Interval-Ms": "10"}


@pytest.fixture
def served() -> Iterator[Live]:
    with live(ENDLESS, drain_delay_s=60.0) as running:
        yield running


@pytest.fixture
def page_url(served: Live, tmp_path: Path) -> str:
    path = tmp_path / "admin.sock"
    sock = listen.bind(parse_address(f"unix:{path}"), mode=0o600)
    served.call(served.worker.listen([sock], "admin"))
    return served.in_front(Door(path)).url.replace("https:", "http:")


def read(served: Live, model: str, **fields: str) -> http.client.HTTPResponse:
    """A reader of a generation that doesn't end by itself. Its connection lives as long as the answer."""
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=WAIT_S)
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"} | fields)
    answer = connection.getresponse()
    assert answer.status == 200
    return answer


def rest_of(answer: http.client.HTTPResponse) -> bytes:
    """All that still comes; a stream that is broken off has no last chunk."""
    try:
        return answer.read()
    except http.client.IncompleteRead as broken:
        return broken.partial


def first_row(tab: Any, text: str) -> None:
    """Wait until the first row has this text."""
    tab.locator("#rows tr").first.filter(has_text=text).wait_for()


def cell(tab: Any, row: int, head: str) -> str:
    heads = tab.locator("#heads th").all_text_contents()
    return str(tab.locator("#rows tr").nth(row).locator("td").nth(heads.index(head)).text_content())


def test_rows_are_live_sorted_and_filtered(served: Live, page_url: str, tab: Any) -> None:
    readers = [read(served, "early"), read(served, "late", **FAST_MS)]
    tab.goto(page_url)
    tab.get_by_role("button", name="Tokens", exact=True).click()
    first_row(tab, "late")
    assert tab.locator("#heads th[aria-sort=descending]").all_text_contents() == ["Tokens"]
    before = int(cell(tab, 0, "Tokens").replace(",", ""))
    tab.wait_for_selector(f"#rows tr:first-child td:nth-child(8):not(:text-is('{before:,}'))")
    assert int(cell(tab, 0, "Tokens").replace(",", "")) > before
    tab.get_by_role("button", name="Age", exact=True).click()
    first_row(tab, "early")
    tab.get_by_label("Filter by").select_option("model")
    tab.get_by_label("Value of the filter").fill("late")
    tab.keyboard.press("Enter")
    first_row(tab, "late")
    tab.locator("#count").filter(has_text="1 of 1").wait_for()
    # The other tables, by the keyboard: the rows are those of the same moment.
    tab.get_by_role("tab", name="Streams", exact=True).press("ArrowRight")
    assert tab.get_by_role("tab", name="Readers").evaluate("tab => tab === document.activeElement")
    tab.locator("#count").filter(has_text="2 of 2").wait_for()
    assert cell(tab, 0, "Peer").startswith("127.0.0.1:") and cell(tab, 0, "Reader").startswith("r_")
    tab.get_by_role("tab", name="Upstreams").click()
    first_row(tab, "up")
    assert cell(tab, 0, "Requests") == "2"
    tab.get_by_role("tab", name="Keys").click()
    first_row(tab, "anonymous")
    figures = tab.locator("figure").all_text_contents()
    assert [name for name in ("Tokens/s", "Readers2", "Largest lag", "Memory") for each in figures if name in each]
    assert len(figures) == 4
    for each in readers:
        each.close()


def test_a_stream_and_a_reader_are_ended_after_a_confirmation(served: Live, page_url: str, tab: Any) -> None:
    doomed, other = read(served, "doomed"), read(served, "other")
    doomed_id = doomed.headers["X-Stream-Id"]
    tab.goto(page_url)
    end = tab.get_by_role("button", name=f"End stream {doomed_id}")
    end.click()
    assert tab.get_by_role("dialog").get_by_role("heading").text_content() == f"End stream {doomed_id}?"
    tab.get_by_role("button", name="Cancel").click()
    assert served.mock.stats.aborted == 0
    end.click()
    tab.get_by_role("button", name="End this stream").click()
    served.until(aborted=1)
    tab.locator("#done").filter(has_text="Ended: 1 stream,").wait_for()
    tab.mouse.move(0, 0)  # from here on nothing holds the rows: the focus that is back in them isn't a keyboard's
    tab.locator("#count").filter(has_text=re.compile("of 2$")).wait_for()
    assert b"stopped" in rest_of(doomed)
    tab.get_by_role("tab", name="Readers").click()
    tab.get_by_role("button", name="End reader").click()
    assert "may come back" in str(tab.locator("#confirm-text").text_content())
    tab.get_by_role("button", name="End this reader").click()
    tab.locator("#done").filter(has_text="1 reader,").wait_for()
    assert b"reconnect" in rest_of(other)


@pytest.mark.pages
def test_rows_stay_in_place_while_a_person_points_at_them(served: Live, page_url: str, tab: Any) -> None:
    first = read(served, "first")
    tab.goto(page_url)
    first_row(tab, "first")
    tab.locator("#rows tr").first.hover()
    second = read(served, "second")
    tab.locator("#count").filter(has_text="2 of 2; rows stay in place").wait_for()
    assert tab.locator("#rows tr").count() == 1
    tab.mouse.move(0, 0)
    tab.locator("#rows tr").nth(1).wait_for()
    for each in (first, second):
        each.close()


def test_a_drain_is_begun_after_a_confirmation_watched_and_taken_back(served: Live, page_url: str, tab: Any) -> None:
    tab.goto(page_url)
    tab.get_by_role("button", name="Drain …").click()
    tab.get_by_role("button", name="Drain", exact=True).click()
    tab.locator("#drain-state").filter(has_text="Draining for").wait_for()
    assert tab.get_by_role("button", name="End the drain now").is_visible()
    tab.get_by_role("button", name="Take the drain back").click()
    tab.locator("#drain-state").filter(has_text="Serving.").wait_for()
    assert served.worker.draining is None


def test_a_drain_that_another_operator_began_is_not_hurried(served: Live, page_url: str, tab: Any) -> None:
    tab.goto(page_url)
    tab.get_by_role("button", name="Drain …").click()
    tab.evaluate("() => fetch('/drain', {method: 'POST'}).then(() => null)")
    tab.locator("#drain-state").filter(has_text="Draining for").wait_for()
    tab.get_by_role("button", name="Drain", exact=True).click()
    tab.locator("#done").filter(has_text="nothing was done").wait_for()
    tab.get_by_role("button", name="Take the drain back").click()
    tab.locator("#drain-state").filter(has_text="Serving.").wait_for()


@pytest.mark.pages
def test_a_lost_daemon_is_told(served: Live, page_url: str, tab: Any) -> None:
    tab.goto(page_url)
    tab.locator("#connection[data-state=live]").wait_for()
    served.call(hang_up(served))
    tab.locator("#connection[data-state=failed]").wait_for()
    tab.locator("#connection[data-state=live]").wait_for()


async def hang_up(served: Live) -> None:
    """Lose all connections, without a word."""
    for client in tuple(served.worker.runtime.clients):
        client.transport.abort()


@pytest.mark.pages
@needs("axe")
def test_the_question_before_an_end_is_accessible(browser: Any, served: Live, page_url: str) -> None:
    reader = read(served, "m")

    def asking(page: Any) -> None:
        page.locator("#rows button").first.click()

    assert violations(browser, page_url, asking) == []
    reader.close()


@needs("axe")
def test_the_page_is_accessible_in_both_schemes_and_fits_a_phone(browser: Any, served: Live, page_url: str) -> None:
    reader = read(served, "m")

    def filled(page: Any) -> None:
        page.locator("#rows tr").first.wait_for()

    assert violations(browser, page_url, filled) == []
    reader.close()
