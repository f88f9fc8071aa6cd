"""Readers of streams at two nodes, which compare when each token came; a process for loadtest/engine_bench.py.

    engine_readers.py follow --a PORT [--b PORT] --streams 200 --seconds 8
    engine_readers.py resume --a PORT --b PORT --streams 2000 [--kill PID,PID]

`follow` starts streams at node a, prints `opened`, reads each at node b too, prints `begin` when its window begins, and
then a line of JSON. `resume` starts streams at a, half of which end; then all readers come to b at once, each with its
position.
Tokens are those of source.c: `@<number>.<monotonic ns> `.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from time import monotonic_ns
from typing import cast

import uvloop

TOKEN = re.compile(rb"@(\d+)\.(\d+) ")
STREAM_ID = re.compile(rb"(?i)\r\nx-stream-id: (\S+)\r\n")
CARRY_MAX = 48  # bytes of a token that a read has cut

OPEN_PER_S = 200.0
CROWD_PER_S = 150.0  # half of them ask for 100 tokens: 7,500 tokens a second
# From the last reader at b to the window.
WARM_S = 2.0

# resume: finished streams have so many tokens; running ones one in this time.
ENDED_TOKENS = 100
ENDED_INTERVAL_MS = 50
RUNNING_INTERVAL_MS = 200
READ_TOKENS = 20
# With a killed node the positions stand in front of the last write, which comes once a second.
BEHIND_TOKENS = 10
WAIT_S = 60.0


class Tokens(asyncio.Protocol):
    """A connection that asks, and tells of each token with its number, its time and that of its arrival."""

    def __init__(self, asks: bytes, on_token: Callable[[int, int, int], None]) -> None:
        self._asks = asks
        self._on_token = on_token
        self._carry = b""
        self.status = self.refusal = ""
        self.stream_id = ""
        self.done_at = 0  # when the end came, in ns
        self.is_over = False
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is of a class of its own
        self.transport.write(self._asks)

    def data_received(self, data: bytes) -> None:
        now = monotonic_ns()
        text = self._carry + data
        if not self.status:
            self.status = text[9:12].decode()
            self.refusal = text.rpartition(b"\r\n")[2].decode(errors="replace") if self.status != "200" else ""
            found = STREAM_ID.search(text)
            self.stream_id = found[1].decode() if found else ""
        end = 0
        for match in TOKEN.finditer(text):
            self._on_token(int(match[1]), int(match[2]), now)
            end = match.end()
        if not self.done_at and b"[DONE]" in text:
            self.done_at = now
        self._carry = text[max(end, len(text) - CARRY_MAX) :]

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_over = True

    def close(self) -> None:
        """Go away, as a reader whose network is lost."""
        if self.transport is not None:
            self.transport.abort()


def post(**asked: int) -> bytes:
    """A streamed chat; source.c reads `asked` from its body."""
    body = json.dumps({"model": "synthetic", "stream": True, **asked, "messages": [{"role": "user", "content": "hi"}]})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def get(stream_id: str, seq: int = 0) -> bytes:
    """A stream by its id, from its first event or behind one."""
    position = f"Last-Event-ID: {stream_id}:{seq}\r\n" if seq else ""
    return f"GET /v1/streams/{stream_id} HTTP/1.1\r\nHost: localhost\r\n{position}\r\n".encode()


def quantiles_ms(values_ns: Sequence[int]) -> dict[str, float]:
    """Quantiles of times, in milliseconds."""
    ordered = sorted(values_ns)
    places = {"p50": 0.5, "p99": 0.99, "p999": 0.999, "max": 1.0}
    if not ordered:
        return dict.fromkeys(places, 0.0)
    return {name: ordered[min(len(ordered) - 1, int(len(ordered) * q))] / 1e6 for name, q in places.items()}


async def connect(port: int, reader: Tokens) -> Tokens:
    await asyncio.get_running_loop().create_connection(lambda: reader, "127.0.0.1", port)
    return reader


async def until(condition: Callable[[], bool], limit_s: float = WAIT_S) -> bool:
    """Whether the condition became true within the limit."""
    deadline = monotonic_ns() + limit_s * 1e9
    while not condition():
        if monotonic_ns() > deadline:
            return False
        await asyncio.sleep(0.005)
    return True


def said(readers: Iterable[Tokens]) -> dict[str, int]:
    """The answers of readers, counted."""
    return dict(Counter(f"{reader.status} {reader.refusal}".strip() or "no answer" for reader in readers))


class Followed:
    """The tokens of a stream at both nodes."""

    def __init__(self) -> None:
        self.is_counted = False
        self.count_a = self.count_b = 0
        self.lost = self.doubled = 0
        self.ages_a: list[int] = []
        self.ages_b: list[int] = []
        self.added: list[int] = []
        self._seen_at: dict[int, int] = {}  # tokens that one node has shown
        self._next = {"a": 0, "b": 0}

    def _take(self, node: str, number: int) -> None:
        self.lost += max(0, number - self._next[node])
        self.doubled += number < self._next[node]
        self._next[node] = max(self._next[node], number + 1)

    def at_a(self, number: int, sent: int, now: int) -> None:
        self._take("a", number)
        if self.is_counted:
            self.count_a += 1
            self.ages_a.append(now - sent)
            self._pair(number, now, 1)

    def at_b(self, number: int, sent: int, now: int) -> None:
        self._take("b", number)
        if self.is_counted:
            self.count_b += 1
            self.ages_b.append(now - sent)
            self._pair(number, now, -1)

    def _pair(self, number: int, now: int, sign: int) -> None:
        other = self._seen_at.pop(number, None)
        if other is None:
            self._seen_at[number] = now
        else:
            self.added.append(sign * (other - now))


async def follow(a: int, b: int, streams: int, settle_s: float, seconds: float) -> dict[str, object]:
    """Read each stream at a and, if there is one, at b."""
    seen = [Followed() for _ in range(streams)]
    readers: list[Tokens] = []
    for each in seen:
        readers.append(await connect(a, Tokens(post(), each.at_a)))
        await asyncio.sleep(1 / OPEN_PER_S)
    if not await until(lambda: all(reader.stream_id for reader in readers)):
        raise TimeoutError(f"node a answered its readers {said(readers)}")
    print("opened", flush=True)
    await asyncio.sleep(settle_s)
    elsewhere: list[Tokens] = []
    for reader, each in zip(readers, seen, strict=True):
        if b:
            elsewhere.append(await connect(b, Tokens(get(reader.stream_id), each.at_b)))
        await asyncio.sleep(1 / OPEN_PER_S)
    await asyncio.sleep(WARM_S)
    for each in seen:
        each.is_counted = True
    print("begin", flush=True)
    await asyncio.sleep(seconds)
    for each in seen:
        each.is_counted = False
    everybody = readers + elsewhere
    return {
        "tokens_per_s": sum(each.count_a for each in seen) / seconds,
        "followed_per_s": sum(each.count_b for each in seen) / seconds,
        "age_a_ms": quantiles_ms([age for each in seen for age in each.ages_a]),
        "age_b_ms": quantiles_ms([age for each in seen for age in each.ages_b]),
        "added_ms": quantiles_ms([added for each in seen for added in each.added]),
        "lost": sum(each.lost for each in seen),
        "doubled": sum(each.doubled for each in seen),
        "closed": sum(reader.is_over for reader in everybody),
        "not_200": sum(reader.status != "200" for reader in everybody),
    }


class Resumed:
    """A stream that was read at a, and its reader at b."""

    def __init__(self, *, ends: bool) -> None:
        self.ends = ends
        self.next = 0  # the token that is due at b
        self.lost = self.doubled = 0
        self.ids: list[str] = []
        self.token_at = 0  # when b showed the next token
        self.reader: Tokens
        self.again: Tokens | None = None

    def at_a(self, number: int, sent: int, now: int) -> None:
        self.next = number + 1

    def at_b(self, number: int, sent: int, now: int) -> None:
        self.lost += max(0, number - self.next)
        self.doubled += number < self.next
        self.next = max(self.next, number + 1)
        self.token_at = self.token_at or now

    @property
    def is_read(self) -> bool:
        """Whether the reader at a has read enough."""
        return self.reader.done_at > 0 if self.ends else self.next >= READ_TOKENS

    @property
    def back_at(self) -> int:
        """When the reader had what it came for: the next token, or the end; 0 before."""
        if not self.ends:
            return self.token_at
        return self.again.done_at if self.again is not None else 0


async def resume(a: int, b: int, streams: int, kill: list[int]) -> dict[str, object]:
    """All readers of a come to b at once. With `kill` node a is killed at that moment."""
    some = [Resumed(ends=number % 2 == 0) for number in range(streams)]
    for each in some:
        if each.ends:
            asked = post(tokens=ENDED_TOKENS, interval_ms=ENDED_INTERVAL_MS)
        else:
            asked = post(interval_ms=RUNNING_INTERVAL_MS)
        each.reader = await connect(a, Tokens(asked, each.at_a))
        await asyncio.sleep(1 / CROWD_PER_S)
    if not await until(lambda: all(each.is_read for each in some)):
        raise TimeoutError(f"node a answered its readers {said([each.reader for each in some])}")
    await asyncio.sleep(1.5)  # the last write of a finished stream
    for each in some:
        # Readers of finished streams lost their network in the middle of the answer; those of running streams just now.
        each.next = ENDED_TOKENS // 2 if each.ends else each.next - (BEHIND_TOKENS if kill else 0)
        each.reader.close()
    for pid in kill:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    began = monotonic_ns()
    for each in some:
        # Token k, counted from 0, is event k + 1.
        each.again = Tokens(get(each.reader.stream_id, each.next), each.at_b)
    await asyncio.gather(*(connect(b, each.again) for each in some if each.again is not None))
    await until(lambda: all(each.back_at for each in some), 15.0)
    kinds = {"finished": [each for each in some if each.ends], "running": [each for each in some if not each.ends]}
    return {
        "missing": sum(not each.back_at for each in some),
        "lost": sum(each.lost for each in some),
        "doubled": sum(each.doubled for each in some),
        "not_200": sum(each.again is None or each.again.status != "200" for each in some),
        "refusals": said(each.again for each in some if each.again is not None and each.again.refusal),
        **{kind: quantiles_ms([each.back_at - began for each in them if each.back_at]) for kind, them in kinds.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("follow", "resume"))
    parser.add_argument("--a", type=int, required=True)
    parser.add_argument("--b", type=int, default=0)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--settle", type=float, default=1.0, help="seconds from the last reader at a to the first at b")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--kill", default="", help="pids of node a's processes")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if args.what == "follow":
            report = runner.run(follow(args.a, args.b, args.streams, args.settle, args.seconds))
        else:
            report = runner.run(resume(args.a, args.b, args.streams, [int(pid) for pid in args.kill.split(",") if pid]))
    print(json.dumps(report), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
