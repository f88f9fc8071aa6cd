"""Several workers over real sockets: to clients they are a single daemon, and connections are spread evenly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import CHAT, Answer, answers_in, events_in, get, post, text_of
from served import WAIT_S, Served, holding, refused, served, upstream
from tlspeer import client_context, make_certificate

CONNS = 1000
SPREAD_MAX = 1.15  # fullest to emptiest


@pytest.fixture(scope="module")
def mock() -> Iterator[str]:
    with upstream("--interval-ms", "5") as url:
        yield url


@contextlib.contextmanager
def workers(mock: str, *args: str, count: int = 2) -> Iterator[Served]:
    # A busy machine may need longer for a thousand connections than the default head timeout.
    patient = ("--head-timeout", "5m", "--keepalive-timeout", "1h", "--retention", "10m")
    with served("--workers", str(count), "--admin", "127.0.0.1:0", "--upstream", mock, *patient, *args) as d:
        d.line(" serving ")
        yield d


class Dialled:
    """Open sockets to a daemon."""

    def __init__(self, d: Served) -> None:
        self.address = ("127.0.0.1", d.port)
        self.admin = ("127.0.0.1", int(d.line(r" serving .*admin=\S*?:(\d+)")[1]))
        self.open: list[socket.socket] = []

    def dial(self, count: int, data: bytes = b"") -> list[socket.socket]:
        made = []
        for _ in range(count):
            sock = socket.create_connection(self.address, WAIT_S)
            if data:
                sock.sendall(data)
            made.append(sock)
        self.open += made
        return made

    def status(self) -> dict[str, Any]:
        with socket.create_connection(self.admin, WAIT_S) as sock:
            sock.sendall(get("/status", "Connection: close"))
            found: dict[str, Any] = json.loads(whole(sock).body)
        return found

    def until(self, reached: Callable[[list[int]], bool]) -> list[int]:
        """Wait until the workers' connection counts satisfy `reached`, and agree with admission's count.

        Workers publish their counts every second; admission's count is always current."""
        deadline = time.monotonic() + WAIT_S
        while True:
            status = self.status()
            counts = [int(each["connections"]) for each in status["workers"]]
            if reached(counts) and sum(counts) == status["admission"]["in_use"]["connections"]:
                return counts
            assert time.monotonic() < deadline, counts
            time.sleep(0.05)

    def close(self) -> None:
        for sock in self.open:
            sock.close()
        self.open.clear()


@contextlib.contextmanager
def dialled(d: Served) -> Iterator[Dialled]:
    made = Dialled(d)
    try:
        yield made
    finally:
        made.close()


def whole(sock: socket.socket, method: str = "GET") -> Answer:
    """Read the first answer to its end."""
    received = b""
    while True:
        piece = sock.recv(65536)
        received += piece
        if not piece or b"\r\n\r\n" in received:
            answers = answers_in(received, (method,), at_end=not piece)
            if answers and answers[0].whole:
                return answers[0]
            assert piece, received[-300:]


def spread(counts: list[int]) -> float:
    return max(counts) / min(counts)


# -- spread


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("speaks", [True, False], ids=["asking", "silent"])
def test_a_thousand_connections_are_spread(mock: str, speaks: bool, count: int) -> None:
    with workers(mock, count=count) as d, dialled(d) as many:
        made = many.dial(CONNS, get("/healthz") if speaks else b"")
        counts = many.until(lambda counts: sum(counts) >= CONNS)
        assert spread(counts) <= SPREAD_MAX, counts
        if speaks:
            assert {whole(sock).status for sock in made} == {200}


def test_new_connections_fill_an_empty_successor(mock: str) -> None:
    with workers(mock) as d, dialled(d) as many:
        many.dial(200)
        many.until(lambda counts: sum(counts) >= 200)
        pid = many.status()["workers"][0]["pid"]
        os.kill(pid, signal.SIGKILL)
        d.line("worker died")
        many.until(lambda counts: min(counts) < 10)
        d.until(lambda: many.status()["workers"][0]["pid"] not in (0, pid), "successor")
        many.dial(200)
        counts = many.until(lambda counts: sum(counts) >= 290)
        assert spread(counts) <= SPREAD_MAX, counts


# -- several workers as a single daemon


def test_every_reader_finds_its_stream_at_any_worker(mock: str) -> None:
    """Twenty generations over two workers; five further readers of each connect to any worker."""
    with workers(mock) as d, dialled(d) as many:
        askers = many.dial(20, post(CHAT, "X-Mock-Tokens: 60"))
        heads = [sock.recv(4096) for sock in askers]
        ids = [answer_id(head) for head in heads]
        assert {each[2] for each in ids} == {"A", "B"}
        readers = {each: many.dial(5, get(f"/v1/streams/{each}")) for each in ids}
        for head, asker, each in zip(heads, askers, ids, strict=True):
            said = text_of(events_in(rest_of(asker, head)))
            assert said
            assert {text_of(events_in(whole(reader).body)) for reader in readers[each]} == {said}
        many.until(lambda counts: many.status()["streams"]["sealed"] == 20)
        text = metrics(many)
        assert "streamd_streams_opened_total 20.0" in text and "streamd_bugs_total 0.0" in text


def answer_id(head: bytes) -> str:
    line = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"x-stream-id:"))
    return line.partition(b":")[2].strip().decode()


def rest_of(sock: socket.socket, received: bytes) -> bytes:
    while not received.endswith(b"0\r\n\r\n"):
        received += sock.recv(65536)
    return answers_in(received)[0].body


def metrics(many: Dialled) -> str:
    with socket.create_connection(many.admin, WAIT_S) as sock:
        sock.sendall(get("/metrics", "Connection: close"))
        return whole(sock).body.decode()


def test_every_worker_finds_a_name_through_tls_and_a_unix_socket(mock: str, tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    path = str(tmp_path / "streamd.sock")
    with workers(mock, "--tls-cert", str(cert), "--tls-key", str(key), "--listen", f"unix:{path}") as d:
        name = "room"
        for k, request in enumerate(
            [
                get(f"/v1/streams/{name}", "Content-Length: 0", method="PUT"),
                get(f"/v1/streams/{name}/events?seal=finished", "Content-Length: 5", method="PUT") + b"hello",
            ]
        ):
            assert asyncio.run(over_tls(d.port, cert, request))[0] in (200, 201), k
        for _ in range(12):
            status, body = asyncio.run(over_tls(d.port, cert, get(f"/v1/streams/{name}", "Connection: close")))
            assert status == 200 and b"hello" in body
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)
                sock.sendall(get(f"/v1/streams/{name}"))
                assert b"hello" in whole(sock).body


async def over_tls(port: int, cert: Path, request: bytes) -> tuple[int, bytes]:
    context: ssl.SSLContext = client_context(cert)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    writer.write(request)
    received = b""
    while not (answers := answers_in(received) if b"\r\n\r\n" in received else []) or not answers[0].whole:
        piece = await asyncio.wait_for(reader.read(65536), WAIT_S)
        assert piece, received
        received += piece
    writer.close()
    return answers[0].status, answers[0].body


def test_a_carried_stream_outlives_the_drain_of_its_carrier(tmp_path: Path) -> None:
    """A draining worker without streams of its own waits for the streams that it carries."""
    cert, key = make_certificate(tmp_path)
    tls = ("--tls-cert", str(cert), "--tls-key", str(key))
    with holding() as held, workers(held.url, *tls, "--drain-delay", "0s") as d:

        async def main() -> None:
            context = client_context(cert)

            async def ask(data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
                reader, writer = await asyncio.open_connection("127.0.0.1", d.port, ssl=context)
                writer.write(data)
                return reader, writer

            asker, asker_writer = await ask(post(CHAT))
            stream_id = answer_id(await asker.readuntil(b"\r\n\r\n"))
            readers = [await ask(get(f"/v1/streams/{stream_id}")) for _ in range(16)]
            for reader, _ in readers:
                await reader.readuntil(b"data: ")
            d.signal(signal.SIGTERM)
            d.until(lambda: refused(d), "end of all listeners")
            held.go_on()
            for reader, writer in readers:
                assert (await asyncio.wait_for(reader.read(), WAIT_S)).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
                writer.close()
            await asyncio.wait_for(asker.read(), WAIT_S)
            asker_writer.close()

        asyncio.run(main())
        assert d.ended() == 0
        assert " stopped finished=1 sent_away=0 cut=0" in d.lines[-1]
