"""Daemons that share a real engine, each a process of its own, and readers over HTTP whose text is compared."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from counting_upstream import CountingSource, counting
from patient import Ending, Event, PatientReader, events_of
from real_engine import RealEngine
from served import WAIT_S, Served, served, upstream
from way import Way


class NodeReader:
    """A reader of a stream, which reads as far as it is told to."""

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self.answer = answer
        self.events: list[Event] = []
        self._events = events_of(answer)

    @property
    def stream_id(self) -> str:
        return str(self.answer.headers["X-Stream-Id"])

    def next(self) -> Event | None:
        """The next event; None at the end, however it came."""
        event = next(self._events, None)
        if event is not None:
            self.events.append(event)
        return event

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
    """Daemons a, b and so on, the engine they share, the way of each to it, and the upstream."""

    def __init__(self, engine: RealEngine, source: CountingSource | None, stack: contextlib.ExitStack) -> None:
        self.engine = engine
        self.source = source
        self.daemons: dict[str, Served] = {}
        self.ways: dict[str, Way] = {}
        self._commands: dict[str, tuple[str, ...]] = {}
        self._stack = stack
        self._begun = 0

    # -- daemons

    def add(self, name: str, way: Way, command: tuple[str, ...]) -> None:
        """A node of this name, which goes this way to the engine."""
        self.ways[name], self._commands[name] = way, command
        self.spawn(name)

    def spawn(self, name: str) -> None:
        """Start the node's daemon, for the first time or after its death."""
        self.daemons[name] = self._stack.enter_context(served(*self._commands[name], new_group=True))

    def restart(self, name: str) -> None:
        """kill -9 of the daemon with its worker, and a new one in its place."""
        self.kill(name)
        self[name].ended()
        self.spawn(name)
        self[name].notify.until("READY=1")

    def __getitem__(self, name: str) -> Served:
        return self.daemons[name]

    # -- counted generations

    def begin(self, node: str, *more: str) -> PatientReader:
        """A counted generation at a node, with its first reader there, which comes back at `more` nodes in turn."""
        assert self.source is not None
        self._begun += 1
        generation = self.source.generation(f"t{self._begun}")
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": generation.tag}]}
        headers = {"Content-Type": "application/json", "X-Stream-Detach-Grace": "60"}
        answer = self[node].request("POST", "/v1/chat/completions", json.dumps(body).encode(), headers)
        assert answer.status == 200, answer.read()
        stream_id = str(answer.headers["X-Stream-Id"])
        reader = PatientReader(generation, stream_id, self.ask, node, *more, first=answer)
        reader.start()
        return reader

    def reader_of(self, first: PatientReader, *homes: str) -> PatientReader:
        """Another reader of a counted generation, that hasn't begun."""
        return PatientReader(first.generation, first.stream_id, self.ask, *homes)

    def also(self, first: PatientReader, *homes: str) -> PatientReader:
        """Another reader of a counted generation, from its first event on."""
        reader = self.reader_of(first, *homes)
        reader.start()
        return reader

    def goes_on(self, lost: PatientReader) -> PatientReader:
        """The reader of a stream that was said to be lost goes on behind the place that it was told."""
        reader = self.reader_of(lost, *lost.homes)
        reader.seq, reader.last_id = lost.seq, lost.last_id
        reader.start()
        return reader

    def until_read(self, readers: Iterable[PatientReader], more: int = 20) -> None:
        """Until each of these readers has so many events more than are made now, or has ended."""
        wanted = [(reader, reader.generation.made + more) for reader in readers]
        self.until(
            lambda: all(reader.seq >= seq or reader.ending or reader.wrong for reader, seq in wanted),
            f"{more} more events for {[(each.stream_id, each.seq, seq, each.statuses[-5:]) for each, seq in wanted]}",
        )

    def finish(self, readers: Sequence[PatientReader], ending: Ending = Ending.DONE) -> None:
        """End the generations of these readers. Each has every event, exactly once and as it was made, and the end."""
        for reader in readers:
            reader.generation.end()
        for reader in readers:
            reader.join(WAIT_S)
            assert not reader.wrong and reader.ending is ending, (reader.wrong, reader.ending, reader.seq, self.lines())
            assert reader.seq == reader.generation.made + 2, "the numbers, the finish and [DONE]"

    def lines(self) -> dict[str, list[str]]:
        """The last lines of each daemon."""
        return {name: daemon.lines[-8:] for name, daemon in self.daemons.items()}

    # -- requests

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
        raise AssertionError(f"no {what}: {self.lines()}")

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
    *args: str,
    names: str = "ab",
    engine: RealEngine | None = None,
    own: Callable[[str], tuple[str, ...]] = _nothing,
    counted: bool = False,
    url: str = "",
) -> Iterator[Nodes]:
    """Daemons of these names; `args` are flags of all, `own` those of each. `engine`: one that runs already.

    `counted`: the upstream is a CountingSource, else the mock. `url`: the engine's for all nodes, else each goes a way
    of its own to the engine.
    """
    runs_already = engine is not None
    engine = engine or RealEngine()
    with contextlib.ExitStack() as stack:
        if not runs_already:
            stack.callback(engine.close)
            start_engine(engine)
        source = stack.enter_context(counting()) if counted else None
        upstream_url = source.url if source is not None else stack.enter_context(upstream())
        made = Nodes(engine, source, stack)
        for name in names:
            way = stack.enter_context(Way(engine.port).serving())
            common = ("--upstream", upstream_url, "--engine", url or f"valkey://127.0.0.1:{way.port}")
            made.add(name, way, (*common, "--engine-lease", "6s", *args, "--node", name, *own(name)))
        for daemon in made.daemons.values():
            daemon.notify.until("READY=1")
        made.until_up()
        yield made
