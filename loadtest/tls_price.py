"""The additional memory of a TLS connection in streamd, compared with a plain connection: idle, and at its worst.

    python loadtest/tls_price.py [CONNECTIONS]

A streamd (as a child process) is asked over CONNECTIONS connections, first plain, then over TLS; all stay open:

    idle     a handshake and a small request
    bodies   also 256 KiB up and 7 KB down, after which OpenSSL's buffers have the largest size that PIECE_BYTES_MAX
             of net/tls.py permits
    cut      also the first half of a record of 16 KiB, which OpenSSL keeps until the rest comes

Printed is the growth of resident memory divided by the number of connections. `tls_bytes` of core/admission.py is the
largest TLS number minus the plain number, rounded up.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import rig

CONNECTIONS = 1000
BODY_BYTES = 256 * 1024


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else CONNECTIONS
    with tempfile.TemporaryDirectory() as folder:
        cert, key = make_certificate(Path(folder))
        context = ssl.create_default_context(cafile=str(cert))
        for case, use in (("idle", idle), ("bodies", bodies), ("cut", cut)):
            plain = price(count, use, [], None)
            tls = price(count, use, ["--tls-cert", str(cert), "--tls-key", str(key)], context)
            print(f"{case:<7} plain {plain:>6.0f}  TLS {tls:>6.0f}  TLS alone {tls - plain:>6.0f} bytes a connection")


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*command.split(), *names, "-keyout", key, "-out", cert], check=True, capture_output=True)
    key.chmod(0o600)
    return cert, key


@contextlib.contextmanager
def streamd(*options: str) -> Iterator[tuple[int, int]]:
    """(pid, port) of a streamd that this process ends."""
    command = [sys.executable, "-m", "streamd", "serve", "--listen", "127.0.0.1:0", "--log-level", "info", *options]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    try:
        for line in child.stderr:
            if (found := re.search(r"listen=\S*127\.0\.0\.1:(\d+)", line)) is not None:
                child.stderr.close()  # from here on the log is dropped
                yield child.pid, int(found[1])
                return
        raise SystemExit("streamd did not start")
    finally:
        child.kill()
        child.wait()


Connection = socket.socket | ssl.SSLSocket
Use = Callable[[Connection], None]


def price(count: int, use: Use, options: list[str], context: ssl.SSLContext | None) -> float:
    """Bytes of resident memory for each connection."""
    with streamd(*options) as (pid, port), contextlib.ExitStack() as open_:
        for _ in range(20):  # so that the process has made its lasting allocations
            use(open_.enter_context(connect(port, context)))
        before = resident_bytes(pid)
        for _ in range(count):
            use(open_.enter_context(connect(port, context)))
        return (resident_bytes(pid) - before) / count


def connect(port: int, context: ssl.SSLContext | None) -> Connection:
    sock = socket.create_connection(("127.0.0.1", port))
    return sock if context is None else context.wrap_socket(sock, server_hostname="localhost")


def idle(sock: Connection) -> None:
    """Send a small request."""
    ask(sock, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")


def bodies(sock: Connection) -> None:
    """Send and receive large bodies; a health check may have a body, which streamd reads and ignores."""
    ask(sock, f"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: {BODY_BYTES}\r\n\r\n" + "x" * BODY_BYTES)
    ask(sock, f"GET /{'x' * 7000} HTTP/1.1\r\nHost: localhost\r\n\r\n")  # the 404 names the path


def cut(sock: Connection) -> None:
    """Use the connection as `bodies` does, then send half a TLS record; on a plain connection half a head."""
    bodies(sock)
    if isinstance(sock, ssl.SSLSocket):
        with socket.socket(fileno=os.dup(sock.fileno())) as raw:
            raw.sendall(b"\x17\x03\x03\x40\x00" + bytes(8192))


def ask(sock: Connection, request: str) -> None:
    """Send a request and read its whole answer."""
    sock.sendall(request.encode())
    head, _, body = sock.recv(65536).partition(b"\r\n\r\n")
    found = re.search(rb"content-length: (\d+)", head)
    assert found is not None, head
    while len(body) < int(found[1]):
        body += sock.recv(65536)


def resident_bytes(pid: int) -> int:
    """The resident memory of the parent and its worker."""
    texts = [Path(f"/proc/{process}/status").read_text() for process in rig.tree(pid)]
    return sum(int(size) for text in texts for size in re.findall(r"VmRSS:\s+(\d+) kB", text)) * 1024


if __name__ == "__main__":
    main()
