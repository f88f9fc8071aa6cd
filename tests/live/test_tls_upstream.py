"""An upstream over TLS: an answer that ends without close_notify is whole only where it says so itself."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from pathlib import Path

import pytest
from fakes import CHAT, DONE, LAST, WHOLE, chunk, event, post
from loopback import run, serving
from tlspeer import make_certificate

from streamd.config import UpstreamSettings

HEADS = {"until close": b"", "length": b"content-length: %d\r\n", "chunked": b"transfer-encoding: chunked\r\n"}
FINISH = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
STREAM = "text/event-stream"
# name -> (request, type of the answer, its body, whether its terminal event is in it)
ANSWERS = {
    "JSON": (WHOLE, "application/json", b'{"choices": [{"message": {"content": "half of', False),
    "events with a terminal": (CHAT, STREAM, event("all") + DONE, True),
    "events with a finish reason": (CHAT, STREAM, event("all") + FINISH, False),
    "events of an unknown dialect": (CHAT, STREAM, event("all"), False),
}


def _end_without_close_notify(writer: asyncio.StreamWriter) -> None:
    with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as bare:
        bare.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("notified", [True, False], ids=["close_notify", "a bare FIN"])
@pytest.mark.parametrize("framing", HEADS)
@pytest.mark.parametrize("kind", ANSWERS)
def test_a_tls_answer_without_close_notify_is_whole_only_by_its_framing_or_terminal(
    tmp_path: Path, kind: str, framing: str, notified: bool
) -> None:
    request, media_type, body, has_terminal = ANSWERS[kind]
    path = "/v1/of/no/known/dialect" if "unknown" in kind else "/v1/chat/completions"
    fields = HEADS[framing] % len(body) if framing == "length" else HEADS[framing]
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n%b\r\n" % (media_type.encode(), fields)
    wire = head + (chunk(body) + LAST if framing == "chunked" else body)
    cert, key = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(wire)
        await writer.drain()
        if not notified:
            _end_without_close_notify(writer)
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        upstream = UpstreamSettings(name="tls", url=f"https://127.0.0.1:{port}", ca_file=str(cert))
        async with serving(upstreams=(upstream,)) as daemon:
            got = await daemon.ask(post(request, path=path))
            assert got.status == 200 and body.split(b"\n")[0] in got.body
            assert got.whole is (notified or framing != "until close" or has_terminal)
        server.close()

    run(main)
