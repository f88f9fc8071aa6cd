"""The example page and streamd under one origin, as a reverse proxy serves them, with connections that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import mimetypes
from pathlib import Path

from inprocess import TcpRelay

EXAMPLES = Path(__file__).parents[2] / "examples"


class PageServer(TcpRelay):
    """Files of examples/, and everything under /v1/ from streamd. Only connections to streamd are counted."""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ", 2)[1].decode().partition("?")[0]
            if path.startswith("/v1/"):
                await self._pass(reader, writer, head)
                return
            writer.write(answer_of(path))
            await writer.drain()
        writer.close()

    def asked(self, start: str) -> int:
        """The number of requests that begin like this: `GET /v1/streams/`."""
        return sum(bytes(up).count(start.encode()) for up in self.up)


def answer_of(path: str) -> bytes:
    """A whole response: a file or 404."""
    file = EXAMPLES / (path.lstrip("/") or "index.html")
    if file.parent != EXAMPLES or not file.is_file():
        return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    body, kind = file.read_bytes(), mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body
