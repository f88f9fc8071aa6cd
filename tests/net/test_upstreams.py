"""Upstreams: the choice of an inference server, and the changes of a reload."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes import WHOLE, post, rig, whole_answer

from streamd.config import Settings, UpstreamSettings
from streamd.net.http_error import HttpError
from streamd.net.upstreams import Upstreams

NAMED = UpstreamSettings(name="named", url="http://a.test:1", models=("big", "small"))
ANY = UpstreamSettings(name="any", url="http://b.test:2")
OTHER = UpstreamSettings(name="other", url="http://c.test:3", aliases={"fast": "small-7b"}, inflight_max=2)


def name_of(upstreams: Upstreams, model: str, now: float = 0.0) -> str:
    return upstreams.choose(model, now).settings.name


def test_an_upstream_is_chosen_by_model_and_then_by_requests_in_flight() -> None:
    with rig(upstreams=(ANY, NAMED, OTHER)) as r:
        upstreams = r.worker.upstreams
        any_, _, other = upstreams
        assert name_of(upstreams, "big") == "named"
        assert name_of(upstreams, "fast") == "other"
        assert name_of(upstreams, "unheard-of") == "any"
        any_.in_flight = 1
        assert name_of(upstreams, "unheard-of") == "other"
        other.in_flight = 2  # full
        assert name_of(upstreams, "unheard-of") == "any"
        assert name_of(upstreams, "") == "any"
        any_.in_flight = other.in_flight = 0
        assert len(upstreams) == 3 and [up.settings.name for up in upstreams] == [
            "any",
            "named",
            "other",
        ]


def test_a_full_upstream_takes_no_request_even_if_it_is_the_only_upstream() -> None:
    with rig(upstreams=(OTHER,)) as r:
        (other,) = r.worker.upstreams
        other.in_flight = 2
        with pytest.raises(HttpError) as refused:
            r.worker.upstreams.choose("m", 0.0)
        assert refused.value.status == 503 and refused.value.retry_after_s and refused.value.should_retry
        other.in_flight = 0


def test_a_model_that_no_upstream_serves_is_a_404() -> None:
    with rig(upstreams=(NAMED,)) as r:
        answer = r.client(post({**WHOLE, "model": "huge"})).answer
        assert answer.status == 404 and answer.error["code"] == "model_not_found" and answer.error["param"] == "model"
        assert "huge" in answer.error["message"]


def test_without_an_upstream_a_request_is_a_503() -> None:
    with rig(upstreams=()) as r:
        answer = r.client(post(WHOLE)).answer
        assert answer.status == 503 and answer.error["code"] == "no_upstream"


def test_of_equally_busy_upstreams_the_last_to_fail_comes_last() -> None:
    with rig(upstreams=(ANY, replace(ANY, name="spare"), replace(ANY, name="third"))) as r:
        upstreams = r.worker.upstreams
        any_, spare, third = upstreams
        asked = 0.0
        for upstream in (any_, spare):
            asked += 1.0
            upstream.health.failed("p", asked, asked, r.runtime.rng)
            upstream.health.answered("p", 0.0)
        now = 100.0
        assert upstreams.choose("m", now, principal="p") is third
        third.in_flight = 1
        assert upstreams.choose("m", now, principal="p") is any_
        any_.in_flight = 1
        assert upstreams.choose("m", now, principal="p") is spare
        spare.in_flight = 2
        assert upstreams.choose("m", now, principal="p") is third
        any_.in_flight = spare.in_flight = third.in_flight = 0


@pytest.mark.parametrize("busy", [0, 50])
def test_a_black_hole_gets_no_more_requests_while_a_connection_to_it_is_awaited(busy: int) -> None:
    with rig(upstreams=(ANY, replace(ANY, name="spare", url="http://d.test:4")), connect_timeout_s=5.0) as r:
        any_, spare = r.worker.upstreams
        spare.in_flight += busy
        r.mute.add(2)
        clients = []
        for _ in range(100):  # 20 a second
            clients.append(r.client(post(WHOLE)))
            r.pass_time(0.05)
        swallowed = r.dialled.count(2)
        assert 1 <= swallowed <= 11 and any_.health.is_awaited(r.loop.time()) is (any_.in_flight > 0)
        r.pass_time(1.5)
        assert not any_.health.connecting and not any_.health.is_reachable()
        for link in r.links:
            link.feed(whole_answer(b"{}", "200 OK", "connection: close"))
        r.turn()
        assert all(client.statuses == [200] for client in clients)
        spare.in_flight -= busy


def test_a_request_whose_client_leaves_at_once_awaits_nothing() -> None:
    with rig(upstreams=(ANY,)) as r:
        (any_,) = r.worker.upstreams
        client = r.client()
        client.transport.feed(post(WHOLE))
        client.transport.reset()
        r.turn()
        assert not any_.health.connecting


def test_where_all_are_out_the_errors_of_a_server_that_answers_are_the_last_resort() -> None:
    with rig(upstreams=(ANY, replace(ANY, name="spare"))) as r:
        upstreams = r.worker.upstreams
        any_, spare = upstreams
        any_.health.unreachable(0.0, 1.0, r.runtime.rng)
        spare.health.failed("p", 0.0, 1.0, r.runtime.rng)
        assert upstreams.free("m", 1.1, principal="p") is None
        assert upstreams.choose("m", 1.1, principal="p") is spare
        spare.health.unreachable(1.2, 1.3, r.runtime.rng)
        with pytest.raises(HttpError):
            upstreams.choose("m", 1.3, principal="p")


def test_a_full_server_is_waited_for_and_not_replaced_by_a_failing_server() -> None:
    with rig(upstreams=(ANY, replace(ANY, name="spare", inflight_max=1))) as r:
        any_, spare = r.worker.upstreams
        any_.health.failed("p", 0.0, 1.0, r.runtime.rng)
        spare.in_flight = 1
        with pytest.raises(HttpError) as refused:
            r.worker.upstreams.choose("m", 1.1, principal="p")
        assert refused.value.should_retry
        spare.in_flight = 0


def test_a_reload_keeps_unchanged_upstreams_and_lets_removed_upstreams_finish() -> None:
    with rig(upstreams=(ANY, OTHER)) as r:
        one, two = r.client(post(WHOLE)), r.client(post(WHOLE))
        for link in r.links:
            link.feed(whole_answer(b"ok"))
        running = r.client(post({**WHOLE, "model": "fast"}))
        any_, other = r.worker.upstreams
        assert (any_.idle, other.idle) == (1, 0)
        r.worker.upstreams.reload(Settings(upstreams=(ANY, NAMED)))
        assert [each.settings.name for each in r.worker.upstreams] == ["any", "named"]
        assert next(iter(r.worker.upstreams)) is any_ and any_.idle == 1
        r.reply(whole_answer(b"ok"))
        assert running.statuses == one.statuses == two.statuses == [200]
        assert other.idle == 0 and other.in_flight == 0 and r.link.closed
        r.worker.upstreams.reload(Settings(upstreams=(replace(ANY, inflight_max=3), NAMED)))
        assert next(iter(r.worker.upstreams)) is not any_ and any_.idle == 0
        r.worker.upstreams.close()
