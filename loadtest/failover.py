"""Two replicas, one of which fails from the start: how many requests notice, and how many does it still get?

    python loadtest/failover.py [--seconds 60] [--before DIR] [--at-once 4] [--json FILE]

20 requests a second, evenly, from ten principals in turn, for a whole answer that the healthy replica gives after
200 ms. The other answers a status at once, refuses connections, closes them as they are accepted, or is a black hole: a
listener whose queue is full, so that the kernel answers no SYN. A request is *hurt* if its client doesn't get 200, or
waits for a second or longer. `--before` is the source of another version. Each fault has a daemon of its own;
`--at-once` of them run at the same time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).parents[1]
PER_SECOND = 20
PRINCIPALS = 10
ANSWER_S = 0.2
LATE_S = 1.0
WAIT_S = 30.0

FAULTS = ("500", "502", "503", "504", "529", "refused", "closed at once", "black hole")

BODY = b'{"model":"m","messages":[]}'
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %d\r\n"
    b"Content-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
)
ANSWER = b"HTTP/1.1 %b Said\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


class Figures(NamedTuple):
    """The outcome of a fault."""

    requests: int
    failed: int  # without 200
    late: int  # 200, after a second or later
    longest_s: float
    tries: int  # requests and connections that the failing replica was to get

    @property
    def hurt(self) -> float:
        return (self.failed + self.late) / self.requests


async def serve_answers(status: bytes, after_s: float) -> asyncio.Server:
    """A replica that answers every request with a status."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head)
                await reader.readexactly(int(length[1]) if length else 0)
                await asyncio.sleep(after_s)
                writer.write(ANSWER % status)
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


async def serve_closes() -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


@contextlib.asynccontextmanager
async def failing(fault: str) -> AsyncIterator[int]:
    """The port of a replica with this fault."""
    async with contextlib.AsyncExitStack() as stack:
        if fault == "refused":
            with socket.create_server(("127.0.0.1", 0)) as gone:
                port: int = gone.getsockname()[1]
        elif fault == "black hole":
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
            port = listener.getsockname()[1]
            for _ in range(4):  # the queue takes one more than its length; the rest waits for ever
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    filler.connect(listener.getsockname())
        else:
            starts = serve_closes() if fault == "closed at once" else serve_answers(fault.encode(), 0.0)
            server = await stack.enter_async_context(await starts)
            port = server.sockets[0].getsockname()[1]
        yield port


@contextlib.asynccontextmanager
async def daemon(source: Path, bad: int, good: int) -> AsyncIterator[tuple[int, Callable[[], Awaitable[str]]]]:
    """streamd in front of both; yields its port, and a function that reads its metrics."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        command = ["-m", "streamd", "serve", "--listen", f"127.0.0.1:{port}", "--log-level", "error"]
        command += ["--upstream", f"http://127.0.0.1:{bad}", "--upstream", f"http://127.0.0.1:{good}"]
        environment = {**os.environ, "PYTHONPATH": str(source)}
        process = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=folder, env=environment)
        try:
            while not await _is_ready(port):  # noqa: ASYNC110 - another process becomes ready
                await asyncio.sleep(0.1)
            yield port, lambda: _get(port, "/metrics")
        finally:
            process.send_signal(signal.SIGINT)
            await process.wait()


async def _is_ready(port: int) -> bool:
    try:
        return "200" in (await _get(port, "/readyz")).partition("\r\n")[0]
    except OSError:
        return False


async def _get(port: int, path: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % path.encode())
    answer = await reader.read()
    writer.close()
    return answer.decode()


async def _asked(port: int, principal: int) -> tuple[bool, float]:
    """Whether a request got 200, and the time that it took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    first = b""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(WAIT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(REQUEST % (principal, len(BODY), BODY))
            first = (await reader.read()).partition(b"\r\n")[0]
            writer.close()
    return b" 200 " in first, loop.time() - began


async def measured(source: Path, fault: str, seconds: float) -> Figures:
    """Ask for a minute."""
    async with failing(fault) as bad, await serve_answers(b"200", ANSWER_S) as healthy:
        good = healthy.sockets[0].getsockname()[1]
        async with daemon(source, bad, good) as (port, metrics):
            loop = asyncio.get_running_loop()
            began = loop.time()
            asks = []
            for n in range(round(seconds * PER_SECOND)):
                await asyncio.sleep(began + n / PER_SECOND - loop.time())
                asks.append(asyncio.create_task(_asked(port, n % PRINCIPALS)))
            answers = await asyncio.gather(*asks)
            text = await metrics()
    failed = sum(not ok for ok, _ in answers)
    late = sum(ok and took_s >= LATE_S for ok, took_s in answers)
    return Figures(len(answers), failed, late, max(took_s for _, took_s in answers), _tries(text, bad))


def _tries(metrics: str, port: int) -> int:
    """Requests sent to a replica, and connections to it that were not established, as streamd counts them."""
    lines = [line for line in metrics.splitlines() if f'upstream="127.0.0.1:{port}"' in line]
    requests = [line for line in lines if line.startswith("streamd_upstream_requests_total{")]
    failures = [line for line in lines if line.startswith("streamd_upstream_failures_total{")]
    unsent = [line for line in failures if 'reason="upstream_connect"' in line]
    return round(sum(float(line.rpartition(" ")[2]) for line in (*requests, *unsent)))


async def run(sources: dict[str, Path], options: argparse.Namespace) -> dict[str, dict[str, Figures]]:
    """All faults and versions."""
    places = asyncio.Semaphore(options.at_once)
    table: dict[str, dict[str, Figures]] = {fault: {} for fault in FAULTS if options.only in fault}

    async def cell(fault: str, version: str) -> None:
        async with places:
            table[fault][version] = await measured(sources[version], fault, options.seconds)

    await asyncio.gather(*(cell(fault, version) for fault in table for version in sources))
    return table


def shown(figures: Figures) -> str:
    """A cell of the table."""
    hurt = f"{100 * figures.hurt:.1f} % ({figures.failed} failed, {figures.late} late)"
    return f"{hurt} | {figures.longest_s:.1f} s | {figures.tries}"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each fault [60]")
    parser.add_argument("--before", type=Path, help="the source of another version, to compare with")
    parser.add_argument("--at-once", type=int, default=4, help="daemons at a time [4]")
    parser.add_argument("--only", default="", help="faults with this text in their name")
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    options = parser.parse_args()
    sources = {**({"before": options.before.resolve()} if options.before else {}), "now": PROJECT}
    table = asyncio.run(run(sources, options))
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.0f}, {sys.version.split()[0]}\n")
    columns = [f"{each}: hurt | longest | failing replica got" for each in sources]
    print("| fault | " + " | ".join(columns) + " |")
    print("| --- |" + " --- | --- | --- |" * len(sources))
    for fault, row in table.items():
        print(f"| {fault} | " + " | ".join(shown(row[version]) for version in sources) + " |")
    if options.json:
        figures = {fault: {each: row[each]._asdict() for each in sources} for fault, row in table.items()}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
