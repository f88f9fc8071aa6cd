"""A deploy of three nodes, one after the other, under readers: every text is whole, or ends with a named error."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import json
import random
import re
import signal
from collections.abc import AsyncIterator, Callable

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from nodes import Event, Nodes, nodes
from served import WAIT_S

pytestmark = pytest.mark.cluster

GENERATIONS = 100
READERS_EACH = 5
TOKENS = 150
INTERVAL_MS = 100
TRIES_MAX = 40


class Balancer:
    """Names a node that is ready, as a balancer in front of all of them does."""

    def __init__(self, n: Nodes) -> None:
        self.ports = {name: daemon.port for name, daemon in n.daemons.items()}
        self._rng = random.Random(18)

    def pick(self) -> str:
        return self._rng.choice(sorted(self.ports))


class Reader:
    """A reader that comes back, by any node, until its stream has an end."""

    def __init__(self, balancer: Balancer, stream_id: str = "") -> None:
        self._balancer = balancer
        self.stream_id = stream_id
        self.last_id = ""
        self.text = ""
        self.end = ""  # the last event's: `[DONE]`, or the code of an error
        self.told_by: collections.Counter[int] = collections.Counter()  # farewells, by the port of the node's process
        self.tries = 0
        self.has_begun = asyncio.Event()

    async def run(self) -> None:
        while not self.end and self.tries < TRIES_MAX:
            self.tries += 1
            port = self._balancer.ports[self._balancer.pick()]
            with contextlib.suppress(OSError, EOFError):
                async for event in self._events(port):
                    self._take(event, port)
            await asyncio.sleep(0.1)  # as the retry: of an EventSource
        self.has_begun.set()

    async def _events(self, port: int) -> AsyncIterator[Event]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(self._request())
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200") or b"text/event-stream" not in head.lower():
                return  # 503 while a node drains, or looks for the stream
            named = re.search(rb"(?i)x-stream-id: (\S+)", head)
            assert named is not None, head
            self.stream_id = named[1].decode()
            self.has_begun.set()
            fields: dict[str, str] = {}
            while not reader.at_eof():
                line = (await reader.readline()).decode()
                if line == "\n":
                    if "data" in fields:
                        yield Event(fields.get("id", ""), fields.get("event", ""), fields["data"])
                    fields = {}
                name, _, value = line.rstrip("\n").partition(": ")
                fields[name] = value
        finally:
            writer.close()

    def _request(self) -> bytes:
        """In HTTP/1.0, whose streams are the bare events."""
        if self.stream_id:
            resumed = f"Last-Event-ID: {self.last_id}\r\n" if self.last_id else ""
            return f"GET /v1/streams/{self.stream_id} HTTP/1.0\r\n{resumed}\r\n".encode()
        body = b'{"model":"mock-llm","stream":true,"messages":[{"role":"user","content":"Hello"}]}'
        mock = f"X-Mock-Tokens: {TOKENS}\r\nX-Mock-Interval-Ms: {INTERVAL_MS}\r\nX-Mock-Text-Seed: 1\r\n"
        head = f"POST /v1/chat/completions HTTP/1.0\r\nContent-Type: application/json\r\n{mock}"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def _take(self, event: Event, port: int) -> None:
        if event.id:
            self.last_id = event.id
        if event.name == "reconnect":
            self.told_by[port] += 1
        elif event.data == "[DONE]":
            self.end = event.data
        elif event.data.startswith("{"):
            row = json.loads(event.data)
            if "error" in row:
                self.end = str(row["error"].get("code"))
                return
            for choice in row.get("choices", []):
                self.text += choice.get("delta", {}).get("content") or ""


def whole_text(n: Nodes) -> str:
    """The answer that isn't streamed."""
    body = b'{"model":"mock-llm","messages":[{"role":"user","content":"Hello"}]}'
    fields = {"Content-Type": "application/json", "X-Mock-Tokens": str(TOKENS), "X-Mock-Text-Seed": "1"}
    answer = n["a"].request("POST", "/v1/chat/completions", body, fields)
    return str(json.loads(answer.read())["choices"][0]["message"]["content"])


async def deploy(n: Nodes, balancer: Balancer, start: Callable[[str], object]) -> None:
    """Replace each node in turn: the balancer stops asking it, it drains, a new process joins."""
    loop = asyncio.get_running_loop()
    for name in sorted(n.daemons):
        del balancer.ports[name]
        n[name].signal(signal.SIGTERM)
        assert await loop.run_in_executor(None, n[name].ended) == 0, n[name].lines[-5:]
        await loop.run_in_executor(None, start, name)
        balancer.ports[name] = n[name].port


async def scene(n: Nodes, start: Callable[[str], object]) -> list[Reader]:
    balancer = Balancer(n)
    first = [Reader(balancer) for _ in range(GENERATIONS)]
    tasks = [asyncio.create_task(reader.run()) for reader in first]
    for reader in first:
        await reader.has_begun.wait()
    others = [Reader(balancer, reader.stream_id) for reader in first for _ in range(READERS_EACH - 1)]
    tasks += [asyncio.create_task(reader.run()) for reader in others]
    tasks.append(asyncio.create_task(deploy(n, balancer, start)))
    async with asyncio.timeout(4 * WAIT_S):
        await asyncio.gather(*tasks)
    return first + others


def test_a_rolling_deploy_costs_no_reader_a_token_in_silence() -> None:
    with nodes("--drain-timeout", "2s", names="abc") as n:
        whole = whole_text(n)

        def start(name: str) -> None:
            n.spawn(name)
            n[name].notify.until("READY=1")
            n.until_up(name)

        readers = asyncio.run(scene(n, start))
        ends = collections.Counter(reader.end for reader in readers)
        told = collections.Counter(itertools.chain(*(reader.told_by.values() for reader in readers)))
        tries = sum(reader.tries for reader in readers) / len(readers)
        print(f"{len(readers)} readers: ends {dict(ends)}, connections each {tries:.1f}, farewells from a node {told}")
        by_stream: dict[str, set[tuple[str, str]]] = {}
        for reader in readers:
            assert (reader.end == "[DONE]" and reader.text == whole) or (
                reader.end == "restarted" and reader.text and whole.startswith(reader.text)
            ), (reader.stream_id, reader.end, reader.tries, reader.text[-50:])
            assert max(reader.told_by.values(), default=0) <= 1
            by_stream.setdefault(reader.stream_id, set()).add((reader.end, reader.text))
        assert all(len(each) == 1 for each in by_stream.values()), "all readers of a stream have the same"
