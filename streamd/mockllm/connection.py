"""A client's connection: reads the heads and bodies of requests, and sends one answer at a time."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Final, Protocol, cast

from streamd.mockllm.answer import MockAnswer
from streamd.mockllm.routes import error_body
from streamd.wire import chunked
from streamd.wire.http1 import HeadReader, RemoteProtocolError, RequestHead, encode_response_head, parse_request

BODY_BYTES_MAX: Final = 32 * 1024 * 1024  # the largest body that streamd lets through
HELD_BYTES_MAX: Final = 65_536  # of further requests behind a running answer; no client that the mock is for sends more


class Server(Protocol):
    """The server, as a connection sees it."""

    def connected(self, connection: Connection) -> None:
        """Accepted."""

    def disconnected(self, connection: Connection) -> None:
        """Gone."""

    def received(self, connection: Connection, head: RequestHead, body: bytes) -> None:
        """A whole request."""

    def completed(self) -> None:
        """An answer was sent whole."""

    def paused(self) -> None:
        """The peer takes no more bytes for now."""

    def aborted(self) -> None:
        """The peer left in the middle of an answer."""

    def broke(self) -> None:
        """A fault ended an answer."""


class Connection(asyncio.Protocol):
    """A client's connection: requests in, an answer at a time out."""

    __slots__ = (
        "_answer",
        "_body",
        "_decoder",
        "_head",
        "_heads",
        "_held",
        "_keeps",
        "_requests",
        "_server",
        "_transport",
        "paused",
    )

    def __init__(self, server: Server) -> None:
        # connection
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._heads = HeadReader()
        self._requests = 0
        self._held = b""  # bytes after the request that is being answered
        self.paused = False
        # request
        self._head: RequestHead | None = None
        self._decoder: chunked.BodyDecoder | None = None
        self._body: list[bytes] = []
        self._answer: MockAnswer | None = None
        self._keeps = True

    # Calls of the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accepted."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=0)
        self._server.connected(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, closed by either side."""
        self._transport = None
        if self._answer is not None:
            self._answer.over = True
            self._answer = None
            self._server.aborted()
        self._server.disconnected(self)

    def eof_received(self) -> bool:
        """A FIN counts as gone. Why abort: a close would wait for a peer that may never read the buffered bytes."""
        if self._answer is not None and self._transport is not None:
            self._transport.abort()
        return False

    def pause_writing(self) -> None:
        """The kernel takes no more bytes."""
        self.paused = True
        self._server.paused()

    def resume_writing(self) -> None:
        """The kernel has taken all bytes."""
        self.paused = False

    def data_received(self, data: bytes) -> None:
        """Bytes of requests have come."""
        if self._answer is None:
            self._take(data)
        elif len(self._held) + len(data) <= HELD_BYTES_MAX:
            self._held += data
        else:
            self.abort()

    # Requests.

    def _take(self, data: bytes) -> None:
        try:
            while data and self._answer is None and self._is_open():
                data = self._take_some(data)
        except RemoteProtocolError as wrong:
            self._refuse(wrong.status, str(wrong))
            return
        self._held = data

    def _is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def _take_some(self, data: bytes) -> bytes:
        """Read a head, or a part of a body; returns the rest of `data` behind it."""
        if self._decoder is None:
            return self._take_head(data)
        self._body += self._decoder.feed(data)
        if sum(map(len, self._body)) > BODY_BYTES_MAX:
            raise RemoteProtocolError(f"send at most {BODY_BYTES_MAX} bytes", "body_too_large", 413)
        return self._take_request() if self._decoder.done else b""

    def _take_head(self, data: bytes) -> bytes:
        found = self._heads.feed(data)
        if found is None:
            return b""
        self._head = parse_request(found[0])
        self._decoder = chunked.decoder_for(self._head.framing, self._head.content_length)
        if self._decoder.done:
            self._decoder.rest = found[1]
            return self._take_request()
        if self._head.expect_continue:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return found[1]

    def _take_request(self) -> bytes:
        assert self._head is not None and self._decoder is not None
        rest, body = self._decoder.rest, b"".join(self._body)
        self._decoder = None
        self._body = []
        self._requests += 1
        self._server.received(self, self._head, body)
        return rest

    # Calls of the server and of the answer.

    @property
    def requests(self) -> int:
        """The number of requests that this connection has had."""
        return self._requests

    def begin(self, answer: MockAnswer, keeps: bool) -> None:
        """An answer has begun; no request is read until it is over. `keeps`: the connection outlives it."""
        self._answer = answer
        self._keeps = keeps

    def write(self, wire: bytes) -> None:
        """Send bytes."""
        if self._is_open():
            assert self._transport is not None
            self._transport.write(wire)

    def complete(self) -> None:
        """The answer is whole: go on with the next request, or close."""
        self._answer = None
        self._server.completed()
        if not self._keeps:
            self.close()
        elif self._held:
            held, self._held = self._held, b""
            self._take(held)

    def break_off(self, reset: bool) -> None:
        """End the connection in the middle of an answer, by RST or FIN."""
        self._answer = None
        self._server.broke()
        if reset:
            self.reset()
        else:
            self.close()

    def reset(self) -> None:
        """End the connection by RST instead of FIN: SO_LINGER with zero seconds does that."""
        if self._transport is not None:
            self._transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            self._transport.abort()

    def close(self) -> None:
        """Send a FIN behind the bytes already written."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection at once; unsent bytes are lost."""
        if self._transport is not None:
            self._transport.abort()

    def _refuse(self, status: int, text: str) -> None:
        body = error_body(status, text, "")
        fields = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        self.write(encode_response_head(status, fields) + body)
        self.close()
