"""HTTP/1.0: a client keeps its connection if it asks for that, and the answer's end is known without a close."""

from __future__ import annotations

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, Client, Rig, chunk, event, get, post, rig, whole_answer

KEEP = "Connection: keep-alive"
ONE = "1.0"


def stays(client: Client) -> bool:
    """Whether the connection takes another request, which is answered."""
    before = client.raw.count(b"HTTP/1.1 ")
    if client.gone:
        return False
    client.send(get("/healthz", KEEP, version=ONE))
    return client.raw.count(b"HTTP/1.1 ") == before + 1


# request, and the answer of the upstream if it goes there
LENGTHS = {
    "streamd's own": (get("/healthz", KEEP, version=ONE), b""),
    "a refusal": (get("/elsewhere", KEEP, version=ONE), b""),
    "without a body": (get("/healthz", KEEP, version=ONE, method="HEAD"), b""),
    "an upstream's with a length": (get("/v1/files/f", KEEP, version=ONE), whole_answer(b"ok")),
    "an upstream's without a body": (get("/v1/files/f", KEEP, version=ONE), b"HTTP/1.1 204 No Content\r\n\r\n"),
}
CLOSES = {
    "a stream": (post(CHAT, KEEP, version=ONE), SSE_HEAD + chunk(event("a"), DONE) + LAST),
    "an upstream's in chunks": (
        get("/v1/files/f", KEEP, version=ONE),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"ok") + LAST,
    ),
}


def answered(r: Rig, request: bytes, upstream: bytes) -> Client:
    client = r.client(request)
    if upstream:
        r.reply(upstream)
    return client


@pytest.mark.parametrize("kind", LENGTHS)
def test_a_client_that_asks_keeps_its_connection(kind: str) -> None:
    with rig() as r:
        client = answered(r, *LENGTHS[kind])
        assert b"\r\nconnection: keep-alive\r\n" in client.raw
        assert stays(client) and stays(client)


@pytest.mark.parametrize("kind", CLOSES)
def test_an_answer_without_a_length_ends_with_its_connection(kind: str) -> None:
    with rig() as r:
        client = answered(r, *CLOSES[kind])
        r.pass_time(1.5)
        assert b"keep-alive" not in client.raw and b"\r\nconnection: close\r\n" in client.raw
        assert client.answer.whole and client.gone


@pytest.mark.parametrize("fields", [(), ("Connection: close",), ("Connection: keep-alive, close",), ("Keep-Alive: 5",)])
def test_any_other_client_of_http10_is_closed(fields: tuple[str, ...]) -> None:
    with rig() as r:
        client = r.client(get("/healthz", *fields, version=ONE))
        r.turn()
        assert client.gone and b"\r\nconnection: close\r\n" in client.raw


def test_a_client_of_http11_is_told_of_no_keep_alive() -> None:
    with rig() as r:
        client = r.client(get("/healthz", KEEP))
        assert b"keep-alive" not in client.raw and not client.gone


def test_a_drain_closes_a_kept_connection() -> None:
    with rig() as r:
        r.runtime.draining = True
        client = r.client(get("/healthz", KEEP, version=ONE))
        assert b"keep-alive" not in client.raw and client.gone
        r.runtime.draining = False
