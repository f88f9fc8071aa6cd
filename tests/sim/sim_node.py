"""A node of the simulation: a process with a loop, clocks, a hub and a part in the cluster of its own."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from sim_loop import Violation, VirtualLoop

from streamd.config import Settings
from streamd.core.hub import CHARGE_TURNS, Hub
from streamd.core.stream import Stream
from streamd.engine.cluster import Cluster
from streamd.engine.key_limits import LimitedKeys
from streamd.engine.link import LinkTerms
from streamd.net.runtime import Runtime

if TYPE_CHECKING:
    from sim_cluster import SimCluster


def _without_levels(key: object, levels: object = None) -> NoReturn:
    raise AssertionError("there are no keys here")


# Nodes without keys: limits over all nodes have tests of their own.
WITHOUT_KEYS = LimitedKeys(lambda: None, hash, _without_levels, _without_levels)


class Handle:
    """A callback of a node's loop. While the node stands still, it waits."""

    __slots__ = ("args", "callback", "loop")

    def __init__(self, loop: NodeLoop, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.loop = loop
        self.callback: Callable[..., object] | None = callback
        self.args = args

    def cancel(self) -> None:
        self.callback = None
        self.args = ()

    def run(self) -> None:
        callback, loop = self.callback, self.loop
        if callback is None or loop.is_over:
            return
        if loop.is_frozen:
            loop.waiting.append(self.run)
            return
        asyncio._set_running_loop(loop)
        callback(*self.args)


class NodeLoop(asyncio.AbstractEventLoop):
    """The loop of a process among others: a clock of its own, and an end, with which all its callbacks are gone."""

    def __init__(self, world: VirtualLoop, ahead_s: float) -> None:
        self._world = world
        self._ahead_s = ahead_s  # of the world's clock; monotonic clocks of two machines have nothing in common
        self.is_frozen = False
        self.is_over = False
        self.waiting: deque[Callable[[], None]] = deque()
        self.failed = world.failed
        self.connect: Callable[[Any, str, int], Any]

    def time(self) -> float:
        return self._world.now + self._ahead_s

    @property
    def now(self) -> float:
        return self._world.now

    @property
    def steps(self) -> int:
        return self._world.steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._world.steps = steps

    def io(self, delay: float, action: Callable[..., object], *args: Any) -> None:
        self._world.io(delay, action, *args)

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> Handle:  # type: ignore[override]
        handle = Handle(self, callback, args)
        self._world.call_soon(handle.run)
        return handle

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Handle:  # type: ignore[override]
        handle = Handle(self, callback, args)
        self._world.call_later(delay, handle.run)
        return handle

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Handle:  # type: ignore[override]
        return self.call_later(when - self.time(), callback, *args)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self)
        task.add_done_callback(self._world._task_done)
        return task

    async def create_connection(self, factory: Any, host: Any = None, port: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        return await self.connect(factory, host, port)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self._world.call_exception_handler(context)

    # -- the world's side

    def arrives(self, action: Callable[..., object], *args: Any) -> None:
        """Something from outside reaches the process, now or when it goes on."""
        if self.is_over:
            return
        if self.is_frozen:
            self.waiting.append(lambda: self.arrives(action, *args))
            return
        asyncio._set_running_loop(self)
        self._world.steps += 1
        action(*args)

    def go_on(self) -> None:
        """The process runs again."""
        self.is_frozen = False
        waiting, self.waiting = self.waiting, deque()
        for run in waiting:
            self._world.call_soon(run)


class Node:
    """A process that serves. Its member id is new, as after every start."""

    def __init__(self, cluster: SimCluster, name: str, settings: Settings) -> None:
        rng = random.Random(cluster.rng.random())
        self.world = cluster
        self.name = name
        self.loop = NodeLoop(cluster.loop, rng.choice((0.0, 86_400.0, 1e6)))
        self.loop.connect = self._connect
        self.wall_ahead_s = rng.choice((0.0, 0.0, -7200.0, 7200.0, 1e7))
        self.began_at = cluster.loop.now
        self.thawed_at = cluster.loop.now
        self.over_at = 0.0
        self.is_stopping = False
        self.said: list[tuple[str, str, dict[str, object]]] = []
        self.hub = hub = Hub(
            log_bytes_max=1 << 40,
            stream_log_bytes_max=settings.log_bytes_max,
            stream_log_events_max=settings.log_events_max,
            detached_max=100,
            slot=0,
            incarnation=cluster.incarnation(),
            random_bytes=rng.randbytes,
            on_sealed=self._sealed,
            on_removed=self._removed,
            soon=self.loop.call_soon,
        )
        self.runtime = Runtime(
            self.loop,
            settings,
            hub,
            rng=rng,
            unix_time=lambda: 1.7e9 + cluster.loop.now + self.wall_ahead_s,
            on_bug=self._bug,
        )
        hub.new_fanout = self.runtime.new_fanout  # type: ignore[assignment]
        terms = LinkTerms(
            client_name=f"streamd-{hub.member}",
            timeout_s=settings.engine_timeout_s,
            slow_s=min(1.0, settings.engine_timeout_s / 2),
        )
        self.cluster = Cluster(
            self.runtime,
            settings,
            terms,
            node=name,
            fingerprint=lambda: "the same",
            limited=WITHOUT_KEYS,
            say=self._say,
            rng=rng,
        )
        hub.copies = self.cluster
        self.runtime.sweep.on_tick += [self.cluster.tick, self._tick]
        self._turn = 0
        self.cluster.start()
        self.runtime.sweep.start()

    @property
    def member(self) -> str:
        """As ids name it."""
        return self.hub.member

    @property
    def is_serving(self) -> bool:
        """Whether a balancer sends clients here."""
        return not (self.loop.is_over or self.is_stopping)

    def _bug(self, where: str, error: BaseException) -> None:
        if isinstance(error, Violation):
            self.loop.failed.append(error)
        else:
            violation = Violation(f"{self.name}: a callback raised, {where}: {error!r}")
            violation.__cause__ = error
            self.loop.failed.append(violation)

    def _say(self, level: str, name: str, **fields: object) -> None:
        self.said.append((level, name, fields))
        self.world.seen[f"line: {name.split(':')[0]}"] += 1

    # -- as the worker does it

    def _sealed(self, stream: Stream) -> None:
        if not stream.terms.is_copy:
            self.cluster.sealed(stream)

    def _removed(self, stream: Stream) -> None:
        self.cluster.removed(stream)
        generation = self.world.generations.get(stream.id)
        if generation is not None and not stream.terms.is_copy:
            generation.is_removed = True

    def _tick(self, now: float, lag_s: float) -> None:
        self._turn = (self._turn + 1) % CHARGE_TURNS
        self.hub.sweep(tuple(self.hub), now, self._turn)

    async def _connect(self, factory: Any, host: str, port: int) -> Any:
        made = self.loop.create_future()
        self.world.loop.io(0.001, self.world.servers[host].accept, self, factory, made)
        try:
            return await made
        except asyncio.CancelledError:
            if made.done() and not made.cancelled() and made.exception() is None:
                made.result()[0].abort()
            raise

    # -- ends

    def kill(self) -> None:
        """The process is killed: its connections are closed by its kernel."""
        self.loop.is_over = True
        self.over_at = self.world.loop.now
        self.loop.waiting.clear()
        for server in self.world.servers.values():
            for session in tuple(server.sessions):
                if session.node is self:
                    session.ended("abort")

    async def stop(self) -> None:
        """The end of a drain: readers were sent away and generations cut."""
        await self.cluster.flush()
        self.runtime.sweep.stop()
        self.cluster.stop()
