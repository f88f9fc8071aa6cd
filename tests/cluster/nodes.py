"""Daemons that share a real engine, each a process of its own, and readers over HTTP whose text is compared."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from real_engine import RealEngine
from served import WAIT_S, Served, served, upstream


class Event(NamedTuple):
    """An event as a reader got it."""

    id: str
    name: str
    data: str


class NodeReader:
    """A reader of a stream, which reads as far as it is told to."""

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self.answer = answer
        self.events: list[Event] = []
        self.is_over = False

    @property
    def stream_id(self) -> str:
        return str(self.answer.headers["X-Stream-Id"])

    def next(self) -> Event | None:
        """The next event; None at the end, however it came."""
        fields: dict[str, str] = {}
        while True:
            try:
                line = self.answer.readline().decode()
            except (http.client.HTTPException, OSError):
                line = ""
            if not line:
                self.is_over = True
                return None
            if line == "\n" and "data" in fields:
                event = Event(fields.get("id", ""), fields.get("event", ""), fields["data"])
                self.events.append(event)
                return event
            name, _, value = line.rstrip("\n").partition(": ")
            if line != "\n" and name:
                fields[name] = value if name not in fields else f"{fields[name]}\n{value}"

    def read(self, count: int) -> NodeReader:
        """Read so many more events."""
        for _ in range(count):
            assert self.next() is not None, self.events[-3:]
        return self

    def to_the_end(self) -> NodeReader:
        while self.next() is not None:
            pass
        return self

    @property
    def last_id(self) -> str:
        return next(event.id for event in reversed(self.events) if event.id)

    @property
    def text(self) -> str:
        """The text of all chat events."""
        chunks = [json.loads(event.data) for event in self.events if event.data.startswith("{")]
        return "".join(
            choice.get("delta", {}).get("content") or "" for chunk in chunks for choice in chunk.get("choices", [])
        )

    @property
    def names(self) -> list[str]:
        return [event.name for event in self.events if event.name]


class Nodes:
    """Daemons a and b, the engine they share, and the upstream."""

    def __init__(self, engine: RealEngine, mock: str, daemons: dict[str, Served]) -> None:
        self.engine = engine
        self.mock = mock
        self.daemons = daemons

    def __getitem__(self, name: str) -> Served:
        return self.daemons[name]

    def start(self, node: str, **mock: object) -> NodeReader:
        """A generation at a node."""
        return NodeReader(self[node].generation(**mock))

    def ask(self, node: str, stream_id: str, last_id: str = "", **headers: str) -> http.client.HTTPResponse:
        given = {"Last-Event-ID": last_id} if last_id else {}
        return self[node].request("GET", f"/v1/streams/{stream_id}", headers=given | headers)

    def read(self, node: str, stream_id: str, last_id: str = "") -> NodeReader:
        answer = self.ask(node, stream_id, last_id)
        assert answer.status == 200, (answer.status, answer.read(), self[node].lines[-5:])
        return NodeReader(answer)

    def status(self, node: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self[node].request("GET", "/status").read())["cluster"]
        return found

    def kill(self, node: str) -> None:
        """kill -9 of the daemon with its worker: a power failure, as far as the others see."""
        os.killpg(self[node].process.pid, signal.SIGKILL)

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            if found := condition():
                return found
            time.sleep(0.02)
        raise AssertionError(f"no {what}: {[daemon.lines[-8:] for daemon in self.daemons.values()]}")

    def until_up(self, *names: str) -> None:
        """Until these daemons' links, for commands and pushes, are up and healed."""
        for name in names or tuple(self.daemons):
            self.until(
                lambda name=name: all(
                    each["state"] == "up" and each["pushes"] for each in self.status(name)["engine"].values()
                ),
                f"engine at {name}",
            )

    def until_copied(self, node: str) -> None:
        """Until the engine has all events of this node's streams."""
        self.until(lambda: self.status(node)["lag_s"] == 0, "copy")


class CutOff(RealEngine):
    """A way to an engine, as an engine: a relay that a test can shut."""

    def __init__(self, engine: RealEngine) -> None:
        super().__init__()
        self._engine = engine
        self.is_shut = False

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_shut:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._engine.port)
        await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while not self.is_shut:
                with contextlib.suppress(TimeoutError):
                    data = await asyncio.wait_for(reader.read(1 << 16), 0.05)
                    if not data:
                        break
                    writer.write(data)
        writer.transport.abort()


@contextlib.contextmanager
def cut_off(engine: RealEngine) -> Iterator[CutOff]:
    """A CutOff in a thread."""
    relay = CutOff(engine)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(asyncio.start_server(relay.carry, "127.0.0.1", relay.port), loop).result(WAIT_S)
    try:
        yield relay
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)
        relay.close()


def start_engine(engine: RealEngine) -> None:
    """Start, and wait until it answers."""
    engine.spawn()
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if engine.ask("PING"):
                return
        time.sleep(0.01)
    raise AssertionError("the engine doesn't answer")


def _nothing(name: str) -> tuple[str, ...]:
    return ()


@contextlib.contextmanager
def nodes(
    *args: str, names: str = "ab", engine: RealEngine | None = None, own: Callable[[str], tuple[str, ...]] = _nothing
) -> Iterator[Nodes]:
    """Daemons of these names; `args` are flags of all, `own` those of each. `engine`: one that runs already."""
    runs_already = engine is not None
    engine = engine or RealEngine()
    with contextlib.ExitStack() as stack:
        if not runs_already:
            stack.callback(engine.close)
            start_engine(engine)
        mock = stack.enter_context(upstream())
        url = f"valkey://127.0.0.1:{engine.port}"
        common = ("--upstream", mock, "--engine", url, "--engine-lease", "6s", *args)
        daemons = {
            name: stack.enter_context(served(*common, "--node", name, *own(name), new_group=True)) for name in names
        }
        made = Nodes(engine, mock, daemons)
        for daemon in daemons.values():
            daemon.notify.until("READY=1")
        made.until_up()
        yield made
