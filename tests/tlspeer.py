"""The other side of TLS: a client of which the test controls each byte, and self-made certificates."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import socket
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fakes import Answer, answers_in
from loopback import PATIENCE_S, Daemon


def make_certificate(folder: Path, name: str = "streamd.test") -> tuple[Path, Path]:
    """A certificate for `name` and 127.0.0.1, and its key: cert.pem and key.pem of the folder, replaced if present."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName(name), x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))])
    cert = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return _replace(folder / "cert.pem", cert.public_bytes(pem)), _replace(folder / "key.pem", private)


def _replace(path: Path, content: bytes) -> Path:
    beside = path.with_suffix(".new")
    beside.write_bytes(content)
    beside.chmod(0o600)
    beside.rename(path)
    return path


def client_context(cert: Path) -> ssl.SSLContext:
    """A client that trusts only this certificate, and ignores its name."""
    context = ssl.create_default_context(cafile=str(cert))
    context.check_hostname = False
    return context


class TlsClient:
    """A TLS client over a plain socket, of which the test controls each byte."""

    def __init__(self, daemon: Daemon, context: ssl.SSLContext, receive_bytes: int = 0) -> None:
        self._daemon = daemon
        self._loop = daemon.loop
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._in, self._out, server_hostname="streamd.test")
        self.sock = socket.socket()
        self.sock.setblocking(False)
        if receive_bytes:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.received = b""
        self.notified = False  # the server's close_notify has arrived
        self.closed = False

    async def connect(self, *, piece: int = 0) -> TlsClient:
        """Connect and shake hands; `piece` bytes at a time if given."""
        await self._loop.sock_connect(self.sock, ("127.0.0.1", self._daemon.port))
        while True:
            try:
                self.tls.do_handshake()
                await self.flush(piece)
                return self
            except ssl.SSLWantReadError:
                await self.flush(piece)
                await self._receive()

    async def flush(self, piece: int = 0) -> None:
        wire = self._out.read()
        step = piece or len(wire) or 1
        for start in range(0, len(wire), step):
            await self.send_raw(wire[start : start + step])

    async def send_raw(self, wire: bytes) -> None:
        await self._loop.sock_sendall(self.sock, wire)

    async def send(self, data: bytes, *, piece: int = 0) -> None:
        self.tls.write(data)
        await self.flush(piece)

    async def _receive(self) -> None:
        wire = await asyncio.wait_for(self._loop.sock_recv(self.sock, 65536), PATIENCE_S)
        if not wire:
            self.closed = True
            raise EOFError(self.received[-300:])
        self._in.write(wire)

    async def read(self) -> bytes:
        """The next bytes; empty after close_notify. Raises EOFError for a FIN without a close_notify."""
        while True:
            try:
                piece = self.tls.read(65536)
            except ssl.SSLWantReadError:
                await self._receive()
                continue
            except ssl.SSLZeroReturnError:
                piece = b""
            self.notified = self.notified or not piece
            self.received += piece
            return piece

    async def to_the_end(self) -> bytes:
        with contextlib.suppress(EOFError, ConnectionError, ssl.SSLError):
            while await self.read():
                pass
        return self.received

    async def answer(self) -> Answer:
        while True:
            if b"\r\n\r\n" in self.received:
                (answer, *_) = answers_in(self.received, at_end=self.closed)
                if answer.whole:
                    return answer
            await self.read()
