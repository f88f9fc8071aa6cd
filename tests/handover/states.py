"""States of a client's request: how each is reached, and how it goes on to its end."""

from __future__ import annotations

import re
from collections.abc import Callable

from fakes import CHAT, DONE, LAST, SSE_HEAD, WHOLE, Client, Rig, chunk, event, get, post, whole_answer

HEALTH = get("/healthz")
MORE = chunk(event("more "))
ANSWER = b'{"id":"a","choices":[]}'
LINES = "POST /v1/streams/a/events HTTP/1.1\r\nhost: a\r\ncontent-type: {}\r\ntransfer-encoding: chunked\r\n\r\n"


# Drawn anew in each run.
_drawn = re.compile(rb"req_[0-9a-f]+|s_[\w-]+|retry: \d+|date: [^\r]+|epoch\W+\w+")


def idle(r: Rig) -> Client:
    return r.client(HEALTH)


def in_head(r: Rig) -> Client:
    return r.client(HEALTH[:9])


def in_body(r: Rig) -> Client:
    return r.client(post(WHOLE)[:-5])


def asked(r: Rig) -> Client:
    return r.client(post(CHAT))


def proxied(r: Rig) -> Client:
    client = r.client(post(WHOLE))
    r.reply(whole_answer(ANSWER)[:-5])
    return client


def streaming(r: Rig) -> Client:
    client = r.client(post(CHAT))
    r.reply(SSE_HEAD + chunk(event("one ")) + MORE[:1])
    return client


def full(r: Rig) -> Client:
    client = r.client(post(CHAT), capacity=400)
    r.reply(SSE_HEAD + chunk(event("one ")) + chunk(event("two ")) + MORE[:1])
    assert client.connection.paused
    return client


def waiting(r: Rig) -> Client:
    return r.client(get("/v1/streams/later?wait=9"))


def reading_published(r: Rig) -> Client:
    r.client(get("/v1/streams/a", "Content-Length: 0", method="PUT"))
    return r.client(get("/v1/streams/a"))


def publishing(r: Rig) -> Client:
    reading_published(r)
    return r.client(LINES.format("application/x-ndjson").encode() + b'3\r\n{"a\r\n')


STATES = (idle, in_head, in_body, asked, proxied, streaming, full, waiting, reading_published, publishing)


def go_on(r: Rig, state: Callable[[Rig], Client], client: Client) -> None:
    """Bring the state's request to its end."""
    if state in (idle, in_head):
        client.send(HEALTH if state is idle else HEALTH[9:])
    elif state is in_body:
        client.send(post(WHOLE)[-5:])
        r.reply(whole_answer(ANSWER))
    elif state is proxied:
        r.link.feed(whole_answer(ANSWER)[-5:])
    elif state is asked:
        r.link.feed(SSE_HEAD + chunk(event("one "), DONE) + LAST)
    elif state in (streaming, full):
        r.link.feed((MORE + chunk(DONE) + LAST)[1:])
        client.take()
    elif state is publishing:
        client.send(b'6\r\n":1}\r\n\r\n0\r\n\r\n')
    else:
        r.client(get("/v1/streams/later", "Content-Length: 0", method="PUT"))
        client.fin()
    for name in ("a", "later"):
        r.client(get(f"/v1/streams/{name}", method="DELETE"))
    r.turn()


def seen(client: Client, r: Rig) -> tuple[bytes, list[object]]:
    """All that a client has got, without what is drawn anew in each run, and how requests have ended."""
    return _drawn.sub(b"", client.raw), list(r.ended)
