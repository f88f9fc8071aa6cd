"""How long does a connection hold the loop? For each kind of input: the longest callback, and the longest turn.

    python loadtest/loop_held.py [--before DIR] [--only TEXT] [--json FILE]

A worker runs in this process, and a thread plays a peer that sends a kind of input as fast as it is taken, for a
second and a half. Times are CPU times of the worker's thread, so other work on the machine doesn't count. A *callback*
is a call of the transport, of the turns or of the end of a read batch; a *turn* is everything between two runs of a
probe that runs in each turn of the loop. `--before` is the source of another version. Target: 20 ms each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import platform
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamd.config import Settings

PROJECT = Path(__file__).parents[1]
SECONDS = 1.5
TARGET_MS = 20.0

# The callbacks of either version: (module, class, method).
CALLBACKS = (
    ("client", "ClientConnection", "data_received"),
    ("client", "ClientConnection", "_go_on"),
    ("client", "ClientConnection", "resume_writing"),
    ("upstream", "UpstreamConnection", "data_received"),
    ("read_batch", "ReadBatch", "_end"),
    ("tls", "TlsLayer", "data_received"),
    ("tls", "TlsLayer", "shake"),
    ("client", "ClientConnection", "work"),
    ("upstream", "UpstreamConnection", "work"),
    ("tls", "TlsLayer", "work"),
)

PUBLISH = b"POST /v1/streams/room/events HTTP/1.1\r\nHost: localhost\r\nContent-Type: %b\r\n%b\r\n\r\n"
EVENTS, LINES = b"text/event-stream", b"application/x-ndjson"
LENGTH, CHUNKED = b"Content-Length: 4000000", b"Transfer-Encoding: chunked"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n%b\r\n\r\n"
CHAT = b'{"model":"m","stream":true,"messages":[]}'
ASK = POST.replace(b"completions", b"chat/completions") % (b"Content-Length: %d" % len(CHAT)) + CHAT
LARGE = Settings().event_bytes_max * 31 // 32
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
HEAD_CHUNKED = b"transfer-encoding: chunked\r\n\r\n"


def _chunks(data: bytes) -> bytes:
    """In chunks of 16 KiB."""
    pieces = (data[at : at + 0x4000] for at in range(0, len(data), 0x4000))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


# Name: (first bytes, bytes repeated), from a client or from an upstream.
FROM_CLIENT = {
    "pipelined requests": (b"", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "a body of chunks of a byte": (POST % CHUNKED, b"1\r\nx\r\n"),
    "a whole publication of lines": (PUBLISH % (LINES, LENGTH), b"1\n"),
    "a whole publication of events": (PUBLISH % (EVENTS, LENGTH), b"data:\n\n"),
    "a chunked publication of events": (
        PUBLISH % (EVENTS, CHUNKED),
        b"4000\r\n" + b"data:\n\n" * 2340 + b":x\n\n\r\n",
    ),
    "a chunked publication of lines": (PUBLISH % (LINES, CHUNKED), b"2\r\n1\n\r\n"),
    "published long lines": (PUBLISH % (LINES, CHUNKED), _chunks(b"[" + b"[[0]]," * 8_000 + b"0]\n")),
    "published lines of brackets": (PUBLISH % (LINES, CHUNKED), _chunks(b"[" * 200_000 + b"]" * 200_000 + b"\n")),
    "published comments": (PUBLISH % (EVENTS, CHUNKED), b"400\r\n" + b":\n\n" * 341 + b"\n\r\n"),
    "queries of many fields": (b"", b"GET /v1/streams/no?" + b"%41&" * 1900 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"),
}
FROM_UPSTREAM = {
    "interim answers": (b"", b"HTTP/1.1 100 C\r\n\r\n"),
    "events": (SSE + b"\r\n", b"data:{}\n\n"),
    "an event in each chunk": (SSE + HEAD_CHUNKED, b"9\r\ndata:{}\n\n\r\n"),
    "comments": (SSE + b"\r\n", b":\n\n"),
    "events and comments": (SSE + b"\r\n", b"data:{}\n\n:\n\n"),
    "events of a megabyte of lines": (SSE + b"\r\n", b"data:\n" * 170_000 + b"\n"),
    "large events of small values": (SSE + b"\r\n", b"data:[" + b"[[0]]," * (LARGE // 6) + b"0]\n\n"),
    "large events of text": (SSE + b"\r\n", b'data:{"a":"' + b"so, then " * (LARGE // 9) + b'"}\n\n'),
    "large events of lines": (SSE + b"\r\n", (b"data:" + b"1," * (LARGE // 64_000) + b"\n") * 31_000 + b"\n"),
    "chunks of a byte": (b"HTTP/1.1 200 OK\r\n" + HEAD_CHUNKED, b"1\r\nx\r\n"),
}
OVER_TLS = ("handshakes with a key of 4,096 bits", "records of a byte")


class Held:
    """The longest callback and the longest turn, in seconds of CPU time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._depth = 0
        self._last = time.thread_time()
        self.callback_s = self.turn_s = 0.0
        for module, owner, name in CALLBACKS:
            with contextlib.suppress(ImportError, AttributeError):
                self._wrap(getattr(__import__(f"streamd.net.{module}", fromlist=[owner]), owner), name)

    def _wrap(self, owner: Any, name: str) -> None:
        original = owner.__dict__.get(name)
        if original is None:
            return

        @functools.wraps(original)
        def timed(*given: Any, **named: Any) -> Any:
            self._depth += 1
            began = time.thread_time()
            try:
                return original(*given, **named)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.callback_s = max(self.callback_s, time.thread_time() - began)

        setattr(owner, name, timed)

    def begin(self) -> None:
        """Forget all before: the connections stand."""
        self.callback_s = self.turn_s = 0.0
        self._last = time.thread_time()
        self._probe()

    def _probe(self) -> None:
        now = time.thread_time()
        self.turn_s = max(self.turn_s, now - self._last)
        self._last = now
        self._loop.call_soon(self._probe)


def pour(sock: socket.socket, first: bytes, piece: bytes) -> None:
    """Send as fast as it is taken."""
    lot = piece * max(1, 256 * 1024 // len(piece))
    until = time.monotonic() + SECONDS
    with contextlib.suppress(OSError):
        sock.settimeout(SECONDS)
        sock.sendall(first)
        while time.monotonic() < until:
            sock.sendall(lot)


def drink(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while sock.recv(1 << 18):
            pass


def from_client(port: int, first: bytes, piece: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        threading.Thread(target=drink, args=(sock,), daemon=True).start()
        pour(sock, first, piece)


def from_upstream(port: int, listener: socket.socket, first: bytes, piece: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(ASK)
        threading.Thread(target=drink, args=(client,), daemon=True).start()
        listener.settimeout(10)
        link, _ = listener.accept()
        with link:
            link.recv(65536)
            pour(link, first, piece)


def trusting() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def handshakes(port: int) -> None:
    out = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        trusting().wrap_bio(ssl.MemoryBIO(), out).do_handshake()
    hello = out.read()
    socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    time.sleep(0.3)
    for sock in socks:
        sock.sendall(hello)
    time.sleep(SECONDS)
    for sock in socks:
        sock.close()


def small_records(port: int) -> None:
    with trusting().wrap_socket(socket.create_connection(("127.0.0.1", port))) as sock:
        until = time.monotonic() + SECONDS
        with contextlib.suppress(OSError):
            sock.sendall(POST % b"Content-Length: 30000000")
            while time.monotonic() < until:
                sock.sendall(b"x")


def certificate(folder: str) -> tuple[Path, Path]:
    cert, key = Path(folder, "cert.pem"), Path(folder, "key.pem")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:4096",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
        "-keyout",
    ]
    subprocess.run([*command, str(key), "-out", str(cert)], check=True, capture_output=True)
    key.chmod(0o600)
    return cert, key


async def measure(name: str) -> tuple[float, float]:
    """(longest callback, longest turn) in milliseconds."""
    from streamd.addresses import parse_address
    from streamd.config import Settings, UpstreamSettings
    from streamd.daemon import listen, logs
    from streamd.daemon.worker import Worker
    from streamd.net.tls import load_context

    logs.set_level("error")
    loop = asyncio.get_running_loop()
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    worker = Worker(loop, Settings(upstreams=(UpstreamSettings(name="up", url=url),)))
    sock = listen.bind(parse_address("127.0.0.1:0"))
    port = sock.getsockname()[1]
    if name in OVER_TLS:
        with tempfile.TemporaryDirectory() as folder:
            worker.runtime.tls = load_context(*certificate(folder))
    await worker.listen([sock])
    worker.start()
    if name not in OVER_TLS:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"PUT /v1/streams/room HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 201 " not in head:  # refusals would be measured in place of the work
            sys.exit(f"the stream was not opened: {head.decode()}")
        writer.close()
    held = Held(loop)
    held.begin()
    attack: Callable[[], None]
    if name in FROM_CLIENT:
        attack = functools.partial(from_client, port, *FROM_CLIENT[name])
    elif name in FROM_UPSTREAM:
        attack = functools.partial(from_upstream, port, listener, *FROM_UPSTREAM[name])
    else:
        attack = functools.partial(handshakes if name == OVER_TLS[0] else small_records, port)
    await asyncio.wait_for(asyncio.to_thread(attack), 60)
    return held.callback_s * 1000, held.turn_s * 1000


def measured(name: str, source: Path) -> list[float] | None:
    """The figures of a kind in a process of its own; None if it did not end in time."""
    command = [sys.executable, __file__, "--kind", name]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    try:
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        print(name, error, getattr(error, "stderr", ""), file=sys.stderr)
        return None
    found: list[float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure all kinds, and print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            print(json.dumps(runner.run(measure(options.kind))), flush=True)
        os._exit(0)  # the peer's threads may still wait
    sources = {**({"before": options.before} if options.before else {}), "now": PROJECT}
    names = [name for name in (*FROM_CLIENT, *FROM_UPSTREAM, *OVER_TLS) if options.only in name]
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.0f}, {sys.version.split()[0]}\n")
    print("| input | " + " | ".join(f"{each}: callback, turn, ms" for each in sources) + " |")
    print("| --- |" + " --- |" * len(sources))
    table = {}
    for name in names:
        table[name] = {each: measured(name, source) for each, source in sources.items()}
        cells = ["–" if each is None else f"{each[0]:,.1f}, {each[1]:,.1f}" for each in table[name].values()]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    late = [name for name, row in table.items() if row["now"] is None or max(row["now"]) > TARGET_MS]
    print(f"\nabove {TARGET_MS:g} ms now: {', '.join(late) or 'none'}")


if __name__ == "__main__":
    main()
