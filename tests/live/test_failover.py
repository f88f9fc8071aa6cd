"""Servers that don't take connections, on real sockets: a request reaches a server that does."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from inprocess import live

from streamd.config import UpstreamSettings
from streamd.mockllm import MockOptions

BODY = json.dumps({"model": "m", "messages": []})


@contextlib.contextmanager
def listening(act: Callable[[socket.socket], None], host: str = "127.0.0.1") -> Iterator[tuple[int, list[int]]]:
    """A server that does the same with every connection; yields its port, and a list with an entry for each."""
    taken: list[int] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                taken.append(1)
                with contextlib.suppress(OSError), sock:
                    act(sock)

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1], taken
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def with_reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def answering(sock: socket.socket) -> None:
    with sock.makefile("rb") as request:
        length = 0
        while (line := request.readline()) not in (b"\r\n", b""):
            if line.lower().startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        request.read(length)
    sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")


def statuses(url: str, count: int) -> list[int]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    found = []
    for _ in range(count):
        connection.request("POST", "/v1/chat/completions", BODY, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        found.append(answer.status)
    connection.close()
    return found


@pytest.mark.parametrize("act", [lambda sock: None, with_reset], ids=["fin", "reset"])
def test_a_server_that_closes_what_it_accepts_costs_no_request(act: Callable[[socket.socket], None]) -> None:
    with listening(act) as (bad, closed), listening(answering) as (good, answered):
        servers = tuple(UpstreamSettings(name=f"u{port}", url=f"http://127.0.0.1:{port}") for port in (bad, good))
        with live(MockOptions(), upstreams=servers) as running:
            assert statuses(running.url, 12) == [200] * 12
        assert len(answered) == 12 and len(closed) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_server_on_either_address_of_localhost_is_found(host: str) -> None:
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError:
        pytest.skip(f"this machine has no {host}")
    with listening(answering, host) as (port, answered):
        server = UpstreamSettings(name="up", url=f"http://localhost:{port}")
        with live(MockOptions(), upstreams=(server,)) as running:
            assert statuses(running.url, 2) == [200, 200] and len(answered) == 2
