"""HTTP/1.0 readers of bodies that aren't streams: a close ends the body, so a cut must look different from an end."""

from __future__ import annotations

from typing import Any

import pytest
from loopback import RawUpstream, Script, raw_upstream, run, serving

from streamd.config import UpstreamSettings

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ASK = b"GET /v1/files/1/content HTTP/1.0\r\n\r\n"


def read_from(script: Script) -> bytes:
    """The bytes that an HTTP/1.0 reader gets. Raises ConnectionResetError if the connection was cut."""
    got = b""

    async def main() -> None:
        nonlocal got
        async with (
            raw_upstream(script) as upstream,
            serving(upstreams=(UpstreamSettings(name="raw", url=upstream.url),)) as d,
        ):
            conn = await d.connect(ASK)
            got = await conn._reader.read()

    run(main)
    return got


def test_a_whole_body_ends_with_a_fin() -> None:
    async def whole(upstream: RawUpstream, reader: Any, writer: Any) -> None:
        writer.write(HEAD + b"5\r\nhello\r\n0\r\n\r\n")
        await writer.drain()

    assert read_from(whole).endswith(b"\r\n\r\nhello")


def test_a_cut_body_ends_with_a_reset() -> None:
    async def cut(upstream: RawUpstream, reader: Any, writer: Any) -> None:
        writer.write(HEAD + b"5\r\nhello\r\n")
        await writer.drain()
        writer.transport.abort()

    with pytest.raises(ConnectionResetError):
        read_from(cut)
