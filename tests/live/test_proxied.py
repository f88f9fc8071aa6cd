"""The client's address over real sockets: the PROXY protocol before HTTP and before TLS, Unix sockets, gates."""

from __future__ import annotations

import ipaddress
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
from fakes import CHAT, get, post
from loopback import Conn, Daemon, run, serving
from tlspeer import TlsClient, client_context, make_certificate

from streamd.addresses import parse_address
from streamd.daemon import listen, logs
from streamd.net.client import ClientState
from streamd.reasons import CloseReason
from streamd.wire.proxy_v2 import SIGNATURE

PROXY: dict[str, Any] = {"proxy_protocol": True, "trusted_proxies": ("127.0.0.1",)}


def header(source: str | None = "198.51.100.7", port: int = 4321, more: bytes = b"") -> bytes:
    """A PROXY v2 header; None: LOCAL, the proxy's own check."""
    if source is None:
        return SIGNATURE + struct.pack("!BBH", 0x20, 0, len(more)) + more
    address = ipaddress.ip_address(source)
    target = bytes(len(address.packed))
    body = address.packed + target + struct.pack("!HH", port, 443) + more
    return SIGNATURE + struct.pack("!BBH", 0x21, 0x11 if address.version == 4 else 0x21, len(body)) + body


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The peer of every request that was logged."""
    found: list[str] = []

    def event(level: int, name: str, **fields: Any) -> None:
        if name == "request":
            found.append(fields["peer"])

    monkeypatch.setattr(logs, "event", event)
    return found


def closed(daemon: Daemon, reason: CloseReason) -> int:
    return daemon.runtime.counters.connections_closed[reason]


@pytest.mark.parametrize(
    ("first", "peer"),
    [
        (header(), "198.51.100.7:4321"),
        (header("2001:db8::7", 1), "2001:db8::7:1"),
        (header(more=b"\x04\x00\x03abc"), "198.51.100.7:4321"),
        (header(None, more=b"\x04\x00\x00"), "127.0.0.1"),
    ],
)
@pytest.mark.parametrize("piece", [0, 1])
def test_the_header_names_the_client(peers: list[str], first: bytes, peer: str, piece: int) -> None:
    async def main() -> None:
        async with serving(**PROXY) as daemon:
            wire = first + get("/healthz", "Connection: close")
            conn = await daemon.connect()
            for start in range(0, len(wire), piece or len(wire)):
                await conn.send(wire[start : start + (piece or len(wire))])
            assert (await conn.answer()).status == 200
            await daemon.until(lambda: peers)
            assert [each.partition(":")[0] if peer == "127.0.0.1" else each for each in peers] == [peer]

    run(main)


@pytest.mark.parametrize("first", [get(), b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" + get(), header()[:13] + b"\xff" * 20])
def test_a_trusted_proxy_must_send_a_proxy_header(first: bytes) -> None:
    async def main() -> None:
        async with serving(**PROXY) as daemon:
            conn = await daemon.connect(first)
            assert await conn.to_the_end() == b"", "closed without an answer"
            await daemon.until(lambda: closed(daemon, CloseReason.PROXY_HEADER) == 1)

    run(main)


def test_a_proxy_header_from_an_untrusted_peer_is_a_bad_request(peers: list[str]) -> None:
    async def main() -> None:
        async with serving(proxy_protocol=True, trusted_proxies=("10.0.0.0/8",)) as daemon:
            assert (await daemon.ask(header() + get())).status == 400
            assert (await daemon.ask(get("/healthz", "X-Forwarded-For: 6.6.6.6"))).status == 200
            await daemon.until(lambda: len(peers) == 2)
            assert all(peer.startswith("127.0.0.1:") for peer in peers)

    run(main)


def test_the_time_for_the_proxy_header_is_absolute() -> None:
    """An occasional byte doesn't extend the time for the header."""

    async def main() -> None:
        async with serving(**PROXY, head_timeout_s=0.5) as daemon:
            conn = await daemon.connect()
            await daemon.until(lambda: daemon.runtime.clients)
            (client,) = daemon.runtime.clients
            wire = header(more=bytes(3000))
            sent = 0
            while client.at is ClientState.FRESH and sent < len(wire):
                await conn.send(wire[sent : sent + 1])
                sent += 1
                next_at = daemon.loop.time() + 0.02
                await daemon.until(lambda next_at=next_at: daemon.loop.time() > next_at)
            assert sent < 100
            await daemon.until(lambda: closed(daemon, CloseReason.HEAD_TIMEOUT) == 1)

    run(main)


def test_a_proxy_header_may_precede_tls(peers: list[str], tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)

    class Proxied(TlsClient):
        first = header()

        async def send_raw(self, wire: bytes) -> None:
            first, self.first = self.first, b""
            await super().send_raw(first + wire)

    async def main() -> None:
        async with serving(**PROXY, tls_cert=str(cert), tls_key=str(key)) as daemon:
            client = await Proxied(daemon, client_context(cert)).connect()
            await client.send(get("/healthz", "Connection: close"))
            assert (await client.answer()).status == 200
            assert await client.to_the_end() and client.notified
            await daemon.until(lambda: peers == ["198.51.100.7:4321"])
            client.sock.close()

    run(main)


def test_gates_count_the_client_that_the_header_names() -> None:
    async def main() -> None:
        async with serving(**PROXY, conns_per_address_max=1) as daemon:
            reader = await daemon.connect(header() + post(CHAT))
            await reader.begun()
            second = await daemon.connect(header() + get())
            assert (await second.answer()).status == 429
            assert (await daemon.ask(header("198.51.100.8") + get())).status == 200
            assert (await daemon.ask(header("2001:db8::1") + get())).status == 200
            held = await daemon.connect(header("2001:db8::2") + get())
            assert (await held.answer()).status == 200
            assert (await daemon.ask(header("2001:db8::3:4") + get())).status == 429, "the same /64"
            await reader.answer()

    run(main)


def test_loopback_is_never_counted() -> None:
    async def main() -> None:
        async with serving(conns_per_address_max=1, conns_opening_per_address_max=1) as daemon:
            conns = [await daemon.connect(b"GET /") for _ in range(5)]
            assert (await daemon.ask(get())).status == 200
            assert len(daemon.runtime.clients) >= 5
            assert not any(conn.received for conn in conns)

    run(main)


@pytest.mark.parametrize(("trusted", "peer"), [(("unix",), "198.51.100.7"), ((), "unix")])
def test_a_trusted_unix_socket_reports_its_client_by_x_forwarded_for(
    peers: list[str], tmp_path: Path, trusted: tuple[str, ...], peer: str
) -> None:
    async def main() -> None:
        async with serving(trusted_proxies=trusted, conns_per_address_max=1) as daemon:
            sock = listen.bind(parse_address(f"unix:{tmp_path}/s"))
            await daemon.worker.listen([sock])
            for _ in range(2):
                with socket.socket(socket.AF_UNIX) as client:
                    client.setblocking(False)
                    await daemon.loop.sock_connect(client, f"{tmp_path}/s")
                    await daemon.loop.sock_sendall(client, get("/healthz", "X-Forwarded-For: 198.51.100.7"))
                    assert (await daemon.loop.sock_recv(client, 65536)).startswith(b"HTTP/1.1 200")
            await daemon.until(lambda: peers == [peer] * 2)
            sock.close()

    run(main)


def test_a_gated_connection_leaves_no_count_behind() -> None:
    """Each way to end a connection gives its place back."""

    async def main() -> None:
        async with serving(**PROXY, conns_per_address_max=3, conns_opening_per_address_max=3) as daemon:
            ends = [Conn.abort, Conn.fin, Conn.close]
            for first in (header(), header() + b"GET /", header() + post(CHAT), header()[:20], b"\0"):
                for end in ends:
                    conn = await daemon.connect(first)
                    await daemon.until(lambda: daemon.runtime.clients)
                    end(conn)
                    await conn.to_the_end()
                    await daemon.until(lambda: not daemon.runtime.clients)
            assert len(daemon.runtime.admission.addresses) == 0 == len(daemon.runtime.gates._opening)

    run(main)
