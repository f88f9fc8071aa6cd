"""TLS in process, over real sockets: the handshake, slow readers, ends, and certificates that change."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import socket
import ssl
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fakes import CHAT, answers_in, events_in, get, post
from loopback import FAST, Daemon, run, serving
from sinks import agree
from tlspeer import TlsClient, client_context, make_certificate

from streamd.api.publish import Publisher
from streamd.config import ConfigError
from streamd.core.stream import Policy
from streamd.daemon import credential_files
from streamd.net.client import ClientConnection
from streamd.net.tls import PIECE_BYTES_MAX, load_context
from streamd.net.tls_files import TlsFilesError
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect

LARGE = b"x" * 100_000


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    cert, key = make_certificate(tmp_path)
    return {"tls_cert": str(cert), "tls_key": str(key)}


@contextlib.asynccontextmanager
async def tls_serving(files: dict[str, str], **settings: Any) -> AsyncIterator[tuple[Daemon, ssl.SSLContext]]:
    async with serving(**files, **settings) as daemon:
        yield daemon, client_context(Path(files["tls_cert"]))


def closed(daemon: Daemon, reason: CloseReason) -> int:
    return daemon.runtime.counters.connections_closed[reason]


@pytest.mark.parametrize("piece", [0, 1, 700])
def test_a_stream_is_served_over_tls(files: dict[str, str], piece: int) -> None:
    async def main() -> None:
        async with tls_serving(files) as (daemon, context):
            context.set_alpn_protocols(["h2", "http/1.1"])
            client = await TlsClient(daemon, context).connect(piece=piece)
            assert (client.tls.version(), client.tls.selected_alpn_protocol()) == ("TLSv1.3", "http/1.1")
            await client.send(post(CHAT), piece=piece)
            answer = await client.answer()
            assert answer.status == 200 and events_in(answer.body)[-1].data == b"[DONE]"
            client.received = b""
            await client.send(get())
            assert (await client.answer()).status == 200, "kept alive"
            client.sock.close()

    run(main)


def test_tls_1_2_is_the_oldest_accepted_version(files: dict[str, str]) -> None:
    async def main() -> None:
        async with tls_serving(files) as (daemon, context):
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            client = await TlsClient(daemon, context).connect()
            assert client.tls.version() == "TLSv1.2"
            client.sock.close()
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = ssl.TLSVersion.TLSv1_1
            with pytest.raises((ssl.SSLError, EOFError, ConnectionError)):
                await TlsClient(daemon, context).connect()
            await daemon.until(lambda: closed(daemon, CloseReason.TLS_FAILED) == 1)

    with pytest.warns(DeprecationWarning):
        run(main)


@pytest.mark.parametrize(
    "first", [get(), b"\x16\x03\x01\x00\x05hello", b"\x80\x2e\x01\x00\x02" + bytes(64), b"\x00" * 64]
)
def test_bytes_that_are_no_tls_close_the_connection(files: dict[str, str], first: bytes) -> None:
    async def main() -> None:
        async with tls_serving(files) as (daemon, context):
            conn = await daemon.connect(first)
            await conn.to_the_end()
            assert len(conn.received) < 16, "an alert, if anything"
            await daemon.until(lambda: closed(daemon, CloseReason.TLS_FAILED) == 1)
            await TlsClient(daemon, context).connect()

    run(main)


def test_a_handshake_has_the_time_of_a_head(files: dict[str, str]) -> None:
    async def main() -> None:
        async with tls_serving(files, head_timeout_s=0.2) as (daemon, _):
            never = await daemon.connect()
            half = await daemon.connect(b"\x16\x03\x01\x02\x00\x01")
            assert await never.to_the_end() == b"" == await half.to_the_end()
            await daemon.until(lambda: not daemon.runtime.clients)
            assert closed(daemon, CloseReason.HEAD_TIMEOUT) == 2

    run(main)


def test_a_changed_record_closes_the_connection(files: dict[str, str]) -> None:
    async def main() -> None:
        async with tls_serving(files) as (daemon, context):
            client = await TlsClient(daemon, context).connect()
            client.tls.write(get())
            wire = bytearray(client._out.read())
            wire[-1] ^= 1
            await client.send_raw(bytes(wire))
            assert await client.to_the_end() == b""
            await daemon.until(lambda: closed(daemon, CloseReason.TLS_FAILED) == 1)

    run(main)


def only(daemon: Daemon) -> ClientConnection:
    """The connection that reads a stream."""
    (found,) = [client for client in daemon.runtime.clients if client.reader is not None]
    return found


def test_a_slow_reader_is_noticed_over_tls(files: dict[str, str]) -> None:
    """Nothing piles up above the socket: the subscriber gets the socket's own pause_writing()."""

    async def main() -> None:
        async with tls_serving(files) as (daemon, context):
            client = await TlsClient(daemon, context, receive_bytes=8192).connect()
            stream = published(daemon)
            await client.send(get("/v1/streams/room"))
            await daemon.until(lambda: stream.readers)
            connection = only(daemon)
            while not connection.paused:
                stream.append(b'data: {"n":"' + b"y" * 1000 + b'"}\n\n', daemon.loop.time())
                await asyncio.sleep(0)
            held = connection.transport.get_write_buffer_size()
            assert held < 3000, "one frame, encrypted"
            for _ in range(500):
                stream.append(b'data: {"n":"' + b"y" * 1000 + b'"}\n\n', daemon.loop.time())
            assert connection.transport.get_write_buffer_size() == held
            stream.source.seal(failed=False)
            answer = await client.answer()
            seqs = [each.seq for each in events_in(answer.body)]
            assert seqs == list(range(1, stream.events + 1)), "and yet nothing is lost"
            assert answer.whole and not connection.paused
            client.sock.close()

    run(main)


def published(daemon: Daemon) -> Any:
    """A stream named `room`, to which the test publishes."""
    daemon.runtime.admit_stream()
    stream = daemon.runtime.hub.open(Dialect.UNKNOWN, daemon.loop.time(), name="room", epoch="abcdef")
    agree(stream, policy=Policy.COALESCE)
    stream.source = Publisher(daemon.runtime, stream)
    return stream


def test_a_stalled_reader_over_tls_is_closed(files: dict[str, str]) -> None:
    async def main() -> None:
        async with tls_serving(files, stall_timeout_s=0.3) as (daemon, context):
            client = await TlsClient(daemon, context, receive_bytes=8192).connect()
            stream = published(daemon)
            await client.send(get("/v1/streams/room"))
            await daemon.until(lambda: stream.readers)
            connection = only(daemon)
            while not connection.paused:
                stream.append(b"data: " + b"y" * 1000 + b"\n\n", daemon.loop.time())
                await asyncio.sleep(0)
            await daemon.until(lambda: closed(daemon, CloseReason.STALLED) == 1)
            stream.source.seal(failed=False)
            client.sock.close()

    run(main)


def test_a_large_answer_is_cut_into_pieces(files: dict[str, str]) -> None:
    async def main() -> None:
        async with tls_serving(files) as (daemon, context):
            client = await TlsClient(daemon, context).connect()
            stream = published(daemon)
            stream.append(b"data: " + LARGE + b"\n\n", daemon.loop.time())
            stream.source.seal(failed=False)
            await client.send(get("/v1/streams/room"))
            assert events_in((await client.answer()).body)[0].data == LARGE
            assert len(LARGE) > 20 * PIECE_BYTES_MAX
            client.sock.close()

    run(main)


def test_a_refusal_over_tls_lingers(files: dict[str, str]) -> None:
    """The answer, close_notify and a FIN go out while the client still sends; its bytes are thrown away."""

    async def main() -> None:
        async with tls_serving(files, body_bytes_max=1024) as (daemon, context):
            client = await TlsClient(daemon, context).connect()
            await client.send(post(LARGE)[:20_000])
            await client.to_the_end()
            assert answers_in(client.received)[0].status == 413
            assert client.notified
            with contextlib.suppress(ssl.SSLError):
                client.tls.write(LARGE)
            await client.flush()
            assert await daemon.loop.sock_recv(client.sock, 100) == b"", "a FIN, and no RST"
            client.sock.close()
            await daemon.until(lambda: not daemon.runtime.clients)

    run(main)


@pytest.mark.parametrize("way", ["close_notify", "FIN", "RST"])
def test_a_reader_that_leaves_over_tls_cancels_the_generation(files: dict[str, str], way: str) -> None:
    options = dataclasses.replace(FAST, tokens=10_000, interval_s=0.01)

    async def main() -> None:
        async with serving(options, **files) as daemon:
            context = client_context(Path(files["tls_cert"]))
            client = await TlsClient(daemon, context).connect()
            await client.send(post(CHAT))
            await client.read()
            if way == "close_notify":
                with contextlib.suppress(ssl.SSLError):
                    client.tls.unwrap()
                await client.flush()
            elif way == "FIN":
                client.sock.shutdown(socket.SHUT_WR)
            else:
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                client.sock.close()
            await daemon.until(lambda: daemon.mock.stats.aborted == 1)
            client.sock.close()

    run(main)


def test_a_renewed_certificate_is_loaded(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credential_files, "LOOK_EVERY_S", 0.0)
    cert = Path(files["tls_cert"])

    async def main() -> None:
        async with tls_serving(files) as (daemon, context):
            before = await TlsClient(daemon, context).connect()
            first = daemon.runtime.tls
            make_certificate(cert.parent)
            await daemon.until(lambda: daemon.runtime.tls is not first)
            after = await TlsClient(daemon, client_context(cert)).connect()
            with pytest.raises(ssl.SSLError):
                await TlsClient(daemon, context).connect()
            for client in (before, after):
                await client.send(get())
                assert (await client.answer()).status == 200
                client.sock.close()
            second = daemon.runtime.tls
            expires = x509.load_pem_x509_certificate(cert.read_bytes()).not_valid_after_utc.timestamp()  # noqa: ASYNC240 (a small file)
            assert daemon.worker.credential_files.certificate_until == expires
            spoil(cert)
            seen = daemon.loop.time()
            await daemon.until(lambda: daemon.loop.time() > seen + 0.6)  # two looks
            assert daemon.runtime.tls is second

    run(main)


def spoil(cert: Path) -> None:
    cert.write_bytes(b"-----BEGIN CERTIFICATE-----\nnonsense\n")


def test_unusable_certificate_files_are_refused_with_their_fault(files: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    foreign_cert, _ = make_certificate(other)

    def why(**changed: str) -> str:
        async def main() -> None:
            async with serving(**(files | changed)):
                pass

        with pytest.raises(ConfigError) as raised:
            run(main)
        return str(raised.value)

    assert "KEY_VALUES_MISMATCH" in why(tls_cert=str(foreign_cert))
    assert "none is missing" in why(tls_key=str(tmp_path / "none"))
    assert "cert.pem and " in why(tls_key=files["tls_cert"])
    Path(files["tls_key"]).chmod(0o644)
    assert "mode 0644" in why()


def test_an_encrypted_key_is_refused_without_a_prompt(files: dict[str, str]) -> None:
    key = Path(files["tls_key"])
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    encryption = serialization.BestAvailableEncryption(b"secret")
    key.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    with pytest.raises(TlsFilesError, match=r"key\S*: the key is encrypted"):
        load_context(Path(files["tls_cert"]), key)


def test_a_closed_tls_connection_is_freed_without_the_collector(files: dict[str, str]) -> None:
    async def main() -> None:
        async with tls_serving(files) as (daemon, context):
            client = await TlsClient(daemon, context).connect()
            await client.send(get())
            await client.answer()
            (connection,) = daemon.runtime.clients
            alive = weakref.ref(connection)
            del connection
            gc.disable()
            try:
                client.sock.close()
                await daemon.until(lambda: not daemon.runtime.clients)
                await daemon.until(lambda: alive() is None)
            finally:
                gc.enable()

    run(main)


def test_a_client_that_sends_a_broken_record_gets_an_alert(files: dict[str, str]) -> None:
    async def main() -> None:
        async with tls_serving(files) as (daemon, context):
            client = await TlsClient(daemon, context).connect()
            client.tls.write(get())
            wire = bytearray(client._out.read())
            wire[-1] ^= 1
            await client.send_raw(bytes(wire))
            with pytest.raises(ssl.SSLError, match="ALERT_BAD_RECORD_MAC"):
                await client.read()
            await daemon.until(lambda: closed(daemon, CloseReason.TLS_FAILED) == 1)

    run(main)
