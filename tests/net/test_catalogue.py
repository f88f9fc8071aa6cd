"""What each upstream lists is known where it matters, and decides among the upstreams that may take a model."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fakes import WHOLE, FakeTransport, Rig, get, post, rig, whole_answer

from streamd.config import UpstreamSettings
from streamd.net.catalogue import RETRY_S

REFRESH_S = 60.0


def upstream(number: int, *models: str, **more: Any) -> UpstreamSettings:
    return UpstreamSettings(name=f"u{number}", url=f"http://u{number}.test:{number}", models=models or ("*",), **more)


@contextmanager
def listing(*upstreams: UpstreamSettings) -> Iterator[Rig]:
    with rig(upstreams=upstreams, models_refresh_s=REFRESH_S, pool_idle_timeout_s=0.0) as r:
        yield r
        r.worker.upstreams.close()


def port_of(link: FakeTransport) -> int:
    found = re.search(rb"\r\nhost: u([0-9])\.test", link.sent)
    assert found is not None
    return int(found[1])


def questions(r: Rig) -> list[FakeTransport]:
    return [link for link in r.links if link.sent.startswith(b"GET /v1/models ")]


def unprompted(r: Rig) -> list[int]:
    """The ports that were asked for their lists."""
    return [port_of(link) for link in questions(r)]


def answer_lists(r: Rig, **lists: list[str]) -> None:
    """Answer each question for a list, by upstream; without a list as 404."""
    for link in questions(r):
        if not link.closed:
            names = lists.get(f"u{port_of(link)}")
            body = json.dumps({"data": [{"id": name} for name in names or ()]}).encode()
            link.feed(whole_answer(body, "200 OK" if names is not None else "404 Not Found"))
    r.turn()


def asked_for(r: Rig, model: str) -> int:
    """The port of the upstream that a request for the model goes to."""
    client = r.client(post(WHOLE | {"model": model}))
    r.reply(whole_answer(b"{}"))
    assert client.answer.status == 200
    return r.dialled[-1]


@pytest.mark.parametrize(
    ("upstreams", "asked"),
    [
        ((upstream(1),), []),
        ((upstream(1), upstream(2)), [1, 2]),
        ((upstream(1, "a"), upstream(2, "b")), []),
        ((upstream(1, "a"), upstream(2)), []),
        ((upstream(1, "a"), upstream(2), upstream(3, "b", "a")), [1, 3]),
        ((upstream(1, "a"), upstream(2, "b", aliases={"a": "b"})), [1, 2]),
    ],
)
def test_only_upstreams_that_share_a_model_are_asked_unprompted(
    upstreams: tuple[UpstreamSettings, ...], asked: list[int]
) -> None:
    with listing(*upstreams) as r:
        assert unprompted(r) == asked
        answer_lists(r, u1=["a"], u2=["b"], u3=["a"])
        r.pass_time(REFRESH_S * 0.7)
        assert unprompted(r) == asked
        r.pass_time(REFRESH_S * 0.6)
        assert set(unprompted(r)) == set(asked) and len(unprompted(r)) >= 2 * len(asked)
        answer_lists(r)


def test_the_upstream_that_lists_the_model_is_asked_whatever_its_load() -> None:
    with listing(upstream(1), upstream(2)) as r:
        answer_lists(r, u1=["a"], u2=["b", "c:latest"])
        busy = [r.client(post(WHOLE | {"model": "b"})) for _ in range(3)]
        assert r.dialled[-3:] == [2, 2, 2]
        assert [asked_for(r, model) for model in ("a", "b", "c")] == [1, 2, 2]
        assert asked_for(r, "of-nobody") == 1, "as without lists: the least busy"
        for client in busy:
            client.fin()


def test_a_list_is_a_preference_and_no_condition() -> None:
    with listing(upstream(1, inflight_max=1), upstream(2)) as r:
        answer_lists(r, u1=["a"], u2=["b"])
        busy = r.client(post(WHOLE | {"model": "a"}))
        assert r.dialled[-1] == 1 and asked_for(r, "a") == 2
        busy.fin()
        r.refusing.add(1)
        assert asked_for(r, "a") == 2
        assert unprompted(r) == [1, 2]
        r.refusing.clear()


def test_an_alias_counts_by_the_upstreams_own_name() -> None:
    with listing(upstream(1, aliases={"fast": "x"}), upstream(2, aliases={"fast": "y"})) as r:
        answer_lists(r, u1=["a"], u2=["y"])
        assert [asked_for(r, "fast") for _ in range(3)] == [2, 2, 2]


@pytest.mark.parametrize("status", ["404 Not Found", "500 Internal Server Error", "503 Service Unavailable"])
def test_a_list_that_fails_is_no_failure_of_the_server(status: str) -> None:
    with listing(upstream(1), upstream(2)) as r:
        for link in tuple(r.links):
            link.feed(whole_answer(b"<html>", status))
        r.turn()
        busy = r.client(post(WHOLE))
        assert {r.dialled[-1], asked_for(r, "m")} == {1, 2}
        assert not any(r.runtime.counters.upstream_failures.values())
        r.pass_time(RETRY_S * 1.3)
        assert sorted(unprompted(r)) == [1, 1, 2, 2]
        answer_lists(r, u2=["m"])
        assert [asked_for(r, "m") for _ in range(2)] == [2, 2]
        busy.fin()


def test_a_server_without_a_list_is_asked_less_and_less_often() -> None:
    with listing(upstream(1), upstream(2)) as r:
        until = r.loop.time() + 4 * REFRESH_S
        while r.loop.time() < until:
            answer_lists(r, u2=["m"])
            r.pass_time(RETRY_S / 4)
        # After 5, 10, 20 and 40 s, then after 60: each a quarter sooner or later.
        assert 6 <= unprompted(r).count(1) <= 10
        assert 4 <= unprompted(r).count(2) <= 6
        answer_lists(r)


def test_a_server_without_room_is_not_asked_for_its_list() -> None:
    with listing(upstream(1, inflight_max=1), upstream(2)) as r:
        answer_lists(r, u1=["m"], u2=["m"])
        (full, _) = r.worker.upstreams
        full.in_flight += 1
        r.pass_time(REFRESH_S * 1.3)
        assert unprompted(r).count(1) == 1 < unprompted(r).count(2)
        full.in_flight -= 1
        r.pass_time(1)
        assert unprompted(r).count(1) == 2
        answer_lists(r, u1=["m"], u2=["m"])


def test_an_unreachable_server_is_not_asked_for_its_list() -> None:
    with listing(upstream(1), upstream(2)) as r:
        answer_lists(r, u1=["m"], u2=["m"])
        r.refusing.add(1)
        for _ in range(4):
            asked_for(r, "m")
        before = r.dialled.count(1)
        (out, _) = r.worker.upstreams
        out.health.all.out_until = r.loop.time() + 10 * REFRESH_S
        r.pass_time(2 * REFRESH_S)
        assert r.dialled.count(1) == before
        answer_lists(r, u2=["m"])
        r.refusing.clear()


def test_a_list_that_a_client_asked_for_is_remembered() -> None:
    with rig(upstreams=(upstream(1), upstream(2)), pool_idle_timeout_s=0.0) as r:
        assert r.links == []
        r.client(get("/v1/models"))
        answer_lists(r, u1=["a"], u2=["b"])
        assert [asked_for(r, model) for model in ("b", "a")] == [2, 1]


def test_the_list_of_a_clients_own_key_is_not_everyones() -> None:
    with rig(upstreams=(upstream(1), upstream(2, pass_client_key=True)), pool_idle_timeout_s=0.0) as r:
        r.client(get("/v1/models"))
        answer_lists(r, u1=["a"], u2=["b"])
        assert asked_for(r, "b") == 1


def test_a_reload_asks_the_upstreams_that_share_a_model_now() -> None:
    with listing(upstream(1)) as r:
        settings = r.worker.settings
        r.worker.reload(dataclasses.replace(settings, upstreams=(upstream(1), upstream(2))))
        r.pass_time(1)
        assert unprompted(r) == [1, 2]
        r.worker.reload(settings)  # the question under way ends
        r.turn()
        assert r.links[1].closed
