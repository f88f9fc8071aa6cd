"""streamd over real sockets: a Worker on uvloop, its upstreams and its readers, all in the test's own loop on loopback.

`async with serving() as d:` gives a Daemon with a mock behind it. No test sleeps in place of a condition:
`d.until(...)` waits for a condition, and `d.later(seconds)` runs the deadlines of requests as if time had passed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import uvloop
from fakes import LAST, Answer, answers_in

from streamd.addresses import parse_address
from streamd.config import Settings, UpstreamSettings
from streamd.core.stream import Stream
from streamd.daemon import listen, logs
from streamd.daemon.worker import Worker
from streamd.mockllm import MockOptions, MockServer, start_mock
from streamd.net import client
from streamd.net.exchange import Exchange
from streamd.net.upstream import UpstreamConnection
from streamd.reasons import CloseReason

PATIENCE_S = 60.0  # a test that waits longer for a condition has failed
FAST = MockOptions(interval_s=0, ttft_s=0, tokens=20)
ENOUGH = 1 << 30


class Conn:
    """A client's connection: the bytes received so far, and whether the other side has closed."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str) -> None:
        self._reader = reader
        self._writer = writer
        self._methods = (method,)
        self._received = bytearray()
        self.closed = False
        self.reset = False

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def read(self, count: int = 65536) -> bytes:
        """The next bytes; empty at the end, even at an abrupt end."""
        try:
            piece = await asyncio.wait_for(self._reader.read(count), PATIENCE_S)
        except ConnectionError:
            self.reset = True
            piece = b""
        self._received += piece
        self.closed = self.closed or not piece
        return piece

    @property
    def received(self) -> bytes:
        return bytes(self._received)

    async def until(self, reached: Callable[[Conn], bool]) -> None:
        """Read on until the condition holds. Raises EOFError if the connection ends before."""
        while not reached(self):
            if not await self.read():
                raise EOFError(self.received[-300:])

    async def to_the_end(self) -> bytes:
        while await self.read():
            pass
        return self.received

    @property
    def answers(self) -> list[Answer]:
        if b"\r\n\r\n" not in self.received:
            return []
        return answers_in(self.received, self._methods, at_end=self.closed)

    async def answer(self) -> Answer:
        """Read the first answer until it is whole or the connection has ended."""
        while not (self._may_be_whole() and self.answers and self.answers[0].whole):
            if not await self.read():
                break
        return self.answers[0]

    def _may_be_whole(self) -> bool:
        """Whether parsing is worth it: long streams come in thousands of reads."""
        return b"\r\ntransfer-encoding: chunked\r\n" not in self._received[:2000] or self._received.endswith(LAST)

    async def begun(self) -> Answer:
        """Wait for the head of the first answer; return the answer as far as it has arrived."""
        await self.until(lambda conn: bool(conn.answers))
        return self.answers[0]

    def fin(self) -> None:
        self._writer.write_eof()

    def abort(self) -> None:
        """Close with an RST."""
        self._writer.transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
        )
        self._writer.transport.abort()

    def close(self) -> None:
        self._writer.transport.abort()


Script = Callable[["RawUpstream", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class RawUpstream:
    """A server that runs a script for each connection, after it has read the request."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._server: asyncio.Server
        self.connections = 0
        self.open = 0
        self.requests: list[bytes] = []
        self.go = asyncio.Event()  # for scripts to wait for
        self.url = ""

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.url = f"http://{host}:{port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                self.requests.append(await _read_request(reader))
                await self._script(self, reader, writer)
        finally:
            self.open -= 1
            writer.close()

    def close(self) -> None:
        self._server.close()


async def _read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return head + await reader.readexactly(int(line.partition(b":")[2]))
    return head


def says(*pieces: bytes) -> Script:
    """A script that sends these pieces and a FIN."""

    async def script(upstream: RawUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()

    return script


class Daemon:
    """A running worker. `mock` is the upstream unless others were given."""

    def __init__(self, worker: Worker, mock: MockServer, port: int) -> None:
        self.worker = worker
        self.runtime = worker.runtime
        self.loop = worker.loop
        self.mock = mock
        self.port = port
        self.bugs: list[tuple[str, BaseException]] = []
        self.exchanges_seen: weakref.WeakSet[Exchange] = weakref.WeakSet()
        self.ended: list[tuple[str, CloseReason | None]] = []
        self._conns: list[Conn] = []
        self._watch()

    def _watch(self) -> None:
        runtime, application = self.runtime, self.worker.application
        add, request_ended = runtime.sweep.add, application.ended

        def added(member: Any) -> None:
            if isinstance(member, Exchange):
                self.exchanges_seen.add(member)
            add(member)

        def ended(answer: Any) -> None:
            self.ended.append((answer.request.path, answer.request.reason))
            request_ended(answer)

        runtime.sweep.add = added  # type: ignore[method-assign]
        application.ended = ended
        runtime.on_bug = lambda where, error: self.bugs.append((where, error))
        self.loop.set_exception_handler(
            lambda loop, context: self.bugs.append(
                (context["message"], context.get("exception") or RuntimeError(str(context)))
            )
        )

    # -- clients

    async def connect(
        self, data: bytes = b"", *, method: str = "GET", receive_bytes: int = 0, limit: int = 65536
    ) -> Conn:
        """A connection; `receive_bytes` bounds its kernel buffer, `limit` the bytes that its reader buffers."""
        sock = socket.socket()
        sock.setblocking(False)
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        await self.loop.sock_connect(sock, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=limit)
        conn = Conn(reader, writer, method)
        self._conns.append(conn)
        if data:
            await conn.send(data)
        return conn

    async def ask(self, data: bytes, *, method: str = "GET") -> Answer:
        """Send a request on a new connection and return the answer."""
        conn = await self.connect(data, method=method)
        try:
            return await conn.answer()
        finally:
            conn.close()

    # -- conditions

    async def until(self, reached: Callable[[], object]) -> None:
        async def wait() -> None:
            while not reached():  # noqa: ASYNC110 (most conditions are plain integers of the daemon's)
                await asyncio.sleep(0.001)

        try:
            await asyncio.wait_for(wait(), PATIENCE_S)
        except TimeoutError:
            raise TimeoutError(f"still waiting: {self.left()}, mock {self.mock.stats.as_json()}") from None

    @property
    def exchanges(self) -> list[Exchange]:
        return [member for member in self.runtime.sweep._members if isinstance(member, Exchange)]

    @property
    def streams(self) -> list[Stream]:
        return list(self.runtime.hub)

    def later(self, seconds: float) -> None:
        """Run the deadlines of requests to upstreams as if `seconds` had passed."""
        for exchange in self.exchanges:
            exchange.due_at = exchange.on_due(self.loop.time() + seconds)

    def sweep_later(self, seconds: float) -> None:
        """Run the deadlines of streams (retention, graces) as if `seconds` had passed."""
        self.runtime.hub.sweep(self.streams, self.loop.time() + seconds)

    def close_listeners(self) -> None:
        for servers in self.worker._servers.values():
            for server in servers:
                server.close()
        for sockets in self.worker._sockets.values():
            for sock in sockets:
                sock.close()

    def left(self) -> dict[str, object]:
        """Counts of all objects that belong to requests."""
        return {
            "exchanges": len(self.exchanges),
            "in_flight": sum(upstream.in_flight for upstream in self.worker.upstreams),
            "bodies_bytes": self.runtime.bodies_bytes,
            "running": sum(stream.reason is None for stream in self.streams),
            "readers": sum(len(stream.readers) for stream in self.streams),
            "detached": self.runtime.hub.detached,
        }

    async def check_nothing_is_left(self) -> None:
        """Check that no exchange, no running stream, no unpooled upstream connection and no body bytes are left."""
        for conn in self._conns:
            conn.close()
        self._conns.clear()
        await self.until(lambda: not self.runtime.clients)
        await self.until(lambda: not any(self.left().values()))
        self.sweep_later(10_000)
        assert self.streams == [] and self.runtime.hub.log_bytes == 0
        for upstream in self.worker.upstreams:
            upstream.close_idle()
        await self.until(lambda: not any(alive(UpstreamConnection, self.exchanges_seen)))
        await self.mock.stats.until(lambda stats: stats.connections_open == 0 and stats.open == 0)
        if self.exchanges_seen:
            gc.collect()
        assert not self.exchanges_seen, "an exchange outlives its request"
        assert self.bugs == []


def alive(kind: type, exchanges: weakref.WeakSet[Exchange]) -> list[bool]:
    """Whether the connections of exchanges that are still referred to are open."""
    return [exchange._attempt is not None and exchange._attempt.link is not None for exchange in exchanges]


@contextlib.asynccontextmanager
async def serving(
    options: MockOptions = FAST, *, upstreams: tuple[UpstreamSettings, ...] | None = None, **settings: Any
) -> AsyncIterator[Daemon]:
    """A listening worker that may leave nothing behind. Settings are the attributes of `Settings`, unchecked."""
    level, broken_end_s = logs._sink.level, client.BROKEN_END_S
    logs.set_level("error")
    client.BROKEN_END_S = 0.0  # the delay is for browsers; no test here has a browser
    loop = asyncio.get_running_loop()
    mock = await start_mock(loop, options=options)
    if upstreams is None:
        upstreams = (UpstreamSettings(name="mock", url=mock.url),)
    worker = Worker(loop, Settings(upstreams=upstreams, **settings))
    sock = listen.bind(parse_address("127.0.0.1:0"))
    daemon = Daemon(worker, mock, sock.getsockname()[1])
    await worker.listen([sock])
    worker.start()
    try:
        yield daemon
        await daemon.check_nothing_is_left()
    finally:
        worker.runtime.sweep.stop()
        daemon.close_listeners()
        mock.close()
        logs._sink.level, client.BROKEN_END_S = level, broken_end_s


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test on a new uvloop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


@contextlib.contextmanager
def nobody_listens() -> Any:
    """The URL of a port at which connections are refused."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"


@contextlib.asynccontextmanager
async def raw_upstream(script: Script) -> AsyncIterator[RawUpstream]:
    upstream = RawUpstream(script)
    await upstream.start()
    try:
        yield upstream
    finally:
        upstream.close()
