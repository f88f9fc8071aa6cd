"""streamd without sockets and without waiting: the real Worker, protocols and tasks, on a loop with a jumping clock,
over transports with a capacity that the test sets.

`with rig() as r:` gives a Rig. `reader = r.client()` is a connection from outside, `r.links` are the connections that
streamd opened to its upstreams. When the block ends, nothing may be left: no bytes accounted, nothing in flight, no
stream, no deadline, no bug.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import selectors
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from streamd.config import Settings, UpstreamSettings
from streamd.daemon import logs
from streamd.daemon.worker import Worker
from streamd.net import answer as net_answer
from streamd.net import sweep
from streamd.net import upstream as net_upstream
from streamd.net.client import ClientConnection
from streamd.net.exchange import Exchange
from streamd.net.reading import READ_BYTES_MAX
from streamd.net.upstream import UpstreamConnection, UpstreamState
from streamd.reasons import CloseReason
from streamd.wire.chunked import ChunkedDecoder, encode_chunk
from streamd.wire.http1 import RESPONSE_OPENING, Framing, HeadReader, ResponseHead, parse_response

PLENTY = 1 << 60  # bytes: a peer that takes everything
QUIET_SWEEP_S = 5.0  # between sweeps when all connections have gone
TURNS_MAX = 10_000  # upper bound of the turns until the loop is at rest


class JumpingSelector(selectors.PollSelector):
    """Never waits: the clock of its loop jumps to the next timer instead.

    poll() and not select(), which refuses descriptors above 1,023: other tests of the process may hold that many.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0:
            self.now += timeout
        return super().select(0)


class FakeLoop(asyncio.SelectorEventLoop):
    """asyncio's loop with that clock, and without a network: `dial` answers create_connection()."""

    def __init__(self) -> None:
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)
        self.dial: Callable[[str, int, UpstreamConnection], FakeTransport] = refuse_all
        self.names: dict[str, tuple[str, ...]] = {}  # addresses; any other name is an address by itself

    def time(self) -> float:
        return self._jumping.now

    async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, 0)) for each in self.names.get(host, (host,))]

    async def create_connection(self, make: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        protocol = make()
        transport = self.dial(host, port, protocol)
        if transport.never:
            await asyncio.get_running_loop().create_future()
        protocol.connection_made(transport)
        try:
            await asyncio.sleep(0)  # as in a real loop, other callbacks run before the caller goes on
        except asyncio.CancelledError:
            transport.abort()  # as uvloop does
            raise
        return transport, protocol


def refuse_all(host: str, port: int, protocol: UpstreamConnection) -> FakeTransport:
    raise ConnectionRefusedError(111, "Connection refused")


class FakeTransport(asyncio.Transport):
    """A socket as uvloop shows it. The peer takes `capacity` bytes and then no more until it reads."""

    def __init__(self, loop: FakeLoop, protocol: Any, capacity: int = PLENTY) -> None:
        super().__init__()
        self.loop = loop
        self.protocol = protocol
        self.capacity = capacity
        self.sent = bytearray()  # bytes that the peer has taken
        self.held = bytearray()  # bytes that wait in user space
        self.writes = 0
        self.never = False  # no connection is ever established
        self.reading = True
        self.unread: list[bytes | None] = []  # sent by the peer while the protocol did not read; None: a FIN
        self.eof_sent = False
        self.closed = False  # close() or abort() was called, or the peer is gone
        self.aborted = False
        self.lost = False
        self.is_reset = False  # by the peer, and connection_lost() has not been called yet
        self.peer: tuple[str, int] | str = ("192.0.2.1", 40000)  # "": on a Unix socket
        self._paused = False

    # -- calls of the protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": self.peer}.get(name, default)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high == 0, "a slow reader is noticed at once"

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def get_write_buffer_size(self) -> int:
        return len(self.held)

    def write(self, data: Any) -> None:
        if self.is_reset:
            return  # as uvloop does: the protocol can't know yet
        if self.closed or self.eof_sent:
            raise RuntimeError("unable to perform operation; the handler is closed")
        assert data, "an empty write"
        self.writes += 1
        self.held += data
        self._flush()
        if self.held and not self._paused:
            self._paused = True
            self.protocol.pause_writing()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.eof_sent = True

    def is_reading(self) -> bool:
        return self.reading

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True
        if self.unread:
            self.loop.call_soon(self._deliver)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True
        if not self.held:
            self._lose(None)

    def abort(self) -> None:
        self.closed = self.aborted = True
        self.held.clear()
        self._lose(None)

    # -- actions of the peer

    def feed(self, data: bytes) -> None:
        """Send to the protocol, which gets the bytes once it reads; bytes after a close are dropped."""
        self.unread.append(data)
        self._deliver()

    def fin(self) -> None:
        """Half-close."""
        self.unread.append(None)
        self._deliver()

    def _deliver(self) -> None:
        while self.unread and self.reading and not self.closed:
            data = self.unread.pop(0)
            if data is not None:
                self.protocol.data_received(data)
            elif not self.protocol.eof_received():
                self.close()

    def read_past(self) -> bytes:
        """As net/reading.py's read_past() of a paused transport."""
        assert not self.reading
        if self.is_reset:
            raise ConnectionResetError(104, "Connection reset by peer")
        come = b""
        while self.unread and self.unread[0] and not self.closed:
            come += self.unread.pop(0) or b""
        if come[READ_BYTES_MAX:]:
            self.unread.insert(0, come[READ_BYTES_MAX:])
        return come[:READ_BYTES_MAX]

    def reset(self, error: Exception | None = None) -> None:
        self.closed = self.is_reset = True
        self.held.clear()
        self._lose(error or ConnectionResetError(104, "Connection reset by peer"))

    def take(self, count: int = PLENTY) -> None:
        """Read `count` more bytes; once everything is written, the protocol may go on."""
        self.capacity += count
        self._flush()
        if self.held:
            return
        if self._paused and not self.closed:
            self._paused = False
            self.protocol.resume_writing()
        if self.closed:
            self._lose(None)

    def _flush(self) -> None:
        taken = min(self.capacity, len(self.held))
        self.sent += self.held[:taken]
        del self.held[:taken]
        self.capacity -= taken

    def _lose(self, error: Exception | None) -> None:
        if not self.lost:
            self.lost = True
            self.loop.call_soon(self._tell_lost, error)

    def _tell_lost(self, error: Exception | None) -> None:
        self.is_reset = False
        self.protocol.connection_lost(error)


@dataclass
class Answer:
    """A response as a reader got it."""

    status: int
    head: ResponseHead
    body: bytes
    whole: bool  # the body ended as HTTP requires

    def get(self, name: str) -> str | None:
        value = self.head.get(name.encode())
        return None if value is None else value.decode()

    @property
    def error(self) -> dict[str, Any]:
        """The error object of streamd's own answers."""
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


def answers_in(wire: bytes, methods: tuple[str, ...] = (), *, at_end: bool = True) -> list[Answer]:
    """All final responses in the bytes of a connection. `at_end`: the connection has ended."""
    answers: list[Answer] = []
    while wire:
        found = HeadReader(opening=RESPONSE_OPENING).feed(wire)
        assert found is not None, wire
        head = parse_response(found[0], methods[len(answers)] if len(answers) < len(methods) else "GET")
        wire = found[1]
        if head.status < 200:
            continue
        body, whole, wire = _body_of(head, wire, at_end)
        answers.append(Answer(head.status, head, body, whole))
    return answers


def _body_of(head: ResponseHead, wire: bytes, at_end: bool) -> tuple[bytes, bool, bytes]:
    if head.framing is Framing.CHUNKED:
        decoder = ChunkedDecoder()
        body = b"".join(decoder.feed(wire))
        return body, decoder.done, decoder.rest
    if head.framing is Framing.UNTIL_CLOSE:
        return wire, at_end, b""
    return wire[: head.content_length], len(wire) >= head.content_length, wire[head.content_length :]


class Client:
    """A connection from outside."""

    def __init__(self, rig: Rig, capacity: int = PLENTY, listener: str = "loopback") -> None:
        self.rig = rig
        self.connection = ClientConnection(rig.worker.application, rig.worker.entrance(listener))
        self.transport = FakeTransport(rig.loop, self.connection, capacity)
        self.methods: tuple[str, ...] = ()  # of requests, for answers without a body (HEAD)
        self.connection.connection_made(self.transport)

    def send(self, data: bytes) -> None:
        self.transport.feed(data)
        self.rig.turn()

    def fin(self) -> None:
        self.transport.fin()
        self.rig.turn()

    def reset(self, error: Exception | None = None) -> None:
        self.transport.reset(error)
        self.rig.turn()

    def take(self, count: int = PLENTY) -> None:
        self.transport.take(count)
        self.rig.turn()

    @property
    def raw(self) -> bytes:
        return bytes(self.transport.sent)

    @property
    def answers(self) -> list[Answer]:
        return answers_in(self.raw, self.methods, at_end=self.transport.lost)

    @property
    def answer(self) -> Answer:
        """The only answer."""
        (found,) = self.answers
        return found

    @property
    def statuses(self) -> list[int]:
        return [answer.status for answer in self.answers]

    @property
    def gone(self) -> bool:
        return self.transport.lost


class Rig:
    """A Worker that reaches only the clients and upstreams that the test plays."""

    def __init__(self, **settings: Any) -> None:
        self.loop = FakeLoop()
        self.loop.set_exception_handler(self._unhandled)
        self.loop.dial = self._dial
        settings.setdefault("models_refresh_s", 0.0)
        settings.setdefault("upstreams", (UpstreamSettings(name="up", url="http://up.test:1"),))
        self.worker = Worker(self.loop, Settings(**settings))
        self.runtime = self.worker.runtime
        self.runtime.on_bug = lambda where, error: self.bugs.append(error)
        self._ended = self.worker.application.ended
        self.worker.application.ended = self._request_ended
        self.worker.start()
        for upstream in self.worker.upstreams:
            upstream.health.is_doubtful = False  # as after its first answer: a request goes out in the same turn
        self.bugs: list[BaseException] = []
        self.refusing: set[int] = set()  # ports
        self.mute: set[int] = set()  # ports that never answer a SYN
        self.slamming: set[int] = set()  # ports that accept and close at once
        self.links: list[FakeTransport] = []
        self.dialled: list[int] = []
        self.ended: list[tuple[str, CloseReason | None, int]] = []  # (method and path, reason, status) of requests
        self.turn()

    def _dial(self, host: str, port: int, protocol: UpstreamConnection) -> FakeTransport:
        self.dialled.append(port)
        if port in self.refusing:
            refuse_all(host, port, protocol)
        transport = FakeTransport(self.loop, protocol)
        transport.never = port in self.mute
        if not transport.never:
            self.links.append(transport)
        if port in self.slamming:
            self.loop.call_soon(transport.fin)
        return transport

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.bugs.append(context.get("exception") or RuntimeError(context["message"]))

    def _request_ended(self, answer: net_answer.Answer) -> None:
        request = answer.request
        self.ended.append((f"{request.method} {request.path}", request.reason, request.status))
        self._ended(answer)

    # -- time

    def turn(self) -> None:
        """Run the loop until it is at rest; no time passes."""
        for _ in range(TURNS_MAX):
            self.loop.run_until_complete(asyncio.sleep(0))
            if not self.loop._ready:  # type: ignore[attr-defined]
                return
        raise RuntimeError("never comes to rest")

    def pass_time(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))
        self.turn()

    def pass_quietly(self, seconds: float) -> None:
        """Let a long time pass in which only deadlines occur, each noticed up to three sweeps late.

        Why coarse: 1,440 sweeps at the end of each test cost ten times as much as the requests of the test.
        """
        with mock.patch.object(sweep, "INTERVAL_S", QUIET_SWEEP_S):
            self.pass_time(seconds + 3 * QUIET_SWEEP_S)

    # -- both sides

    def client(self, data: bytes = b"", *, capacity: int = PLENTY, listener: str = "loopback") -> Client:
        client = Client(self, capacity, listener)
        if data:
            client.send(data)
        return client

    @property
    def link(self) -> FakeTransport:
        """The connection to an upstream opened last."""
        return self.links[-1]

    def reply(self, data: bytes) -> None:
        """Feed these bytes as the answer of the upstream that was asked last."""
        self.link.feed(data)
        self.turn()

    @property
    def exchanges(self) -> list[Exchange]:
        return [member for member in self.runtime.sweep._members if isinstance(member, Exchange)]

    @property
    def closed(self) -> dict[CloseReason, int]:
        """Connections by the reason of their end."""
        return {reason: count for reason, count in self.runtime.counters.connections_closed.items() if count}

    # -- the end

    def check_nothing_is_left(self) -> None:
        runtime = self.runtime
        for client in tuple(runtime.clients):
            client.abort(CloseReason.DRAINING)
        self.turn()
        settings = runtime.settings
        graces = settings.retention_s, settings.detach_grace_max_s, settings.resume_grace_s
        self.pass_quietly(max(settings.pool_idle_timeout_s, *graces) + settings.retention_s)
        assert self.bugs == []
        assert runtime.counters.bugs == 0
        assert runtime.bodies_bytes == 0
        assert not runtime.clients
        assert len(runtime.sweep) == 0
        assert [upstream.in_flight for upstream in self.worker.upstreams] == [0] * len(self.worker.upstreams)
        in_use = runtime.admission.status()["in_use"]
        assert in_use == dict.fromkeys(in_use, 0), in_use  # type: ignore[call-overload]
        assert not runtime.pacing.answers and not runtime.pacing._due
        assert not tuple(runtime.hub) and runtime.hub.log_bytes == 0 and runtime.hub.detached == 0
        assert not runtime.hub._by_key and not runtime.hub._by_response and not runtime.hub._forget_on_remove
        links = [getattr(link.protocol, "_connection", link.protocol) for link in self.links]  # some ended while frozen
        assert all(link.closed for link in self.links) and all(link.at is UpstreamState.CLOSED for link in links)


@contextlib.contextmanager
def rig(**settings: Any) -> Iterator[Rig]:
    """A rig that may leave nothing behind at its end. Settings are the attributes of `Settings`, unchecked."""
    level = logs._sink.level
    logs.set_level("error")
    made = Rig(**settings)
    try:
        with mock.patch.object(net_upstream, "read_past", FakeTransport.read_past):
            yield made
            made.check_nothing_is_left()
    finally:
        made.runtime.sweep.stop()
        logs._sink.level = level
        made.loop.close()


class FakePeers:
    """The other worker of a daemon, for a rig that is the worker at slot 0: `told` has what the rig tells it, `theirs`
    the names that belong to it. `asked` are the questions for it, with the callback that takes the answers by slot.
    """

    slot = 0

    def __init__(self, r: Rig, *theirs: str) -> None:
        self.theirs = theirs
        self.told: list[tuple[int, str, bytes]] = []
        self.asked: list[tuple[str, dict[int, bytes], Callable[[dict[int, bytes]], None]]] = []
        runtime: Any = r.runtime
        runtime.peers = runtime.inquiries = self

    def others(self) -> list[int]:
        return [1]

    def tell(self, slot: int, kind: str, body: bytes) -> bool:
        self.told.append((slot, kind, body))
        return True

    def ask(self, kind: str, questions: dict[int, bytes], over: Callable[[dict[int, bytes]], None]) -> None:
        self.asked.append((kind, questions, over))

    def owner_of_name(self, *parts: str) -> int:
        return int(parts[-1] in self.theirs)

    def owner_of_stream(self, stream_id: str) -> int:
        return int(stream_id in self.theirs)

    def lighter(self, now: float) -> int | None:
        return None


# -- bytes


def get(path: str = "/healthz", *fields: str, method: str = "GET", version: str = "1.1") -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/{version}", "Host: streamd.localhost", *fields, "", "")).encode()


def post(body: bytes | dict[str, Any], *fields: str, path: str = "/v1/chat/completions", version: str = "1.1") -> bytes:
    """A POST with a length; a dict goes as JSON."""
    if isinstance(body, dict):
        body = json.dumps(body).encode()
        fields = ("Content-Type: application/json", *fields)
    return get(path, *fields, f"Content-Length: {len(body)}", method="POST", version=version) + body


CHAT: dict[str, Any] = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
WHOLE: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}

SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def event(text: str, index: int = 0) -> bytes:
    """A chat delta."""
    choice = {"index": index, "delta": {"content": text}, "finish_reason": None}
    body = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def chunk(*payloads: bytes) -> bytes:
    return b"".join(map(encode_chunk, payloads))


def whole_answer(body: bytes, status: str = "200 OK", *fields: str) -> bytes:
    head = "\r\n".join((f"HTTP/1.1 {status}", f"content-length: {len(body)}", *fields, "", ""))
    return head.encode() + body


@dataclass
class Read:
    """An event as a reader got it."""

    id: str | None
    name: str | None
    data: bytes

    @property
    def seq(self) -> int:
        assert self.id is not None
        return int(self.id.rpartition(":")[2])

    @property
    def json(self) -> Any:
        return json.loads(self.data)


def events_in(body: bytes) -> list[Read]:
    """The events of an SSE body by the standard's rules; asserts that no block is without data."""
    blocks = body.split(b"\n\n")
    events: list[Read] = []
    for block in blocks[:-1]:
        found = Read(None, None, b"")
        data: list[bytes] = []
        for line in block.split(b"\n"):
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"data":
                data.append(value)
            elif field == b"id":
                found.id = value.decode("utf-8", "replace")
            elif field == b"event":
                found.name = value.decode("utf-8", "replace")
        assert data, f"a blank line without data before it: {block!r}"
        found.data = b"\n".join(data)
        events.append(found)
    return events


def text_of(events: list[Read]) -> str:
    """The text of the chat deltas among the events."""
    said = ""
    for each in events:
        if each.data.startswith(b"{"):
            said += "".join(choice["delta"].get("content") or "" for choice in each.json.get("choices", ()))
    return said
