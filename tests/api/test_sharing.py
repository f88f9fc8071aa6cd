"""Bounds for all principals together, through all of streamd: nobody's things push out those of another."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import (
    CHAT,
    DONE,
    LAST,
    SSE_HEAD,
    Client,
    Rig,
    chunk,
    event,
    events_in,
    get,
    post,
    rig,
    text_of,
)

from streamd.config import UpstreamSettings
from streamd.core.admission import OPERATOR_CONNECTIONS_MAX, TURNED_AWAY_MAX, Admission, Gate
from streamd.core.keys import SALT_BYTES, Key, digest, encode

SALT = bytes(SALT_BYTES)
GREEDY, ALICE = (f"Authorization: Bearer sk-{name}-{name * 8:0<20.20}" for name in ("greedy", "alice"))


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "keys"
    lines = []
    for name, field in (("greedy", GREEDY), ("alice", ALICE)):
        presented = field.rpartition(" ")[2].encode()
        lines.append(encode(Key(name, name, SALT, digest(SALT, presented))) + b"\n")
    path.write_bytes(b"".join(lines))
    path.chmod(0o600)
    return {"keys_file": str(path)}


def detached(r: Rig, field: str) -> Client:
    return r.client(post(CHAT, field, "Prefer: respond-async"))


# -- the operator's reserve


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection has a regular place."""
    monkeypatch.setattr(Admission, "admit_connection", lambda self, price: self._refuse(Gate.CONNECTIONS))


@pytest.mark.usefixtures("full")
def test_strangers_that_hold_every_place_and_the_reserve_leave_the_operator_its_own() -> None:
    with rig() as r:
        reserve = r.runtime.admission._budget.demands.reserve_connections
        strangers = [r.client(get()) for _ in range(reserve)]
        assert {client.answer.status for client in strangers} == {200}
        assert r.client().answer.status == 503
        operators = [r.client(get("/status"), listener="admin") for _ in range(OPERATOR_CONNECTIONS_MAX)]
        assert {client.answer.status for client in operators} == {200}
        assert r.client(listener="admin").answer.status == 503
        for client in operators:
            client.fin()
        r.turn()
        assert r.client(get("/v1/streams/x", method="DELETE"), listener="admin").answer.status == 404
        assert r.client(get("/v1/streams"), listener="admin").answer.status == 503, "for operating alone"
        assert r.client(get("/drain", method="POST"), listener="admin").answer.status == 202


@pytest.mark.usefixtures("full")
def test_connections_beyond_the_reserve_hold_a_bounded_number_of_descriptors() -> None:
    with rig() as r:
        reserve = r.runtime.admission._budget.demands.reserve_connections
        held = [r.client() for _ in range(reserve)]
        told = [r.client() for _ in range(TURNED_AWAY_MAX)]
        beyond = [r.client() for _ in range(50)]
        assert {client.answer.status for client in told} == {503} and not any(client.gone for client in told)
        assert all(client.gone and client.raw == b"" for client in beyond)
        r.pass_time(r.runtime.settings.close_timeout_s + 1)
        assert all(client.gone for client in told)
        assert r.client().answer.status == 503
        assert len(held) == reserve


# -- places of streams, graces


def test_names_that_are_never_published_to_make_room_for_another_key(keys: dict[str, str]) -> None:
    with rig(**keys, streams_max=4) as r:
        opened = [r.client(get(f"/v1/streams/room-{k}", GREEDY, method="PUT")).answer.status for k in range(6)]
        assert opened == [201] * 4 + [503] * 2
        clients = [r.client(post(CHAT, ALICE)) for _ in range(2)]
        for link in r.links:
            link.feed(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        r.turn()
        assert [text_of(events_in(client.answer.body)) for client in clients] == ["a", "a"]
        states = [r.runtime.hub.get(f"room-{k}").reason for k in range(4)]  # type: ignore[union-attr]
        assert [reason is None for reason in states] == [False, False, True, True]
        for k in range(4):
            r.client(get(f"/v1/streams/room-{k}", GREEDY, method="DELETE"))


def test_a_name_with_a_reader_is_never_ended_for_another_key(keys: dict[str, str]) -> None:
    with rig(**keys, streams_max=2) as r:
        readers = []
        for k in range(2):
            r.client(get(f"/v1/streams/room-{k}", GREEDY, method="PUT"))
            readers.append(r.client(get(f"/v1/streams/room-{k}", GREEDY)))
        assert r.client(post(CHAT, ALICE)).answer.status == 503
        readers[0].fin()
        r.client(post(CHAT, ALICE))
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        assert not readers[1].gone
        for k in range(2):
            r.client(get(f"/v1/streams/room-{k}", GREEDY, method="DELETE"))


def test_a_publisher_whose_stream_made_room_is_told(keys: dict[str, str]) -> None:
    with rig(**keys, streams_max=2) as r:
        for k in range(2):
            r.client(get(f"/v1/streams/room-{k}", GREEDY, method="PUT"))
        path = "/v1/streams/room-0/events?seal=finished"
        sender = r.client(get(path, GREEDY, "Transfer-Encoding: chunked", method="POST") + chunk(b"a"))
        r.client(post(CHAT, ALICE))
        sender.transport.feed(LAST)
        r.turn()
        assert (sender.answer.status, sender.answer.error["code"]) == (409, "stream_sealed")
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        r.client(get("/v1/streams/room-1", GREEDY, method="DELETE"))


def test_a_key_with_every_grace_leaves_another_key_its_own(keys: dict[str, str]) -> None:
    with rig(**keys, detached_max=3) as r:
        assert [detached(r, GREEDY).answer.status for _ in range(3)] == [202] * 3
        greedy = tuple(r.runtime.hub)
        reader = r.client(post(CHAT, ALICE, "X-Stream-Detach-Grace: 30"))
        r.reply(SSE_HEAD + chunk(event("a")))
        stream_id = reader.answer.get("x-stream-id")
        reader.fin()
        assert [stream.reason is None for stream in greedy] == [False, True, True]
        r.reply(chunk(event("b"), DONE) + LAST)
        again = r.client(get(f"/v1/streams/{stream_id}", ALICE)).answer
        assert text_of(events_in(again.body)) == "ab"


def test_over_detached_max_a_request_to_run_without_a_reader_is_refused_before_it_is_sent(keys: dict[str, str]) -> None:
    with rig(**keys, detached_max=2) as r:
        said = [detached(r, GREEDY).answer for _ in range(4)]
        assert [answer.status for answer in said] == [202, 202, 503, 503]
        assert {answer.error["code"] for answer in said[2:]} == {"over_capacity"}
        assert len(r.links) == 2
        assert detached(r, ALICE).answer.status == 202, "greedy's oldest made room"


def test_without_detached_places_a_request_to_run_without_a_reader_is_refused() -> None:
    with rig(detached_max=0) as r:
        assert detached(r, "X-None: 1").answer.status == 503 and r.links == []


def test_graces_at_a_full_upstream_make_room_for_another_key(keys: dict[str, str]) -> None:
    upstream = UpstreamSettings(name="up", url="http://up.test:1", inflight_max=2)
    with rig(**keys, upstreams=(upstream,)) as r:
        assert [detached(r, GREEDY).answer.status for _ in range(2)] == [202, 202]
        assert r.client(post(CHAT, GREEDY)).answer.status == 503
        client = r.client(post(CHAT, ALICE))
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        assert text_of(events_in(client.answer.body)) == "a"


# -- waiters


def test_readers_that_wait_make_room_for_another_key(keys: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Admission, "waiters_max", 3)
    with rig(**keys) as r:
        greedy = [r.client(get(f"/v1/streams/{k}?wait=60", GREEDY)) for k in range(3)]
        late = r.client(get("/v1/streams/late?wait=60", GREEDY))
        assert (late.answer.status, late.answer.error["code"]) == (503, "over_capacity")
        alice = r.client(get("/v1/streams/room?wait=60", ALICE))
        assert greedy[0].answer.status == 503 and [client.raw for client in (alice, *greedy[1:])] == [b""] * 3
        r.client(get("/v1/streams/room", ALICE, method="PUT"))
        assert alice.answers[0].status == 200
        assert r.worker.streams._waiters.total == 2
        r.client(get("/v1/streams/room", ALICE, method="DELETE"))
        for client in greedy[1:]:
            client.fin()
        assert r.worker.streams._waiters.total == 0


def test_readers_without_a_key_share_by_their_addresses(keys: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Admission, "waiters_max", 2)
    with rig(**keys) as r:
        first = [r.client(get(f"/v1/streams/{k}?wait=60")) for k in range(2)]
        other = Client(r)
        other.transport.peer = ("198.51.100.7", 4)
        other.send(get("/v1/streams/room?wait=60"))
        assert (first[0].answer.status, first[1].raw, other.raw) == (503, b"", b"")
