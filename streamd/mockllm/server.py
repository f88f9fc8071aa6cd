"""The mock's listener, and the single ticker that paces all of its answers."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections import deque
from dataclasses import replace
from typing import Final

import orjson

from streamd.mockllm import routes
from streamd.mockllm.answer import MockAnswer
from streamd.mockllm.ask import BadAsk
from streamd.mockllm.connection import Connection
from streamd.mockllm.faults import NO_FAULTS, BadOption
from streamd.mockllm.options import MockOptions
from streamd.mockllm.stats import SEEN_BODY_BYTES_MAX, Seen, Stats
from streamd.mockllm.wheel import Wheel
from streamd.wire.http1 import RequestHead

BACKLOG: Final = 4096
# uvloop accepts one connection per listener and loop turn: 16 dups took 2,900 a second, a single listener 200.
LISTENERS: Final = 16
WAKES_PER_TURN_MAX: Final = 500  # about 5 ms of writes; the loop reads from its sockets in between
NOTSENT_LOWAT_BYTES: Final = 16_384  # without it the kernel takes megabytes for a reader that has stopped reading
QUIET: Final = MockOptions()  # all defaults, no faults


class MockServer:
    """A listening mock. `url` is its address, `stats` its counters; `options` may be replaced between requests."""

    def __init__(self, loop: asyncio.AbstractEventLoop, options: MockOptions) -> None:
        self.options = options
        self.stats = Stats()
        self.url = ""
        self._loop = loop
        self._random = random.Random(options.seed)
        self._listeners: list[asyncio.Server] = []
        self._connections: set[Connection] = set()
        self._serial = 0
        self._faulty = 0
        # the ticker
        self._wheel: Wheel[MockAnswer] = Wheel(loop.time())
        self._ready: deque[MockAnswer] = deque()
        self._ticker: asyncio.Handle | None = None

    async def listen(self, host: str, port: int) -> None:
        """Bind and accept; port 0 lets the kernel choose. Raises OSError."""
        first = _listening_socket(host, port)
        bound_port = first.getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{bound_port}"
        sockets = [first, *(first.dup() for _ in range(LISTENERS - 1))]
        for sock in sockets:
            self._listeners.append(await self._loop.create_server(lambda: Connection(self), sock=sock, backlog=BACKLOG))

    def close(self) -> None:
        """Stop listening and cut every connection."""
        for listener in self._listeners:
            listener.close()
        for connection in tuple(self._connections):
            connection.abort()
        if self._ticker is not None:
            self._ticker.cancel()

    # Calls of connections.

    def connected(self, connection: Connection) -> None:
        """A connection was accepted."""
        self._connections.add(connection)
        self.stats.connections += 1
        self.stats.connections_open += 1
        self.stats.changed()

    def disconnected(self, connection: Connection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)
        self.stats.connections_open -= 1
        self.stats.changed()

    def completed(self) -> None:
        """An answer was sent whole."""
        self.stats.completed += 1
        self._ended()

    def paused(self) -> None:
        """A peer takes no more bytes for now."""
        self.stats.pauses += 1
        self.stats.changed()

    def aborted(self) -> None:
        """The peer left in the middle of an answer."""
        self.stats.aborted += 1
        self.stats.aborted_at.append(time.monotonic())
        self._ended()

    def broke(self) -> None:
        """A fault ended an answer."""
        self.stats.broken += 1
        self._ended()

    def _ended(self) -> None:
        self.stats.open -= 1
        self.stats.changed()

    def received(self, connection: Connection, head: RequestHead, body: bytes) -> None:
        """A whole request: answer it."""
        about_itself = {"/mock/stats": self.stats.as_json, "/mock/requests": self.stats.seen_as_json}.get(head.path)
        if about_itself is not None:
            self._answer(connection, head, routes.whole(200, orjson.dumps(about_itself()), QUIET), QUIET)
            return
        self._count(head, body)
        try:
            options = self._limited(self.options.for_request(head.get))
            if options.faults.close_on_reuse and connection.requests > 1:
                connection.close()
                return
            self._serial += 1
            reply = routes.reply_to(head, body, options, self._serial)
        except (BadOption, BadAsk) as wrong:
            payload = routes.error_body(400, str(wrong), head.path, getattr(wrong, "param", None))
            options, reply = QUIET, routes.whole(400, payload, QUIET)
        self._answer(connection, head, reply, options)

    def _count(self, head: RequestHead, body: bytes) -> None:
        path = head.path if head.path in routes.ALLOWED else "other"
        self.stats.requests[f"{head.method} {path}"] += 1
        self.stats.seen.append(Seen(head.method, head.target, head.headers, body[:SEEN_BODY_BYTES_MAX]))
        self.stats.changed()

    def _limited(self, options: MockOptions) -> MockOptions:
        """The options, without their faults once `first` requests have had them."""
        if options.faults.first is None:
            return options
        self._faulty += 1
        return options if self._faulty <= options.faults.first else replace(options, faults=NO_FAULTS)

    def _answer(self, connection: Connection, head: RequestHead, reply: routes.Reply, options: MockOptions) -> None:
        opening = routes.opening(reply, head, options, self.stats.requests_total)
        if head.method == "HEAD":
            reply = routes.whole(reply.status, b"", QUIET)
        if not reply.is_stream:
            options = replace(options, interval_s=0.0, jitter_s=0.0)  # the halves of a body follow each other at once
        now = self._loop.time()
        answer = MockAnswer(
            connection, opening.wire, reply.body, opening.is_chunked, options, now + reply.delay_s, self._random
        )
        self.stats.open += 1
        connection.begin(answer, opening.keeps)
        if options.faults.early_head:
            answer.send_head_early()
        if reply.delay_s or answer.wake(now):
            self._schedule(answer, now)
        self.stats.changed()

    # The ticker.

    def _schedule(self, answer: MockAnswer, now: float) -> None:
        if answer.due <= now:
            self._ready.append(answer)
        else:
            self._wheel.add(answer)
        if self._ticker is None:
            self._plan_tick()

    def _plan_tick(self) -> None:
        if self._ready:
            self._ticker = self._loop.call_soon(self._tick)
        elif self._wheel:
            self._ticker = self._loop.call_at(self._wheel.next_turn(), self._tick)
        else:
            self._ticker = None

    def _tick(self) -> None:
        """Wake the answers that are due, up to WAKES_PER_TURN_MAX; the next turn wakes the rest."""
        now = self._loop.time()
        self._ready.extend(self._wheel.turn(now))
        for _ in range(min(len(self._ready), WAKES_PER_TURN_MAX)):
            answer = self._ready.popleft()
            if not answer.wake(now):
                continue
            if answer.due <= now:
                self._ready.append(answer)
            else:
                self._wheel.add(answer)
        self._plan_tick()


def _listening_socket(host: str, port: int) -> socket.socket:
    """A bound socket that doesn't listen yet. Accepted sockets inherit its options."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT_BYTES)
    sock.setblocking(False)
    try:
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


async def start_mock(
    loop: asyncio.AbstractEventLoop, host: str = "127.0.0.1", port: int = 0, options: MockOptions = QUIET
) -> MockServer:
    """A mock that listens on `loop`, which has to be the running loop. Raises OSError if the port is taken."""
    server = MockServer(loop, options)
    await server.listen(host, port)
    return server
