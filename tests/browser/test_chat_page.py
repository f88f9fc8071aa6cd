"""The chat page of `streamd demo` in a real Chromium. Skipped where there is no browser or no playwright."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from accessible import violations
from inprocess import Live, live
from tools import needs

from streamd.mockllm import MockOptions

pytestmark = needs("chromium", "playwright")

SLOW = MockOptions(interval_s=0.02, ttft_s=0, tokens=80)
ENDLESS = MockOptions(interval_s=0.02, ttft_s=0, tokens=1_000_000)
SOON = {"retry_min_s": 0.01, "retry_max_s": 0.05}  # a browser waits as long as `retry:` says


@pytest.fixture
def endless() -> Iterator[Live]:
    with live(ENDLESS, demo=True, **SOON) as served:
        yield served


def ask(tab: Any, prompt: str = "Tell me about streams.") -> None:
    tab.get_by_label("Prompt").fill(prompt)
    tab.get_by_role("button", name="Send").click()


def wait_for_state(tab: Any, state: str, status: str = "status") -> None:
    tab.wait_for_selector(f"#{status}[data-state={state}]")


def wait_for_answer(tab: Any, text: str = "This is mock-llm") -> None:
    tab.locator("#talk .assistant .said").filter(has_text=text).last.wait_for()


def answer_in(tab: Any) -> str:
    return str(tab.locator("#talk .assistant .said").last.text_content())


def test_an_answer_survives_a_reload_and_a_lost_connection_and_is_read_in_a_second_tab(tab: Any) -> None:
    with live(SLOW, demo=True, **SOON) as served:
        front = served.relay()
        tab.goto(front.url)
        ask(tab)
        wait_for_answer(tab)
        tab.reload()
        wait_for_state(tab, "streaming")
        tab.get_by_role("button", name="Lose the connection").click()
        second = tab.context.new_page()
        second.goto(front.url + str(tab.get_by_role("link", name="second tab").get_attribute("href")))
        for each in (tab, second):
            wait_for_state(each, "finished")
            assert answer_in(each) == served.said("Tell me about streams.")
        assert "2 lost connections made good" in str(tab.locator("#status").text_content())
        asked = b"".join(map(bytes, front.up))
        assert asked.count(b"Last-Event-ID: s_") + asked.count(b"last-event-id: s_") >= 2
        assert served.generations() == 1
        # The conversation is there after another reload, and goes on with what was said.
        tab.reload()
        assert tab.locator("#talk li").count() == 2 and answer_in(tab) == served.said("Tell me about streams.")
        ask(tab, "And rivers?")
        wait_for_state(tab, "finished")
        bodies = [json.loads(seen.body) for seen in served.mock.stats.seen if seen.body]
        assert [message["role"] for message in bodies[-1]["messages"]] == ["user", "assistant", "user"]


def test_stop_ends_the_answer_in_both_tabs(tab: Any, endless: Live) -> None:
    tab.goto(endless.url)
    ask(tab)
    wait_for_answer(tab)
    second = tab.context.new_page()
    second.goto(endless.url + str(tab.get_by_role("link", name="second tab").get_attribute("href")))
    wait_for_answer(second)
    tab.get_by_role("button", name="Stop", exact=True).click()
    endless.until(aborted=1, open=0)
    wait_for_state(tab, "stopped")
    wait_for_state(second, "failed")
    assert "stopped" in str(second.locator("#status").text_content())


@pytest.mark.pages
def test_events_are_shown_as_they_come_until_the_list_is_held(tab: Any) -> None:
    with live(SLOW, demo=True) as served:
        tab.goto(served.url)
        ask(tab)
        wait_for_state(tab, "finished")
        shown = tab.locator("#events li").all_text_contents()
        ids = [event.splitlines()[0].removeprefix("id: ") for event in shown]
        assert [int(each.rpartition(":")[2]) for each in ids] == list(range(1, len(ids) + 1))
        assert shown[0].splitlines()[1].startswith('data: {"id":"chatcmpl-') and shown[-1].endswith("data: [DONE]")
        tab.get_by_label("Hold the list").check()
        ask(tab, "More.")
        tab.locator("#talk li").nth(3).wait_for()
        wait_for_state(tab, "finished")
        assert tab.locator("#events li").count() == len(shown)


@needs("axe")
def test_the_page_is_accessible_in_both_schemes_and_fits_a_phone(browser: Any) -> None:
    with live(demo=True) as served:

        def answered(page: Any) -> None:
            ask(page)
            wait_for_state(page, "finished")

        assert violations(browser, served.url, answered) == []


# Longer: a browser keeps some MB of a stream before its socket is slow.


def state_of_stream(served: Live, tab: Any) -> Any:
    stream_id = str(tab.locator("#slow-status").text_content()).removeprefix("Reading ")
    request = urllib.request.Request(f"{served.url}/v1/streams/{stream_id}", headers={"Accept": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


@pytest.mark.pages
@pytest.mark.parametrize(
    ("policy", "noted"),
    [("coalesce", "holds the text of"), ("drop_oldest", "are missing"), ("close", "the reader comes back there")],
)
def test_a_slow_reader_gets_what_its_policy_says(tab: Any, policy: str, noted: str) -> None:
    with live(demo=True, **SOON) as served:
        tab.goto(served.url)
        tab.get_by_label("Policy").select_option(policy)
        tab.get_by_label("Reading").select_option("none")
        tab.get_by_role("button", name="Start").click()
        wait_for_state(tab, "streaming", "slow-status")
        while not lags(state := state_of_stream(served, tab)):
            assert state["state"] != "sealed", "the stream was too short for this browser's buffers"
            tab.wait_for_timeout(100)
        tab.get_by_label("Reading").select_option("full")
        tab.locator("#notes li").filter(has_text=noted).first.wait_for()
        tab.get_by_role("button", name="Stop reader").click()
        served.until(open=0)
        wait_for_state(tab, "stopped", "slow-status")


def lags(state: Any) -> bool:
    """Whether streamd has noticed the slow reader; under `close` it has left."""
    return state["lag_max"] > 1000 or state["dropped_events"] > 0 or state["subscribers"] == 0
