"""Whatever a callback raises ends its own connection, stream or exchange, and gives back all that this held.

Each callback is called in each state, once for every function of streamd that runs in it and in the turns after it,
and that function raises. Afterwards the books are balanced, nobody else has noticed, and no error went past the guard.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from fakes import (
    CHAT,
    LAST,
    SSE_HEAD,
    WHOLE,
    Client,
    FakeTransport,
    Rig,
    chunk,
    event,
    get,
    post,
    rig,
    whole_answer,
)

from streamd.net.client import ClientConnection, ClientState
from streamd.net.http_error import HttpError
from streamd.reasons import CloseReason

# What gives back is arithmetic and is taken to work, and so are the guard itself and the steps of state tables.
ASSUMED = frozenset(
    (
        *("_go", "bug", "caught", "crash", "cut", "refused", "run", "reason_of", "problem_of", "fail", "seal"),
        *("release_body", "release_connection", "release_relay", "release_reserved", "release_stream", "close_stream"),
        *("discard", "leave", "_leave", "leave_request", "forget", "forget_key", "by_key", "end_grace", "in_flight"),
        *(
            "end",
            "_end",
            "over",
            "_over",
            "close",
            "abort",
            "break_off",
            "close_after_error",
            "abandon",
            "body_lost",
            "update_push",
            "flush_read",
        ),
        *("_gone", "_charge_held", "_leave_stream", "_let_ask_go", "_end_answer", "_begin_closing", "_arm_abort"),
        *("start", "dispatch", "body_end", "_plan"),  # before their first line
    )
)

ASSUMED_FILES = (
    *("core/admission.py", "core/bodies.py", "core/body_charge.py", "core/shares.py", "core/limits.py"),
    *("net/gates.py", "net/request.py", "daemon/logs.py"),
)

QUICK: dict[str, Any] = {
    "retention_s": 1.0,
    "detach_grace_max_s": 1.0,
    "resume_grace_s": 1.0,
    "pool_idle_timeout_s": 1.0,
    "publisher_idle_timeout_s": 2.0,
    "publisher_grace_s": 1.0,
}


class Raiser:
    """Raises `error` in the function of streamd that is the `at`-th to be called, and counts them all."""

    def __init__(self, at: int, error: Exception) -> None:
        self.at = at
        self.error = error
        self.calls = 0
        self.where = ""

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event != "call" or "/streamd/" not in code.co_filename or code.co_filename.endswith("/guard.py"):
            return
        if code.co_name in ASSUMED or code.co_name.startswith("<") or code.co_filename.endswith(ASSUMED_FILES):
            return
        if frame.f_back is None or "/streamd/" not in (caller := frame.f_back.f_code.co_filename):
            return  # the callback itself, before its first line
        if caller.endswith("core/guard.py"):
            return  # the callback itself, before its first line
        self.calls += 1
        if self.calls == self.at:
            self.where = f"{code.co_qualname} at {code.co_filename}:{code.co_firstlineno}"
            raise self.error

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(before)


Prepared = Callable[[], object]


def sent(client: Client, data: bytes) -> Prepared:
    return lambda: client.transport.feed(data)


def fresh(r: Rig, data: bytes) -> Prepared:
    return sent(r.client(), data)


def on(target: Any, act: Callable[[Any], object]) -> Prepared:
    return lambda: act(target)


def accepted(r: Rig) -> Prepared:
    connection = ClientConnection(r.worker.application, r.worker.entrance("loopback"))
    return on(FakeTransport(r.loop, connection), connection.connection_made)


def asking(r: Rig) -> tuple[Client, FakeTransport]:
    client = r.client(post(CHAT))
    return client, r.link


def reading(r: Rig, **more: Any) -> tuple[Client, FakeTransport]:
    client = r.client(post(CHAT), **more)
    r.reply(SSE_HEAD + chunk(event("one ")))
    r.reply(chunk(event("two ")))
    return client, r.link


def paused(r: Rig) -> tuple[Client, FakeTransport]:
    client, link = reading(r)
    client.transport.capacity = 0
    r.reply(chunk(event("three ")))
    r.reply(chunk(event("four ")))
    assert client.connection.paused
    return client, link


def large(r: Rig) -> tuple[Client, FakeTransport]:
    client, link = reading(r)
    client.transport.capacity = 20_000
    r.reply(chunk(event("x" * 70_000)))
    assert client.connection.paused
    return client, link


def proxied(r: Rig) -> tuple[Client, FakeTransport]:
    client = r.client(post(WHOLE))
    r.reply(whole_answer(b"hello world")[:-5])
    return client, r.link


def due(r: Rig, client: Client) -> Prepared:
    def sweep() -> None:
        own = tuple(r.runtime.sweep._members - r.others)  # type: ignore[attr-defined]
        for member in own:
            member.due_at = 0.0
        r.runtime.sweep._pass = own
        timer = r.runtime.sweep._step
        r.runtime.sweep._slice(0)
        assert timer is not None
        timer.cancel()  # the slice has planned the next pass

    return sweep


def published(r: Rig) -> Client:
    r.client(get("/v1/streams/room", "Content-Length: 0", method="PUT"))
    r.client(get("/v1/streams/room"))
    client = r.client(
        get(
            "/v1/streams/room/events",
            "Content-Type: application/x-ndjson",
            "Transfer-Encoding: chunked",
            method="POST",
        )
    )
    client.send(chunk(b'{"delta": "one"}\n'))
    return client


def whole_body(body: bytes) -> bytes:
    head = get(
        "/v1/streams/room/events",
        "Content-Type: application/x-ndjson",
        f"Content-Length: {len(body)}",
        method="POST",
    )
    return head + body


def closing(r: Rig) -> Client:
    client = r.client(get("/healthz", "Connection: close"), capacity=0)
    assert client.connection.at is ClientState.CLOSING
    return client


def lingering(r: Rig) -> Client:
    client = r.client(get("/healthz", "Content-Length: 10", method="POST"))
    assert client.connection.at in (ClientState.LINGER, ClientState.CLOSING)
    return client


TIMED_OUT = TimeoutError(110, "Connection timed out")

CALLBACKS: dict[str, Callable[[Rig], Prepared]] = {
    # the client's transport
    "accept": accepted,
    "fresh: a head": lambda r: fresh(r, get("/healthz")),
    "fresh: half a head": lambda r: fresh(r, get("/healthz")[:20]),
    "fresh: a bad head": lambda r: fresh(r, b"GET / HTTP/9.9\r\n\r\n"),
    "fresh: a request": lambda r: fresh(r, post(CHAT)),
    "fresh: a whole request": lambda r: fresh(r, post(WHOLE)),
    "fresh: a fin": lambda r: r.client().transport.fin,
    "fresh: due": lambda r: due(r, r.client()),
    "head: due": lambda r: due(r, r.client(get("/healthz"))),
    "head: the next request": lambda r: sent(r.client(get("/healthz")), get("/status")),
    "head: a fin": lambda r: r.client(get("/healthz")).transport.fin,
    "head: a loss": lambda r: r.client(get("/healthz")).transport.reset,
    "body: more": lambda r: sent(r.client(post(WHOLE)[:-30]), post(WHOLE)[-30:-20]),
    "body: the rest": lambda r: sent(r.client(post(CHAT)[:-30]), post(CHAT)[-30:]),
    "body: a fin": lambda r: r.client(post(CHAT)[:-30]).transport.fin,
    "body: a loss": lambda r: r.client(post(CHAT)[:-30]).transport.reset,
    "body: due": lambda r: due(r, r.client(post(CHAT)[:-30])),
    "asking: a fin": lambda r: asking(r)[0].transport.fin,
    "asking: a loss": lambda r: asking(r)[0].transport.reset,
    "asking: pipelined": lambda r: sent(asking(r)[0], get("/healthz")),
    "asking: due": lambda r: due(r, asking(r)[0]),
    "reading: a fin": lambda r: reading(r)[0].transport.fin,
    "reading: a loss": lambda r: reading(r)[0].transport.reset,
    "reading: a loss by the network": lambda r: on(reading(r)[0], lambda c: c.transport.reset(TIMED_OUT)),
    "reading: due": lambda r: due(r, reading(r)[0]),
    "reading: sent away": lambda r: on(reading(r)[0], lambda c: c.connection.send_away(CloseReason.DRAINING, "bye")),
    "reading: a last word": lambda r: on(
        asking(r)[0], lambda c: c.connection.give_up(HttpError(503, "bye", code="bye"))
    ),
    "paused: takes more": lambda r: paused(r)[0].transport.take,
    "paused: due": lambda r: due(r, paused(r)[0]),
    "paused: a loss": lambda r: paused(r)[0].transport.reset,
    "proxied: a fin": lambda r: proxied(r)[0].transport.fin,
    "proxied: a loss": lambda r: proxied(r)[0].transport.reset,
    "closing: takes more": lambda r: closing(r).transport.take,
    "closing: due": lambda r: due(r, closing(r)),
    "lingering: due": lambda r: due(r, lingering(r)),
    "lingering: more": lambda r: sent(lingering(r), b"more"),
    # the upstream's transport
    "asked: a head": lambda r: on(asking(r)[1], lambda link: link.feed(SSE_HEAD)),
    "asked: a stream": lambda r: on(asking(r)[1], lambda link: link.feed(SSE_HEAD + chunk(event("one ")) + LAST)),
    "asked: an answer": lambda r: on(asking(r)[1], lambda link: link.feed(whole_answer(b"hello"))),
    "asked: an error": lambda r: on(asking(r)[1], lambda link: link.feed(whole_answer(b"no", "503 No"))),
    "asked: nonsense": lambda r: on(asking(r)[1], lambda link: link.feed(b"nonsense\r\n\r\n")),
    "asked: a fin": lambda r: asking(r)[1].fin,
    "asked: a loss": lambda r: asking(r)[1].reset,
    "events: a token": lambda r: on(reading(r)[1], lambda link: link.feed(chunk(event("three ")))),
    "events: a token, paused": lambda r: on(paused(r)[1], lambda link: link.feed(chunk(event("five ")))),
    "events: a large event": lambda r: on(reading(r)[1], lambda link: link.feed(chunk(event("x" * 70_000)))),
    "events: a large event, paused": lambda r: large(r)[0].transport.take,
    "events: a loss in a large event": lambda r: large(r)[0].transport.reset,
    "events: many": lambda r: on(
        reading(r)[1], lambda link: link.feed(chunk(b": hi\n\n", event("3 "), b"data: 4\n\n"))
    ),
    "events: the end": lambda r: on(reading(r)[1], lambda link: link.feed(chunk(b"data: [DONE]\n\n") + LAST)),
    "events: broken": lambda r: on(reading(r)[1], lambda link: link.feed(b"x\r\n")),
    "events: a fin": lambda r: reading(r)[1].fin,
    "events: a loss": lambda r: reading(r)[1].reset,
    "bytes: the rest": lambda r: on(proxied(r)[1], lambda link: link.feed(b"world")),
    "bytes: a fin": lambda r: proxied(r)[1].fin,
    # publishers
    "publishing: an event": lambda r: sent(published(r), chunk(b'{"delta": "two"}\n')),
    "publishing: the end": lambda r: sent(published(r), LAST),
    "publishing: a whole body": lambda r: sent(published(r), LAST + whole_body(b'{"delta": "two"}\n' * 3)),
    "publishing: a fin": lambda r: published(r).transport.fin,
    "publishing: due": lambda r: due(r, published(r)),
    "opening": lambda r: fresh(r, get("/v1/streams/other", "Content-Length: 0", method="PUT")),
}


def outcome(prepare: Callable[[Rig], Prepared], at: int, error: Exception) -> Raiser:
    """Run a callback with the `at`-th function raising; asserts that all is well around it."""
    escaped: list[Any] = []
    with rig(**QUICK) as r:
        r.loop.set_exception_handler(lambda loop, context: escaped.append(context))
        other, link = reading(r)
        r.others = frozenset(r.runtime.sweep._members)  # type: ignore[attr-defined]
        callback = prepare(r)
        raiser = Raiser(at, error)
        with raiser.raising():
            callback()
            r.turn()
        where = f"{raiser.where}, call {at}"
        link.feed(chunk(event("for the others ")))
        r.turn()
        if not any(name in raiser.where for name in ("ReadBatch",)):
            assert b"for the others " in other.raw, where
        counters = r.runtime.counters
        assert not escaped, (where, escaped)
        assert counters.bugs + counters.no_memory <= 3, where
        r.bugs.clear()
        counters.bugs = 0
        try:
            r.check_nothing_is_left()
        except AssertionError as wrong:
            raise AssertionError(where) from wrong
    return raiser


@pytest.mark.parametrize("name", CALLBACKS)
def test_whatever_a_callback_raises_ends_its_owner_alone(name: str) -> None:
    at = 1
    while True:
        raiser = outcome(CALLBACKS[name], at, MemoryError() if at % 2 else ZeroDivisionError())
        if raiser.calls < at:
            break
        at += 1 if at < 60 else 3  # an odd step: both errors occur in the long callbacks of a whole request, too
