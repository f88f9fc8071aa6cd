"""Outages: the verdicts on servers from all workers' evidence, and the lines that tell of an outage exactly once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.config import UpstreamSettings
from streamd.daemon import logs
from streamd.daemon.outages import NAMES_SHOWN_MAX, OUT_LINE_EVERY_S, OUT_LINES_MAX, Outages
from streamd.server_state import ServerState, ServerView

UP, FAILING, OUT, PROBING = ServerState
LEVELS = {logs.INFO: "info", logs.WARNING: "warning", logs.ERROR: "error"}


def server(name: str, *models: str, **more: Any) -> UpstreamSettings:
    return UpstreamSettings(name=name, url=f"http://{name}.test:1", models=models or ("*",), **more)


def out(at: float, failures: int = 1, error: str = "Connection refused") -> ServerView:
    return ServerView(OUT, at, at, failures, "upstream_connect", error)


def up(at: float = 0.0, *listed: str) -> ServerView:
    return ServerView(UP, at, listed=listed)


class Told:
    """Outages whose log lines are kept."""

    def __init__(self, *upstreams: UpstreamSettings) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []
        self.outages = Outages(upstreams, 0.0, self._tell)

    def _tell(self, level: int, name: str, /, **fields: Any) -> None:
        self.lines.append((LEVELS[level], name, {key: value for key, value in fields.items() if value is not None}))

    def report(self, slot: int, view: ServerView, now: float, name: str = "gpu1") -> None:
        self.outages.report(slot, name, view, now)

    @property
    def events(self) -> list[tuple[str, str]]:
        return [line[:2] for line in self.lines]

    def verdict(self, name: str = "gpu1") -> ServerView:
        return dict(self.outages.verdicts())[name]


def test_a_dead_server_is_told_once_however_many_workers_find_it_dead() -> None:
    told = Told(server("gpu1"), server("gpu2"))
    for slot in range(8):
        told.report(slot, out(10.0 + slot, slot + 1), 10.0 + slot)
        told.report(slot, out(10.0 + slot)._replace(state=PROBING), 20.0 + slot)
    told.outages.tick(500.0)
    fields = {"upstream": "gpu1", "reason": "upstream_connect", "error": "Connection refused", "failures": 1}
    assert told.lines == [("warning", "upstream out", fields)]
    assert told.verdict().state is PROBING and told.verdict().since == 10.0
    assert told.verdict().failures == 8, "each worker's last report had 1"
    assert told.outages.summary() == "1 of 2 upstreams out: gpu1"
    assert told.verdict("gpu2") == ServerView()


def test_an_answer_in_any_worker_brings_a_server_back_although_another_still_leaves_it_out() -> None:
    told = Told(server("gpu1"), server("gpu2"))
    told.report(0, out(10.0), 10.0)
    told.report(1, up(12.0), 12.1)
    assert told.events == [("warning", "upstream out"), ("info", "upstream back")]
    assert told.lines[1][2] == {"upstream": "gpu1", "last_error": "Connection refused"}
    told.report(0, out(10.0)._replace(state=PROBING), 13.0)  # older evidence
    assert told.verdict()[:4] == (UP, 12.0, 12.0, 0) and told.outages.summary() == ""
    assert len(told.lines) == 2


def test_failures_that_an_answer_has_refuted_count_no_more() -> None:
    told = Told(server("gpu1"), server("gpu2"))
    told.report(0, out(10.0, 3), 10.0)
    told.report(1, up(12.0), 12.0)
    told.report(2, out(14.0, 1), 14.0)
    assert told.verdict().failures == 1, "the three are older than the answer"
    told.report(3, out(15.0, 2), 15.0)
    assert told.verdict().failures == 3


def test_the_version_grows_with_each_change_of_a_verdict_and_with_nothing_else() -> None:
    told = Told(server("gpu1"), server("gpu2"))
    versions = [told.outages.version]
    for slot, view in ((0, out(10.0)), (0, out(10.0)), (1, up(12.0)), (2, up(11.0))):
        told.report(slot, view, 20.0)
        versions.append(told.outages.version)
    told.outages.tick(500.0)
    first = versions[0]
    assert [*versions, told.outages.version] == [first, first + 1, first + 1, first + 2, first + 2, first + 2]


def test_a_failing_server_is_up_for_the_log() -> None:
    told = Told(server("gpu1"))
    told.report(0, ServerView(FAILING, 5.0, 4.0, 2, "upstream_refused", "status 500"), 5.0)
    assert told.lines == [] and told.outages.summary() == ""
    assert told.verdict()[:5] == (FAILING, 5.0, 4.0, 2, "upstream_refused")


def test_the_evidence_of_a_worker_that_has_ended_stays_and_its_time_out_does_not() -> None:
    told = Told(server("gpu1"))
    told.report(1, out(10.0), 10.0)
    told.outages.worker_gone(1, 11.0)
    assert told.verdict().state is PROBING and len(told.lines) == 2
    told.outages.worker_gone(0, 11.0)
    told.report(1, up(12.0), 12.0)  # its successor
    assert told.verdict().state is UP


@pytest.mark.parametrize(
    ("upstreams", "dead", "lost"),
    [
        ((server("gpu1"),), ["gpu1"], ("*",)),
        ((server("gpu1"), server("gpu2")), ["gpu1"], None),
        ((server("gpu1"), server("gpu2")), ["gpu1", "gpu2"], ("*",)),
        ((server("gpu1", "big"), server("gpu2")), ["gpu1"], ("big",)),
        ((server("gpu1", "big", "small"), server("gpu2", "small")), ["gpu1"], ("big",)),
        ((server("gpu1", "big", aliases={"fast": "big"}), server("gpu2", "small")), ["gpu1"], ("big", "fast")),
        ((server("gpu1", "big"), server("gpu2")), ["gpu2"], ("*",)),
    ],
)
def test_models_without_a_server_are_an_error(
    upstreams: tuple[UpstreamSettings, ...], dead: list[str], lost: tuple[str, ...] | None
) -> None:
    told = Told(*upstreams)
    for k, name in enumerate(dead):
        told.report(0, out(10.0 + k), 10.0 + k, name)
    errors = [fields for level, _, fields in told.lines if level == "error"]
    assert errors == ([{"models": lost, "upstreams": tuple(dead)}] if lost else [])
    told.report(1, up(20.0), 20.0, dead[-1])
    assert told.events[-1] == (("info", "models served again") if lost else ("info", "upstream back"))
    assert told.events.count(("error", "no upstream left")) == len(errors)


def test_a_listed_model_is_lost_with_the_servers_that_list_it() -> None:
    told = Told(server("gpu1"), server("gpu2"))
    told.report(0, up(1.0, "llama", "qwen"), 1.0, "gpu1")
    told.report(0, up(1.0, "qwen"), 1.0, "gpu2")
    told.report(1, out(10.0), 10.0, "gpu1")  # a worker that knows no list yet
    assert told.lines[-1] == ("error", "no upstream left", {"models": ("llama",), "upstreams": ("gpu1",)})
    told.report(1, out(11.0), 11.0, "gpu2")
    assert told.lines[-1][2]["models"] == ("*", "qwen")


def test_a_server_that_comes_and_goes_has_a_bounded_number_of_lines_and_the_last_is_true() -> None:
    told = Told(server("gpu1"), server("gpu2"))
    now, hours = 0.0, 1
    while now < hours * 3600:
        told.report(0, out(now), now)
        now += 0.5
        told.report(0, up(now), now)
        now += 0.5
    outs = [fields for _, name, fields in told.lines if name == "upstream out"]
    assert OUT_LINES_MAX < len(outs) <= OUT_LINES_MAX + hours * 3600 / OUT_LINE_EVERY_S
    told_of = sum(fields.get("outages", 1) for fields in outs)
    assert told_of > 0.95 * hours * 3600 and told.events.count(("info", "upstream back")) == len(outs)
    told.report(0, out(now), now)
    told.outages.tick(now + OUT_LINE_EVERY_S)
    assert told.events[-1] == ("warning", "upstream out"), "told as soon as its line is due"


def test_an_outage_without_a_line_is_told_when_its_line_is_due_though_nothing_is_reported() -> None:
    told, now = Told(server("gpu1"), server("gpu2")), 0.0
    for _ in range(OUT_LINES_MAX + 2):
        told.report(0, up(now), now)
        now += 1.0
        told.report(0, out(now), now)
    assert told.events[-1] == ("info", "upstream back")
    told.outages.tick(now + 1.0)
    assert told.events[-1] == ("info", "upstream back"), "the line isn't due"
    told.outages.tick(now + OUT_LINE_EVERY_S)
    assert told.events[-1] == ("warning", "upstream out") and told.lines[-1][2]["outages"] == 2


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.floats(0.01, 30.0)), max_size=60))
def test_lines_of_outages_and_returns_alternate_whatever_workers_report(steps: list[tuple[int, bool, float]]) -> None:
    told, now = Told(server("gpu1"), server("gpu2")), 0.0
    for slot, is_out, step in steps:
        now += step
        told.report(slot, out(now) if is_out else up(now), now)
        assert told.verdict().state.is_down is is_out, "the newest evidence counts"
    told.outages.tick(now + OUT_LINE_EVERY_S)
    names = [name for _, name in told.events]
    assert names == ["upstream out", "upstream back"] * (len(names) // 2) + ["upstream out"] * (len(names) % 2)
    assert (len(names) % 2 == 1) is told.verdict().state.is_down


def test_a_reload_forgets_servers_that_are_gone_or_changed() -> None:
    told = Told(server("gpu1"), server("gpu2"))
    told.report(0, out(10.0), 10.0, "gpu1")
    told.report(0, out(10.0), 10.0, "gpu2")
    assert told.events[-1] == ("error", "no upstream left")
    before = told.outages.version
    changed = UpstreamSettings(name="gpu1", url="http://elsewhere.test:1")
    told.outages.take((changed, server("gpu2")), 50.0)
    assert told.outages.version > before and told.verdict("gpu1") == ServerView(since=50.0)
    assert told.verdict("gpu2").state is OUT and told.events[-1] == ("info", "models served again")
    told.outages.take((changed,), 60.0)
    told.report(0, out(70.0), 70.0, "gpu2")
    assert [name for name, _ in told.outages.verdicts()] == ["gpu1"] and told.outages.summary() == ""


def test_many_names_are_cut_and_counted() -> None:
    names = [f"gpu{k:02}" for k in range(NAMES_SHOWN_MAX + 5)]
    told = Told(*map(server, names))
    for k, name in enumerate(names):
        told.report(0, out(10.0 + k), 10.0 + k, name)
    assert told.outages.summary() == f"13 of 13 upstreams out: {', '.join(names[:NAMES_SHOWN_MAX])}, and 5 more"
    assert told.lines[-1][2]["upstreams"] == (*names[:NAMES_SHOWN_MAX], "and 5 more")
