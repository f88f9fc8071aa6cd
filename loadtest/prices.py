"""Measure the prices of admission: do the constants of streamd.core.admission.Prices still hold?

streamd is started before its own mock upstream and measured from outside: user-space memory per idle connection and
per relayed stream, and the kernel's send queue of readers that stopped (`ss -m`). A single worker, loopback.

    prices.py [--connections 1000]
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import sys
import time
from dataclasses import dataclass

import contenders
import rig

sys.path.insert(0, str(rig.HERE.parent))
from streamd.core.admission import Prices

STALL_RCVBUF_BYTES = 4096
SETTLED_LOOKS = 4  # number of equal measurements in a row: on a busy machine two may be equal by chance
STALL_INTERVAL_MS = 5  # faster tokens sometimes share a segment, and then the queue's last page varies
WARM_CONNECTIONS = 50  # the first connections fill free lists, caches and arenas


@dataclass(frozen=True)
class Measured:
    """Measured bytes, for comparison with Prices."""

    conn_user_bytes: float
    relay_user_bytes: float  # a connection, its stream, and the beginning of its log
    send_queue_bytes: float | None  # None without ss


def measure(connections: int = 1000) -> Measured:
    """Start streamd and its mock, and measure."""
    with rig.rig() as running:
        upstream, port = rig.free_port(), rig.free_port()
        mock = [sys.executable, "-m", "streamd", "mock-llm", "--listen", f"127.0.0.1:{upstream}", "--ttft-ms", "0"]
        running.start("mock", mock, upstream, contenders.environment())
        argv = contenders.streamd(running.folder, port, upstream)
        pid = running.start("streamd", argv, port, contenders.environment())
        close(relays(port, WARM_CONNECTIONS))
        empty = rig.anonymous_bytes(pid)
        idle = [ask(port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n") for _ in range(connections)]
        conn = (rig.anonymous_bytes(pid) - empty) / connections
        close(idle)
        streams = relays(port, connections)
        relay = (rig.anonymous_bytes(pid) - empty) / connections
        close(streams)
        return Measured(conn, relay, send_queue(port))


def relays(port: int, count: int) -> list[socket.socket]:
    """`count` running streams: each has sent a token, and its next token is far away."""
    return [ask(port, post(interval_ms=600_000), until=b"data: ") for _ in range(count)]


def send_queue(port: int, count: int = 20) -> float | None:
    """The kernel's send-side memory of a reader that stopped, once it has stopped growing."""
    stopped = [
        ask(port, post(STALL_INTERVAL_MS), rcvbuf=STALL_RCVBUF_BYTES, source=rig.STALLED_ADDRESS) for _ in range(count)
    ]
    try:
        means: list[float] = []
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            sizes = rig.queue_bytes(f"sport = :{port} and dst {rig.STALLED_ADDRESS}")
            means = [*means[1 - SETTLED_LOOKS :], float(sum(sizes)) / max(1, len(sizes))]
            if means[-1] and means == [means[-1]] * SETTLED_LOOKS:
                break
            time.sleep(0.3)
        return means[-1]
    except rig.Missing:
        return None
    finally:
        close(stopped)


def post(interval_ms: int) -> bytes:
    """A request for a long stream of the mock."""
    body = json.dumps({"model": "mock-llm", "stream": True, "messages": [{"role": "user", "content": "x"}]}).encode()
    fields = f"X-Mock-Interval-Ms: {interval_ms}\r\nX-Mock-Tokens: 100000\r\nContent-Length: {len(body)}"
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{fields}\r\n\r\n"
    )
    return head.encode() + body


def ask(
    port: int, request: bytes, until: bytes = b"\r\n\r\n", rcvbuf: int = 0, source: str = "127.0.0.1"
) -> socket.socket:
    """A connection on which `request` was sent and the answer was read up to `until`."""
    connection = socket.socket()
    if rcvbuf:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
    connection.settimeout(30)
    connection.bind((source, 0))
    connection.connect(("127.0.0.1", port))
    connection.sendall(request)
    answer = b""
    while until not in answer:
        part = connection.recv(2048)
        if not part:
            raise RuntimeError(f"closed after {answer!r}")
        answer += part
    if not re.match(rb"HTTP/1\.1 200 ", answer):
        raise RuntimeError(f"refused: {answer[:200]!r}")
    return connection


def close(connections: list[socket.socket]) -> None:
    """Close the connections, and give the server a moment to notice."""
    for connection in connections:
        connection.close()
    time.sleep(0.5)


def expected(prices: Prices) -> Measured:
    """The same bytes from the price table."""
    return Measured(
        conn_user_bytes=prices.conn_user_bytes,
        relay_user_bytes=prices.conn_user_bytes + prices.stream_user_bytes,
        send_queue_bytes=prices.send_queue_bytes,
    )


def main(argv: list[str]) -> int:
    """Print the measured and the charged bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=1000)
    measured = measure(parser.parse_args(argv).connections)
    charged = expected(Prices())
    for name in charged.__dataclass_fields__:
        size = getattr(measured, name)
        shown = "not measured (no ss)" if size is None else f"{size:8.0f}"
        print(f"{name:20} measured {shown}  charged {getattr(charged, name):8.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
