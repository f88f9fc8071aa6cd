"""Drain under load: does every reader get its whole stream or its position, and does the drain end in time?

Two rounds, each with its own streamd and mock upstream, and --readers readers of a generation each:

    finish   the generations end within the window: every reader gets its [DONE] and the terminating chunk, exit 0
    cut      they don't: every reader gets `reconnect` with its real position, and streamd ends within a second after
             the deadline

Meanwhile open connections without a request ask and get 503 with Retry-After, and new connections are refused. The exit
status is 1 if any of this fails. Standard library only.

    loadtest/drain.py --readers 1000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import resource
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass

from rig import free_port

from streamd.demo.launch import Child, Launcher

RAMP_PER_S = 500
INTERVAL_MS = 200  # between tokens: 1,000 readers are 5,000 tokens/s, a fifth of what a core relays
STAY_S = 12.0  # duration of a generation of the first round, with the ramp
TIMEOUT_S = 5.0  # drain_timeout of the second round
LATE_S_MAX = 1.0  # from the deadline to the end of the process
KNOCK_EVERY_S = 0.1
UNASKED = 20  # connections that are open before the drain and ask only after it has begun

CHAT = json.dumps({"model": "mock-llm", "stream": True, "messages": [{"role": "user", "content": "Tell me."}]})
_ids = re.compile(rb"(?:^|\n)id: (\S+)")
_told = re.compile(rb'"last_id":"([^"]+)"')


def request(tokens: int) -> bytes:
    """A streamed chat of `tokens` tokens."""
    head = f"X-Mock-Tokens: {tokens}\r\nX-Mock-Interval-Ms: {INTERVAL_MS}\r\nContent-Type: application/json\r\n"
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{head}"
    return f"{head}Content-Length: {len(CHAT)}\r\n\r\n{CHAT}".encode()


class Reader(asyncio.Protocol):
    """A connection that keeps the end of the received bytes, and the last id."""

    def __init__(self, asks: bytes) -> None:
        self.asks = asks
        self.began: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.last_id = b""
        self.tail = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self.asks:
            transport.write(self.asks)

    def data_received(self, data: bytes) -> None:
        self.tail = (self.tail + data)[-1024:]
        ids = _ids.findall(data)
        if ids:
            self.last_id = ids[-1]
        if ids and not self.began.done():
            self.began.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        for waiting in (self.began, self.ended):
            if not waiting.done():
                waiting.set_result(None)

    def outcome(self) -> str:
        """The way in which the answer ended, in a word."""
        if self.tail.startswith(b"HTTP/1.1 503") and b"retry-after" in self.tail:
            return "503"
        if b"[DONE]" in self.tail and self.tail.endswith(b"0\r\n\r\n"):
            return "whole"
        told = _told.search(self.tail)
        if b"event: reconnect" in self.tail and told is not None:
            return "reconnect" if told[1] == self.last_id else "reconnect, wrong position"
        return "cut"


@dataclass
class Round:
    """The outcome of a round."""

    name: str
    outcomes: Counter[str]
    unasked: Counter[str]
    knocked: Counter[str]
    took_s: float
    status: int
    last_line: str

    def report(self) -> str:
        told = ", ".join(f"{count} {word}" for word, count in self.outcomes.most_common())
        knocked = ", ".join(f"{count} {word}" for word, count in (self.unasked + self.knocked).most_common())
        return (
            f"{self.name}: readers: {told}; meanwhile: {knocked}; {self.took_s:.2f} s from SIGTERM to the end,"
            f" exit {self.status}\n    {self.last_line}"
        )

    def right(self, wanted: str, readers: int, longest_s: float) -> bool:
        """Whether the round went as promised."""
        return (
            self.outcomes == {wanted: readers}
            and self.unasked == {"503": UNASKED}
            and set(self.knocked) <= {"refused"}
            and self.status == 0
            and self.took_s <= longest_s
        )


async def _open(port: int, asks: bytes) -> Reader:
    loop = asyncio.get_running_loop()
    _, reader = await loop.create_connection(lambda: Reader(asks), "127.0.0.1", port)
    return reader


async def _knock(port: int, knocked: Counter[str]) -> None:
    """Connect again and again, as new clients do."""
    while True:
        try:
            reader = await _open(port, request(1))
        except ConnectionRefusedError:
            knocked["refused"] += 1
        else:
            await reader.ended
            knocked[reader.outcome()] += 1
        await asyncio.sleep(KNOCK_EVERY_S)


async def _drain(name: str, port: int, daemon: Child, readers: int, tokens: int) -> Round:
    """Connect the readers, stop the daemon under them, and collect all outcomes."""
    opened = []
    for number in range(readers):
        opened.append(await _open(port, request(tokens)))
        if number % 50 == 49:
            await asyncio.sleep(50 / RAMP_PER_S)
    await asyncio.gather(*(reader.began for reader in opened))
    unasked = [await _open(port, b"") for _ in range(UNASKED)]
    knocked: Counter[str] = Counter()
    daemon.process.send_signal(signal.SIGTERM)
    began_at = time.monotonic()
    await asyncio.sleep(KNOCK_EVERY_S)  # the listeners are closed by then, or the accept queue is still being emptied
    for reader in unasked:
        reader.transport.write(request(1))
    knocking = asyncio.ensure_future(_knock(port, knocked))
    status = await asyncio.to_thread(daemon.process.wait)
    took_s = time.monotonic() - began_at
    knocking.cancel()
    await asyncio.gather(*(reader.ended for reader in (*opened, *unasked)))
    return Round(
        name,
        Counter(reader.outcome() for reader in opened),
        Counter(reader.outcome() for reader in unasked),
        knocked,
        took_s,
        status,
        daemon.tail().splitlines()[-1],
    )


def run(name: str, readers: int, tokens: int, timeout_s: float) -> Round:
    """Run a round with its own processes."""
    with Launcher().running() as launcher:
        mock = launcher.start("mock", (sys.executable, "-m", "streamd", "mock-llm", "--listen", "127.0.0.1:0"))
        address = f"127.0.0.1:{free_port()}"
        settings = ("--listen", address, "--upstream", launcher.wait_url(mock), "--drain-timeout", f"{timeout_s}s")
        daemon = launcher.start("streamd", (sys.executable, "-m", "streamd", "serve", *settings))
        launcher.wait_ready(daemon, address)
        return asyncio.run(_drain(name, int(address.rpartition(":")[2]), daemon, readers, tokens))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readers", type=int, default=1000)
    readers = parser.parse_args().readers
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    tokens = round((STAY_S + readers / RAMP_PER_S) * 1000 / INTERVAL_MS)
    finish = run("finish", readers, tokens, 60.0)
    print(finish.report())
    cut = run("cut", readers, 100_000, TIMEOUT_S)
    print(cut.report())
    fine = finish.right("whole", readers, 60.0) and cut.right("reconnect", readers, TIMEOUT_S + LATE_S_MAX)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
