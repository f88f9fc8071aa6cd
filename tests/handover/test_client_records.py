"""Clients' connections that move between any two bytes of a head: the answers are the same, and so are the books."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import Client, Rig, get, rig
from moving import move_client

from streamd.handover.clients import CLIENT
from streamd.handover.record import pack, unpack
from streamd.net.client import ClientState
from streamd.net.client_place import ClientPlace, continued, place_of
from streamd.net.origin import AWAITED
from streamd.reasons import CloseReason
from streamd.wire.http1 import HeadState

HEALTH = get("/healthz")
LONG = b"\r\nGET /healthz HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 6000 + b"\r\n\r\n"


def moved(r: Rig, client: Client) -> ClientPlace:
    """Another connection takes the client's place, from its record alone."""
    place: ClientPlace = unpack(CLIENT, pack(CLIENT, place_of(client.connection)))
    assert place == place_of(client.connection)
    move_client(r, client)
    return place


@pytest.mark.parametrize("head", [HEALTH, LONG])
def test_a_head_goes_on_at_any_byte(head: bytes) -> None:
    with rig() as r:
        for at in range(0, len(head), 1 if len(head) < 200 else 61):
            client = r.client(head[:at])
            moved(r, client)
            client.send(head[at:])
            assert client.answer.status == 200, at
            place = moved(r, client)
            assert place.at is ClientState.HEAD and place.head is None
            client.send(HEALTH)
            assert [answer.status for answer in client.answers] == [200, 200]
            client.fin()
        assert len(r.runtime.clients) == 0


def test_deadlines_go_on_as_they_were() -> None:
    with rig(head_timeout_s=10.0, keepalive_timeout_s=30.0) as r:
        slow, idle = r.client(b"GET /"), r.client(HEALTH)
        r.pass_time(6.0)
        moved(r, slow)
        moved(r, idle)
        r.pass_time(5.0)
        assert slow.answer.status == 408 and not idle.transport.closed
        r.pass_time(20.0)
        assert idle.transport.closed and r.closed[CloseReason.IDLE] == 1


def test_an_address_is_counted_once_and_as_opening_until_its_first_request() -> None:
    limits = {"conns_per_address_max": 2, "conns_opening_per_address_max": 1}
    with rig(**limits) as r:
        client = r.client(HEALTH[:-2], listener="public")
        assert moved(r, client).is_opening
        assert r.client(HEALTH, listener="public").answer.status == 429, "another may not open meanwhile"
        client.send(HEALTH[-2:])
        assert not moved(r, client).is_opening
        assert r.client(HEALTH, listener="public").answer.status == 200
        assert r.client(HEALTH, listener="public").answer.status == 429


def test_a_connection_that_is_over_or_whose_client_is_not_known_can_not_be_told() -> None:
    with rig() as r:
        lost = r.client()
        lost.reset()
        with pytest.raises(ValueError, match="is over"):
            place_of(lost.connection)
        waiting: Any = r.client().connection
        waiting.origin._remote = AWAITED
        with pytest.raises(ValueError, match="PROXY"):
            place_of(waiting)


def test_a_client_that_has_not_taken_its_last_answer_can_not_be_told() -> None:
    with rig() as r:
        client = r.client()
        client.transport.capacity = 10
        client.send(HEALTH)
        assert client.connection.at is ClientState.HEAD and client.transport.held
        with pytest.raises(ValueError, match="not left yet"):
            place_of(client.connection)
        client.take()
        moved(r, client)
        assert client.answer.status == 200


PLACE = ClientPlace(ClientState.HEAD, "loopback", 0, False, None, False, 2000.0, b"", None, None, None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"at": ClientState.BODY},
        {"at": ClientState.LOST},
        {"head": HeadState(b"GET / HTTP/1.1\r\n\r\n", 0)},
        {"head": HeadState(b"\0", 0)},
    ],
)
def test_a_place_that_no_connection_has_is_refused(wrong: dict[str, Any]) -> None:
    with rig() as r:
        transport: Any = None
        with pytest.raises(ValueError, match="connection|head"):
            continued(r.worker.application, r.worker.entrance("loopback"), PLACE._replace(**wrong), transport)
        assert len(r.runtime.clients) == 0


def test_bytes_behind_a_head_are_processed_in_the_new_place() -> None:
    with rig() as r:
        client = r.client()
        client.connection._behind = HEALTH + HEALTH
        moved(r, client)
        assert [answer.status for answer in client.answers] == [200, 200]
