"""streamd in a thread: a Worker on loopback, the mock or a scripted server behind it, and optionally a TCP relay in
front of it that keeps the passing bytes and cuts connections where a test says so."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import struct
import threading
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, BinaryIO, Protocol, TypeVar

import uvloop

from streamd.addresses import parse_address
from streamd.config import Settings, UpstreamSettings
from streamd.daemon import listen, logs
from streamd.daemon.control import DaemonState
from streamd.daemon.worker import Worker
from streamd.mockllm import Faults, MockOptions, MockServer, parse_faults, start_mock
from streamd.reasons import CloseReason

T = TypeVar("T")


class Front(Protocol):
    """A relay that runs in the worker's loop, in front of the worker."""

    async def start(self) -> None: ...

    def close(self) -> None: ...


F = TypeVar("F", bound=Front)

WAIT_S = 60.0  # a test that waits longer for a condition has failed
FAST = MockOptions(interval_s=0, ttft_s=0, tokens=20)


def url_of(name: tuple[str, int]) -> str:
    """The URL of a bound socket's address."""
    return f"http://{name[0]}:{name[1]}"


class Watched:
    """State that a thread's loop changes and other threads wait for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()

    def changed(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def until(self, reached: Callable[[], bool]) -> None:
        """Wait until the condition holds. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(reached, WAIT_S):
                raise TimeoutError(f"still waiting after {WAIT_S:g} s")


class Live:
    """A worker and its upstream, on the same loop in a thread. All methods may be called from the test's thread."""

    def __init__(self, settings: Settings, options: MockOptions) -> None:
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._options = options
        self._settings = settings
        self._closing: list[Callable[[], None]] = []
        self.mock: MockServer
        self.worker: Worker
        self.url = ""

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run the coroutine in the worker's loop and wait for its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(WAIT_S + 5)

    def start(self) -> None:
        self._thread.start()
        self.call(self._start())

    async def _start(self) -> None:
        settings = self._settings
        self.mock = await start_mock(self.loop, options=self._options)
        if not settings.upstreams:
            settings = dataclasses.replace(settings, upstreams=(UpstreamSettings(name="mock", url=self.mock.url),))
        self.worker = Worker(self.loop, settings)
        sock = listen.bind(parse_address("127.0.0.1:0"))
        self.url = url_of(sock.getsockname())
        await self.worker.listen([sock], "")
        self.worker.runtime.sweep.start()
        self.worker.state = DaemonState.SERVING

    def stop(self) -> None:
        self.call(self._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_S)
        self.loop.close()

    async def _stop(self) -> None:
        self.worker.runtime.sweep.stop()
        for of_operators in (False, True):
            for server in self.worker._servers[of_operators]:
                server.close()
            for sock in self.worker._sockets[of_operators]:
                sock.close()
        for client in tuple(self.worker.runtime.clients):
            client.abort(CloseReason.DRAINING)
        for close in self._closing:
            close()
        self.mock.close()
        await asyncio.sleep(0)  # a turn for the callbacks of the closed connections

    def fault(self, words: str, **options: Any) -> None:
        """Set the mock's faults from here on (`break-fin=3; crlf`), and other options of it."""
        self.mock.options = dataclasses.replace(self._options, faults=parse_faults(words, Faults()), **options)

    def until(self, **counters: int) -> None:
        """Wait until the mock's counters have these values: `until(aborted=1)`."""
        self.call(
            self.mock.stats.until(
                lambda stats: all(getattr(stats, name) == value for name, value in counters.items()), WAIT_S
            )
        )

    def said(self, prompt: str) -> str:
        """The mock's whole text for a prompt, asked for without streamd."""
        body = json.dumps({"model": "mock-llm", "messages": [{"role": "user", "content": prompt}]}).encode()
        at_once = {"X-Mock-Fault": "", "X-Mock-Interval-Ms": "0", "X-Mock-Ttft-Ms": "0"}
        request = urllib.request.Request(f"{self.mock.url}/v1/chat/completions", body, at_once)
        with urllib.request.urlopen(request) as response:
            return str(json.load(response)["choices"][0]["message"]["content"])

    def generations(self) -> int:
        """The number of streams that the mock was asked for."""
        bodies = [seen.body for seen in self.mock.stats.seen if seen.body]
        return sum(json.loads(body).get("stream") is True for body in bodies)

    def relay(self, cut_after: Callable[[int], int | None] = lambda number: None) -> TcpRelay:
        """A TCP relay in front of streamd."""
        return self.in_front(TcpRelay(self.url, cut_after))

    def in_front(self, front: F) -> F:
        """Start a relay of any kind in the worker's thread; it ends with the worker."""
        self._closing.append(front.close)
        self.call(front.start())
        return front


@contextlib.contextmanager
def live(options: MockOptions = FAST, **settings: Any) -> Iterator[Live]:
    """A running streamd. Settings are the attributes of `Settings`, unchecked: a heartbeat may take 10 ms."""
    served = Live(Settings(**settings), options)
    logs.set_level("warning")
    served.start()
    try:
        yield served
    finally:
        served.stop()
        logs.set_level("info")


class TcpRelay(Watched):
    """Copies bytes both ways. `down[i]` went to connection i, which is reset after `cut_after(i)` of these bytes."""

    def __init__(self, target: str, cut_after: Callable[[int], int | None]) -> None:
        super().__init__()
        self.cut_after = cut_after
        self.down: list[bytearray] = []
        self.up: list[bytearray] = []
        self.url = ""
        self._host, _, port = target.removeprefix("http://").rpartition(":")
        self._port = int(port)
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._server: asyncio.Server

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = url_of(self._server.sockets[0].getsockname())

    def close(self) -> None:
        """Stop accepting, and reset every connection. In the loop's thread."""
        self._server.close()
        for pair in tuple(self._pairs):
            _reset(pair)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._pass(reader, writer)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes = b"") -> None:
        """Relay a connection; `first` was read from it already."""
        number = len(self.down)
        self.down.append(bytearray())
        self.up.append(bytearray(first))
        limit = self.cut_after(number)
        back_reader, back_writer = await asyncio.open_connection(self._host, self._port)
        pair = (writer, back_writer)
        self._pairs.add(pair)
        back_writer.write(first)
        upwards = asyncio.ensure_future(self._copy(reader, back_writer, self.up[number], None))
        if await self._copy(back_reader, writer, self.down[number], limit):
            _reset(pair)
        await upwards
        self._pairs.discard(pair)

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray, limit: int | None
    ) -> bool:
        """Copy until the end of `reader`, or return True once `limit` bytes were passed."""
        cut = False
        with contextlib.suppress(ConnectionError):
            while not cut and (piece := await reader.read(65536)):
                cut = limit is not None and len(kept) + len(piece) >= limit
                piece = piece[: limit - len(kept)] if cut and limit is not None else piece
                kept += piece
                writer.write(piece)
                self.changed()
                await writer.drain()
        if not cut:
            writer.close()
        self.changed()
        return cut


def _reset(pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter]) -> None:
    """End a connection with an RST on both sides (SO_LINGER of 0 s, socket(7))."""
    for writer in pair:
        sock = writer.get_extra_info("socket")
        if sock is not None and not writer.transport.is_closing():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


@contextlib.contextmanager
def scripted(pieces: Callable[[], Iterator[bytes]]) -> Iterator[str]:
    """A server for a single request; yields its address. The generator gives the answer's bytes, and may wait."""

    def serve() -> None:
        with contextlib.suppress(OSError):  # closed before any connection
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as request:
                _read_request(request)
                for piece in pieces():
                    connection.sendall(piece)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield url_of(listener.getsockname())
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the scripted server still waits"


def _read_request(request: BinaryIO) -> None:
    length = 0
    while (line := request.readline()) not in (b"\r\n", b""):
        if line.lower().startswith(b"content-length:"):
            length = int(line.partition(b":")[2])
    request.read(length)
