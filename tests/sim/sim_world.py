"""The world of a run: the worker as wired in production, upstreams, readers, faults, and the judge of all answers."""

from __future__ import annotations

import gc
import random
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any
from zlib import crc32

import sim_checks
from sim_loop import Violation, VirtualLoop, must
from sim_moves import Mover
from sim_reader import Answer, Errand, Reader
from sim_script import DIALECTS, PATHS, Script
from sim_transport import Transport, connection_of
from sim_upstream import EVENT_BYTES_MAX, LONG, Link, Server, weighted
from sim_watch import FROZEN_S_MAX, ROUNDING_S, Watch

from streamd.config import RouteOverride, Settings, UpstreamSettings
from streamd.core import fanout
from streamd.core import stream as core_stream
from streamd.core.admission import Admission, Budget, Demands, Limits, Prices, Resources
from streamd.core.stream import Stream, Subscriber
from streamd.daemon import logs, machine
from streamd.daemon import worker as worker_module
from streamd.daemon.worker import Worker
from streamd.net import sweep
from streamd.net.client import ClientConnection
from streamd.net.exchange import Exchange
from streamd.net.upstream import UpstreamConnection
from streamd.policy import Policy
from streamd.rows import WORD_S

POLICIES = tuple(policy.value for policy in Policy)
# A gap is announced under drop_oldest, and gaps are worth searching.
OFTEN_WITH_GAPS = sorted((*POLICIES, "drop_oldest"), key=POLICIES.index)
CHECK_ALL_EVERY = 1000  # steps
SWEEP_SLACK_S = 1.0  # a sweep every 0.25 s, its slices, and the sweep of the streams behind it
# Sizes of a turn's work: small, so that many events can happen between two slices.
SLICES: tuple[tuple[Any, str, tuple[int, ...]], ...] = (
    (core_stream, "DIRECT_READERS_MAX", (1, 8, 64)),
    (fanout, "SLICE_MAX", (1, 3, 256)),
    (fanout, "FRAMES_MAX", (4, 4, 32, 256)),
    (sweep, "SLICE_MAX", (7, 250)),
    (worker_module, "STREAMS_SLICE_MAX", (7, 250)),
)
DONE = b"data: [DONE]\n\n"
GONE_MAX = 1000  # streams remembered after their removal
KINDS = (
    ("generate", 56),
    ("follow", 24),
    ("plain", 6),
    ("small", 6),
    ("delete", 3),
    ("models", 2),
    ("publish", 4),
    ("broken", 3),
)

# No object of these classes may be left when everything has ended.
KINDS_LEFT = (ClientConnection, UpstreamConnection, Exchange, Stream, Subscriber)


class OrderedMembers(dict[Any, None]):
    """A set in the order of joining: sets go by addresses, and a seed has to play the same way twice."""

    def add(self, member: Any) -> None:
        self[member] = None

    def discard(self, member: Any) -> None:
        self.pop(member, None)


def settings_for(rng: random.Random) -> Settings:
    """Short times and small bounds, so that all limits are met in a minute of virtual time."""
    pick = rng.choice
    upstreams = tuple(
        UpstreamSettings(name=name, url=f"http://{name}:8000", inflight_max=pick((0, 0, 20))) for name in ("one", "two")
    )
    log_bytes = pick((16 * 1024, 64 * 1024, 1 << 20))
    return Settings(
        models_refresh_s=0.0,
        upstreams=upstreams,
        # A stream of no known dialect that has no event by commit_after passes as its bytes, which have no script.
        routes=(RouteOverride(path=PATHS["unknown"], commit_after_s=3600.0),),
        head_timeout_s=2.0,
        body_grace_s=2.0,
        keepalive_timeout_s=3.0,
        close_timeout_s=0.5,
        commit_after_s=pick((0.0, 0.2, 1.0, 3.0)),
        heartbeat_s=pick((0.0, 1.0, 2.0)),
        connect_timeout_s=1.0,
        ttft_timeout_s=4.0,
        queue_timeout_s=8.0,
        idle_timeout_s=4.0,
        stream_timeout_s=pick((0.0, 0.0, 6.0, 15.0)),
        event_bytes_max=EVENT_BYTES_MAX,
        pool_idle_timeout_s=pick((0.0, 1.0, 4.0)),
        pool_idle_max=pick((0, 4, 64)),
        ring_slots=pick((32, 64)),
        ring_bytes_max=pick((1024, 4096, 32 * 1024)),
        stall_timeout_s=pick((0.0, 2.0, 4.0)),
        catchup_bytes_max=pick((1024, 4096, 16 * 1024)),
        log_bytes_max=log_bytes,
        drain_timeout_s=pick((0.0, 2.0, 20.0)),
        log_events_max=pick((128, 1000, 100_000)),
        logs_bytes_max=pick((0, 0, 48 * 1024)),
        retention_s=pick((0.0, 2.0, 5.0)),
        resume_grace_s=pick((0.0, 1.0, 3.0)),
        detach_grace_s=pick((0.0, 0.0, 1.0)),
        detach_grace_max_s=3.0,
        detached_max=pick((0, 3, 250)),
        publisher_grace_s=2.0,
        publisher_idle_timeout_s=3.0,
        write_interval_s=pick((0.0, WORD_S, WORD_S, 0.03, 0.3)),
        write_interval_lower=pick((False, True)),
    )


class World:
    """A run. `play()` raises Violation, or an exception that the code under test must not raise."""

    def __init__(self, seed: int, *, population: int = 300, tokens_mean: int = 60, moves: bool = False) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.loop = VirtualLoop(rng)
        self.loop.after = self._after
        self.loop.connect = self._connect
        self.settings = settings_for(rng)
        self.population = rng.randrange(population // 4, population + 1)
        self.tokens_mean = tokens_mean
        self.pace_s = rng.choice((0.005, 0.03, 0.1))
        self.patience_s = rng.choice((0.05, 0.3, 1.0))
        self.event_bytes_max = EVENT_BYTES_MAX
        self.buffer_bytes_max = 3 * 64 * 1024
        self.crowded = rng.random() < 0.4  # many read the same stream, a long one
        self.jumped_at = self.jumped_s = 0.0
        self._stood_still: list[tuple[float, float]] = []  # (when it was over, for how long): one in 10 to 20 s
        self.worker = self._hire()
        self.servers = {each.name: Server(self, each.name) for each in self.settings.upstreams}
        # life
        self.touched: list[Transport] = []
        self.readers: dict[Reader, None] = {}
        self.scripts: dict[str, Script] = {}
        self.finals: dict[str, bytes] = {}
        self.ends_badly: list[Stream] = []  # their readers got the error event in this step
        self.winding_down = False
        self.stopping = False  # a drain closes readers
        self.closed = False  # connections are refused
        self._recent: deque[str] = deque(maxlen=50)
        self._hot = ""
        self._names = 0
        self._lines: dict[str, deque[bytes]] = {}  # published lines that weren't read yet, by their requests' ids
        self._asks: Counter[str] = Counter()
        self._errands: dict[str, Errand] = {}
        self._gone: dict[str, tuple[Stream, Script | None]] = {}
        self._next_check = CHECK_ALL_EVERY
        self._transports: dict[Transport, None] = {}
        self.results: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()  # situations (sim_watch.py)
        self.relieving = False  # the logs are over their budget: streams go before their time
        self._stream_of: dict[str, str] = {}  # rid of a request -> id of the stream that a server began for it
        self._asked_with: dict[str, str] = {}  # Idempotency-Key -> rid of its newest request
        self._deleted: set[str] = set()  # ids with a DELETE request
        self.removed_totals: Counter[str] = Counter()  # of streams that are gone
        self._left_at: dict[str, float] = {}  # stream id -> when its last reader left
        self.watch: Watch | None = None
        self.mover = Mover(self) if moves else None
        self.steps = 0  # set when the world is cleared

    def _hire(self) -> Worker:
        """The worker, with all its sources of randomness and delay replaced."""
        other = random.Random(self.seed + 1)
        budget = self._budget()
        admission = Admission(budget, Limits(loop_lag_max_s=0))
        worker = Worker(self.loop, self.settings, budget=budget, admission=admission, rng=other, busy_s=self._busy_s)
        runtime, hub = worker.runtime, worker.runtime.hub
        runtime.unix_time = lambda: 1.7e9 + self.loop.time()
        runtime.sweep._members = OrderedMembers()  # type: ignore[assignment]
        runtime.clients = OrderedMembers()  # type: ignore[assignment]
        runtime.on_bug = self._bug
        application = worker.application
        self._was_planned, application.plan = application.plan, self._planned
        self._was_ended, application.ended = application.ended, self._recording(self._request_ended)
        hub._random, hub._incarnation = other.randbytes, "AAAA"
        self._was_removed, hub.on_removed = hub.on_removed, self._recording(self._removed)
        self._was_sealed, hub.on_sealed = hub.on_sealed, self._recording(self._sealed)
        # At its start a worker freezes all objects of its process. Here they have to stay visible: check_gone() counts.
        freeze, gc.freeze = gc.freeze, lambda: None
        try:
            worker.start()
        finally:
            gc.freeze = freeze
        return worker

    def _recording(self, hook: Callable[..., None]) -> Callable[..., None]:
        """A hook in the code under test, which may catch the hook's exception: the violation is recorded anyway."""
        failed = self.loop.failed

        def recording(*args: Any) -> None:
            try:
                hook(*args)
            except Violation as violation:
                failed.append(violation)
                raise

        return recording

    def _budget(self) -> Budget:
        """A machine of a fixed size, independent of this machine, with room for all connections or for some."""
        few = self.rng.random() < 0.2
        demands = Demands(
            conns_max=self.population // 2 if few else 0,
            streams_max=self.population // 3 if few else 0,
            logs_bytes_max=self.settings.logs_bytes_max,
        )
        resources = Resources(memory_bytes=1 << 40, memory_source="setting", descriptors_per_worker=1 << 20)
        return Budget.compute(resources, demands, Prices())

    # -- play

    def play(self, steps: int) -> None:
        """Play this number of steps with everything going on, then until everything has ended."""
        level, logs._sink.level = logs._sink.level, logs.ERROR + 1
        threshold = gc.get_threshold()
        kept = [(module, name, getattr(module, name)) for module, name, _ in SLICES]
        for module, name, sizes in SLICES:
            setattr(module, name, self.rng.choice(sizes))
        # The memory of this process is no part of a seed.
        private_bytes, machine.private_bytes = machine.private_bytes, lambda: 0
        before = _alive(collect=True)
        gc.disable()  # as in the worker, where it hardly runs: objects in a cycle would stay
        self.watch = watch = Watch(self)
        try:
            self._play(steps)
            if not self.stopping:
                self.check_freed(before)
        finally:
            self.loop.abandon()
            watch.remove()
            gc.enable()
            machine.private_bytes = private_bytes
            logs._sink.level = level
            gc.set_threshold(*threshold)
            for module, name, size in kept:
                setattr(module, name, size)
        self.check_gone(before)

    def _play(self, steps: int) -> None:
        loop = self.loop
        for _ in range(self.population):
            loop.io(self.rng.random() * 2, self.spawn)
        loop.io(self.rng.uniform(1, 20), self._stumble)
        stop_at = self.rng.randrange(steps // 2, steps) if self.rng.random() < 0.3 else steps
        loop.run(lambda: loop.steps < stop_at)
        if stop_at < steps:
            self._stop()
        self.winding_down = True
        for reader in list(self.readers):
            if reader.temper == "vanishes" or not self.settings.stall_timeout_s:
                loop.io(self.rng.random(), reader.heal)
        until = loop.time() + 400
        loop.run(lambda: loop.time() < until and self._anything_left())
        until = loop.time() + 20
        loop.run(lambda: loop.time() < until)
        if self.stopping:
            sim_checks.check_stopped(self)
            return
        sim_checks.check_all(self)
        self.worker.upstreams.close()
        loop.run(lambda: loop.time() < until + 1)
        sim_checks.check_nothing_left(self)
        self.worker.runtime.sweep.stop()
        loop.run(lambda: loop.time() < until + 30)
        self._after()

    def _anything_left(self) -> bool:
        runtime = self.worker.runtime
        return bool(runtime.clients or len(runtime.hub) or self.readers or any(s.links for s in self.servers.values()))

    def check_freed(self, before: Counter[type]) -> None:
        """Ended objects were freed by their reference counts: there is no cycle for a collector to find."""
        self.touched.clear()
        self._transports.clear()
        self._gone.clear()
        after = _alive(collect=False)
        for kind in KINDS_LEFT:
            left = after[kind] - before[kind]
            must(left <= 0, f"only a collector frees a {kind.__name__}", left)

    def check_gone(self, before: Counter[type]) -> None:
        """No object of a connection, an exchange or a stream outlives it."""
        seed, results, seen, steps = self.seed, self.results, self.seen, self.loop.steps
        self.__dict__.clear()  # the worker and everything that belongs to it
        self.seed, self.results, self.seen, self.steps = seed, results, seen, steps
        after = _alive(collect=True)
        for kind in KINDS_LEFT:
            if after[kind] > before[kind]:
                raise Violation(f"{after[kind] - before[kind]} {kind.__name__} left behind")

    def _stumble(self) -> None:
        """Now and then the whole process stands still."""
        if self.rng.random() < 0.5:
            self.jumped_s = self.rng.choice((0.3, 2.0, 5.0))
            self.loop.jump(self.jumped_s)
            self.jumped_at = self.loop.now
            self._stood_still.append((self.loop.now, self.jumped_s))
        if not self.winding_down:
            self.loop.io(self.rng.uniform(1, 20), self._stumble)

    def stood_still_s(self, since: float) -> float:
        """For how long the process stood still after this time."""
        return sum(seconds for at, seconds in self._stood_still if at > since)

    @property
    def slack_s(self) -> float:
        """How late a deadline may be met: a sweep and its slices, and a jump of the clock in between."""
        frozen_s = FROZEN_S_MAX if self.mover is not None else 0.0
        return SWEEP_SLACK_S + frozen_s + (self.jumped_s if self.loop.now - self.jumped_at <= SWEEP_SLACK_S else 0.0)

    def _stop(self) -> None:
        """A drain, in a hurry now and then. Some readers have just stopped taking bytes."""
        if self.mover is not None:
            self.mover.stop()
        for reader in list(self.readers):
            if reader.transport is not None and reader.temper not in ("calm", "breaks") and self.rng.random() < 0.5:
                reader.transport.room = min(reader.transport.room, self.rng.randrange(2000))
        self.stopping = self.closed = True
        self.worker.drain()
        if self.rng.random() < 0.3:
            self.loop.io(self.rng.random() * 5, self.worker.drain)

    def _after(self) -> None:
        """Check the step's results, after each step."""
        if self.loop.failed:
            raise self.loop.failed[0]
        for stream in self.ends_badly:
            must(stream.reason is not None and not stream.ended_clean, "an error event, but no failed end", stream.id)
        self.ends_badly.clear()
        touched = self.touched
        if touched:
            for transport in dict.fromkeys(touched) if len(touched) > 1 else touched:
                sim_checks.check_touched(self, transport)
            touched.clear()
        if self.mover is not None:
            self.mover.after_step()
        if self.loop.steps >= self._next_check and (self.mover is None or self.mover.freezer is None):
            self._next_check = self.loop.steps + CHECK_ALL_EVERY
            sim_checks.check_all(self)

    def _bug(self, where: str, error: BaseException) -> None:
        self.loop.failed.append(error)

    # -- connections

    def client_connection(self) -> ClientConnection:
        return ClientConnection(self.worker.application, self.worker.entrance("public"))

    def keep(self, transport: Transport) -> None:
        """Remember a reader's connection until it is lost."""
        self._transports[transport] = None

    def inherit(self, transport: Transport, heir: Transport) -> None:
        """A connection of streamd's goes on as another object."""
        if transport in self._transports:
            del self._transports[transport]
            self.keep(heir)
        owner: Any = heir.owner
        if owner.transport is transport:
            owner.transport = heir

    def open_clients(self) -> Iterator[Transport]:
        for transport in [transport for transport in self._transports if transport.lost]:
            del self._transports[transport]
        return iter(tuple(self._transports))

    async def _connect(self, factory: Any, host: str, port: int) -> Any:
        return await self.servers[host].connect(factory)

    # -- readers

    def spawn(self) -> None:
        if not self.winding_down and not self.closed:
            Reader(self, self.errand()).begin()

    def reader_over(self, reader: Reader) -> None:
        if not self.winding_down:
            self.loop.io(self.rng.random() * 0.5, self.spawn)

    def errand(self) -> Errand:
        """A random purpose of a client."""
        rng = self.rng
        kind = weighted(rng, KINDS)
        if kind in ("follow", "delete") and not self._recent:
            kind = "generate"
        errand = getattr(self, f"_{kind}")()
        errand.http10 = errand.kind not in ("broken", "publish") and rng.random() < 0.12
        if rng.random() < 0.45 and errand.kind in ("generate", "follow"):
            word = rng.choice(OFTEN_WITH_GAPS)
            errand.wishes.append(b"X-Stream-Policy: " + word.encode())
        return errand

    def _rid(self) -> str:
        self._names += 1
        return f"r{self._names}"

    def _generate(self) -> Errand:
        rng = self.rng
        rid = self._rid()
        errand = Errand("generate", "POST", PATHS[rng.choice(DIALECTS)], rid)
        if errand.data_only and rng.random() < 0.5:
            errand.wishes.append(b"Accept: text/event-stream")
        errand.body = b'{"model":"m","stream":true,"n":"%b"}' % rid.encode()
        self._errands[rid] = errand
        if rng.random() < 0.25:
            errand.detach_grace_s = float(rng.randrange(5))
            errand.wishes.append(b"X-Stream-Detach-Grace: %d" % errand.detach_grace_s)
        if rng.random() < 0.25:
            errand.key = f"k{rid}"
            errand.wishes.append(b"Idempotency-Key: " + errand.key.encode())
            if rng.random() < 0.7:
                self.loop.io(rng.random() * rng.choice((0.1, 4)), self._twin, errand)
        if rng.random() < 0.15:
            errand.wishes.append(
                b"X-Stream-Write-Interval: " + rng.choice((b"0", b"10ms", b"200ms", b"1s", b"adaptive"))
            )
        return errand

    def _twin(self, errand: Errand) -> None:
        """The same request again, as a client that retries would send it."""
        if self.winding_down or self.closed:
            return
        twin = Errand("generate", errand.method, errand.path, self._rid(), errand.body)
        twin.wishes = [wish for wish in errand.wishes if wish.startswith(b"Idem")]
        twin.key = errand.key
        self._errands[twin.rid] = twin
        Reader(self, twin).begin()

    def _follow(self) -> Errand:
        rng = self.rng
        hot = 0.9 if self.crowded else 0.5
        stream_id = self._hot if self._hot and rng.random() < hot else rng.choice(self._recent)
        errand = Errand("follow", "GET", f"/v1/streams/{stream_id}", self._rid())
        errand.stream_id = stream_id
        if rng.random() < 0.3:
            errand.start = rng.randrange(1, 30)
            errand.path += f"?from={errand.start}"
        elif rng.random() < 0.05:
            errand.method = "HEAD"
        return errand

    def _delete(self) -> Errand:
        stream_id = self.rng.choice(self._recent)
        self._deleted.add(stream_id)
        errand = Errand("small", "DELETE", f"/v1/streams/{stream_id}", self._rid())
        errand.deletes = True
        return errand

    def _plain(self) -> Errand:
        errand = Errand("plain", "POST", self.rng.choice(("/v1/chat/completions", "/v1/embeddings")), self._rid())
        errand.body = b'{"model":"m","x":"%b"}' % (b"y" * self.rng.choice((1, 1, 5000)))
        self._errands[errand.rid] = errand
        return errand

    def _busy_s(self) -> float:
        """The worker's work: half of the runs are busy for three seconds out of six."""
        rounds, since_s = divmod(self.loop.time(), 6.0)
        return self.seed % 2 * (3.0 * rounds + min(3.0, since_s))

    def _models(self) -> Errand:
        return Errand("small", "GET", "/v1/models", self._rid())

    def _small(self) -> Errand:
        return Errand("small", "GET", self.rng.choice(("/healthz", "/readyz", "/nowhere")), self._rid())

    def _broken(self) -> Errand:
        return Errand("broken", "GET", "/healthz", self._rid())

    def _publish(self) -> Errand:
        """Open a stream; the events follow in a second request."""
        errand = Errand("publish", "POST", "/v1/streams", self._rid())
        errand.deletes = True  # no events in this request
        if self.rng.random() < 0.4:
            interval_s, policy = self.rng.choice((0.02, 0.2)), self.rng.choice(POLICIES)
            errand.body = b'{"write_interval":%g,"policy":"%b"}' % (interval_s, policy.encode())
        return errand

    def _events(self, opened: Errand) -> Errand:
        """The request that publishes to an opened stream."""
        stream_id = opened.stream_id
        errand = Errand("publish", "POST", f"/v1/streams/{stream_id}/events", self._rid())
        errand.stream_id = stream_id
        if stream_id in self.scripts:
            return errand
        self.scripts[stream_id] = Script(self.rng, "unknown", stream_id, 0)
        self.known(stream_id)
        return errand

    def published(self, errand: Errand, body: bytes) -> None:
        """A line is about to be sent whole."""
        self._lines.setdefault(errand.rid, deque()).append(b"data: %b\n\n" % body)

    def read_lines(self, rid: str, stream: Stream, count: int) -> None:
        """The request of this id brings its next lines to the stream."""
        lines, script = self._lines.get(rid), self.scripts.get(stream.id)
        if stream.reason is None and script is not None and lines is not None:
            script.events += [lines.popleft() for _ in range(count)]
            script.ended = count > 0 and script.events[-1] == DONE

    @staticmethod
    def plain_body(rid: str) -> bytes:
        """An upstream's answer to a request that asks for no stream: derived from its id alone."""
        return b'{"rid":"%b"}' % (rid.encode() * (crc32(rid.encode()) % 9000 + 1))

    def is_plain(self, event: bytes) -> bool:
        """Whether an event holds an upstream's answer to some request that asks for no stream."""
        found = re.match(rb'data: \{"rid":"(r[0-9]+)', event)
        return found is not None and event == b"data: %b\n\n" % self.plain_body(found[1].decode())

    def stream(self, stream_id: str) -> Stream | None:
        """A stream of the worker, also while it is frozen."""
        frozen = self.mover.frozen_streams() if self.mover is not None else {}
        return frozen.get(stream_id) or self.worker.runtime.hub.get(stream_id)

    def find(self, stream_id: str) -> tuple[Stream, Script | None]:
        """A stream; also a removed stream whose last bytes are still on their way."""
        stream = self.stream(stream_id)
        if stream is not None:
            return stream, self.scripts.get(stream_id)
        if stream_id not in self._gone:
            raise Violation(f"an answer with the unknown stream {stream_id}")
        return self._gone[stream_id]

    def script_of(self, stream_id: str) -> Script | None:
        """The script of a stream, also of a removed stream."""
        return self.scripts.get(stream_id) or self._gone.get(stream_id, (None, None))[1]

    def known(self, stream_id: str) -> None:
        """A stream's id was seen: other readers may read it too."""
        if not self._recent or self._recent[-1] != stream_id:
            self._recent.append(stream_id)
        if self.crowded:
            script = self.scripts.get(stream_id)
            hot = script is not None and (script.total >= LONG or len(script.events) >= LONG // 4)
        else:
            hot = self.rng.random() < 0.02
        if hot:
            self._hot = stream_id

    # -- upstream

    def asked(self, link: Link, rid: str, body: bytes, *, repeats: bool) -> None:
        """A request has reached a server, which works on it (or refuses it, and then another server may work on it)."""
        errand = self._errands.get(rid)
        if errand is not None and errand.last is not None:
            raise Violation(f"{rid} was to resume {errand.stream_id}:{errand.last}, and a generation was begun")
        if not repeats and errand is not None:
            self._asks[rid] += 1
            if self._asks[rid] > 1:
                raise Violation(f"{rid} was paid for twice")
            if errand.key:
                first = self._asked_with.setdefault(errand.key, rid)
                begun = self._stream_of.get(first, "")
                stream = self.stream(begun)
                if first != rid and stream is not None and not stream.has_failed:
                    raise Violation(f"{rid} was paid for again: {first} with the same key is the stream {begun}")
                self._asked_with[errand.key] = rid

    def stream_begins(self, link: Link, script: Script) -> None:
        """A server answers with a stream: its readers have to get this script."""
        transport = link.transport
        protocol = connection_of(transport) if transport is not None else None
        asker = getattr(protocol, "_asker", None)
        stream = getattr(asker, "stream", None) or getattr(protocol, "_stream", None)
        if stream is not None:
            self.stream_has(stream, script)

    def stream_has(self, stream: Stream, script: Script) -> None:
        """A stream's readers have to get this script."""
        if self.scripts.setdefault(stream.id, script) is not script:
            raise Violation(f"{stream.id} is fed twice")
        self._stream_of[script.name.decode()] = stream.id

    def _removed(self, stream: Stream) -> None:
        self._was_removed(stream)
        script = self.scripts.pop(stream.id, None)
        self._left_at.pop(stream.id, None)
        self._check_removal(stream, script)
        self._gone[stream.id] = (stream, script)
        if len(self._gone) > GONE_MAX:
            del self._gone[next(iter(self._gone))]
        self.finals.pop(stream.id, None)

    def _sealed(self, stream: Stream) -> None:
        self._was_sealed(stream)
        script = self.scripts.get(stream.id)
        if script is not None:
            script.confirm(stream)  # the last event may lack its blank line alone
        if self.watch is not None:
            self.watch.stream_sealed(stream, script)
        whole = script is not None and script.complete and (script.ended or script.said_terminal)
        if stream.ended_clean and not whole:
            raise Violation(f"{stream.id} ended cleanly, its answer didn't")
        if stream.ended_clean and script is not None and stream.events != len(script.events):
            raise Violation(f"{stream.id} has {stream.events} events of {len(script.events)}")

    def _check_removal(self, stream: Stream, script: Script | None) -> None:
        """A stream with a reader stays for its retention, unless the logs need its memory."""
        totals = self.removed_totals
        totals["events"] += stream.events
        totals["event_bytes"] += stream.frame_bytes
        totals["text_events"] += stream.text_events
        if self.relieving or script is None or not script.events or stream.id in self._deleted:
            return
        kept_s = self.loop.now - stream.sealed_at
        lacks_s = stream.terms.retention_s - kept_s
        must(lacks_s < ROUNDING_S, "a stream is gone before its time", stream.id, lacks_s)

    def reader_left(self, stream: Stream) -> None:
        self._left_at[stream.id] = self.loop.now

    def left_at(self, stream: Stream) -> float:
        """When the last reader left; 0 if there was none."""
        return self._left_at.get(stream.id, 0.0)

    def errand_of(self, stream: Stream) -> Errand | None:
        """The request that began this generation."""
        request = getattr(stream.source, "_request", None)
        return None if request is None else self._errands.get(request.id)

    # -- rights and ends of requests

    def _planned(self, answer: Any) -> Any:
        """The worker's plan; some requests get a right to read for a short while only, as if their token said so."""
        plan, request = self._was_planned(answer), answer.request
        right_s = Errand("", "", "", request.id).right_s
        publishes = request.path.startswith("/v1/streams") and request.method in ("POST", "PUT")
        if right_s and not publishes:
            request.expires_at = self.loop.now + right_s
        return plan

    def _request_ended(self, answer: Any) -> None:
        if self.watch is not None:
            self.watch.request_ended(answer)
        self._was_ended(answer)
        self._lines.pop(answer.request.id, None)

    # -- answers

    def unanswered(self, reader: Reader, errand: Errand, how: str) -> None:
        self.results[f"unanswered {how}"] += 1

    def judge(self, reader: Reader, answer: Answer, how: str) -> None:
        """Check that the answer is right, then let its reader go on."""
        errand = answer.errand
        self.results[f"{errand.kind} {answer.status or 'none'} {how}"] += 1
        if how == "done" or answer.status:
            self._judge_status(errand, answer)
        if answer.stream is not None:
            self._judge_stream(reader, answer, how)
        elif how == "done" and errand.kind == "plain" and answer.status == 200:
            if answer.body != self.plain_body(errand.rid):
                raise Violation(f"the answer to {errand.rid} is another: {len(answer.body)} bytes")
        elif how == "done" and errand.deletes and answer.status == 204:
            stream = self.worker.runtime.hub.get(errand.path.rpartition("/")[2])
            if stream is not None and stream.reason is None:
                raise Violation(f"{stream.id} was stopped and runs on")
        elif how == "done" and errand.kind == "publish" and answer.status == 200:
            script = self.scripts.get(errand.stream_id)
            stream = self.worker.runtime.hub.get(errand.stream_id)
            if script is not None and stream is not None:
                script.confirm(stream)
            if script is not None and answer.body != b'{"last_seq":%d}' % len(script.events):
                raise Violation(f"{len(script.events)} events were published, {answer.body!r}")
        if errand.kind != "generate":
            self._errands.pop(errand.rid, None)
        self._go_on(reader, answer, how)

    def _judge_status(self, errand: Errand, answer: Answer) -> None:
        allowed = {
            "generate": {200, 404, 408, 409, 429, 500, 502, 503, 504} | {204},
            "follow": {200, 204, 404, 408, 503},
            "plain": {200, 408, 409, 429, 500, 502, 503, 504},
            "small": {200, 204, 404, 408, 409, 502, 503},
            "publish": {200, 201, 404, 408, 409, 503},
            "broken": {400, 408, 431, 501, 503},
        }[errand.kind]
        if errand.kind in ("generate", "plain") and errand.right_s:
            allowed = allowed | {401}  # the right ended while the body came
        if errand.kind == "follow" and "from=" in errand.path:
            allowed = allowed | {400}
        if answer.status not in allowed:
            raise Violation(f"{errand.method} {errand.path} was answered {answer.status} {answer.body!r}")
        if answer.status == 500 and b"x-upstream" not in answer.headers:
            raise Violation(f"an error of our own: {answer.body!r}")
        if errand.kind != "follow" or not errand.stream_id:
            return
        stream = self.worker.runtime.hub.get(errand.stream_id)
        if answer.status == 404 and stream is not None:
            raise Violation(f"{stream.id} is there, and was answered 404")
        if answer.status == 204 and stream is not None and errand.last is not None:
            over = stream.reason is not None and errand.start >= stream.log.seq_next
            must(over, "204 before the end", stream.id, errand.start, stream.log.seq_next)

    def _judge_stream(self, reader: Reader, answer: Answer, how: str) -> None:
        """A calm reader over HTTP/1.1 gets the whole stream, whatever the other readers do."""
        if reader.temper != "calm" or self.stopping or reader.healed or answer.sent_away:
            return
        stream = answer.stream
        whole = answer.position == stream.log.seq_next and stream.reason is not None
        if how == "reset" or (answer.error_seen and how != "done"):
            return
        if not whole:
            raise Violation(
                f"{stream.id} ({stream.reason}) stopped at {answer.position} of {stream.log.seq_next}, {how}"
            )
        if answer.gaps and stream.log.seq_first <= answer.gaps[0][0]:
            raise Violation(f"a calm reader lost {answer.gaps}")

    def _go_on(self, reader: Reader, answer: Answer, how: str) -> None:
        """The next request: a resume, a new request, or none."""
        rng, errand = self.rng, answer.errand
        if self.winding_down and rng.random() < 0.7:
            if how == "done" and not reader.waits:
                self.loop.io(rng.random(), reader.break_off)
            return
        if errand.kind == "publish" and errand.deletes and answer.status == 201 and reader.keeps_alive(answer):
            self.loop.io(rng.random() * 0.1, reader.ask_more, self._events(errand))
            return
        cut = answer.stream is not None and how != "done"
        if cut and errand.tries < 8 and rng.random() < 0.85:
            again = self._resume(reader, answer)
            self.loop.io(rng.expovariate(1 / 0.3), Reader(self, again).begin)
            return
        if how != "done" or not reader.keeps_alive(answer):
            return
        if rng.random() < 0.5 and not self.winding_down:
            self.loop.io(rng.expovariate(1 / 0.3), reader.ask_more, self.errand())
        elif rng.random() < 0.8:
            self.loop.io(rng.random(), reader.break_off)

    def _resume(self, reader: Reader, answer: Answer) -> Errand:
        """Come back for the rest, in any of the possible ways."""
        rng, errand = self.rng, answer.errand
        seen = [seq for seq in answer.ids if seq >= reader.sure - 1] or ([answer.ids[-1]] if answer.ids else [])
        last = rng.choice(seen) if seen and reader.temper != "calm" else (seen[-1] if seen else errand.start - 1)
        if rng.random() < 0.3 and errand.method == "POST":
            again = Errand("generate", "POST", errand.path, self._rid(), errand.body)
            self._errands[again.rid] = again
        else:
            again = Errand("follow", "GET", f"/v1/streams/{errand.stream_id}", self._rid())
        again.wishes = [wish for wish in errand.wishes if wish.startswith(b"X-Stream-Policy")]
        again.stream_id, again.start, again.tries = errand.stream_id, last + 1, errand.tries + 1
        if again.method == "GET" and rng.random() < 0.2:
            again.path += f"?last_event_id={errand.stream_id}:{last}"
        else:
            again.last = last
        return again


def _alive(*, collect: bool) -> Counter[type]:
    while collect and gc.collect():  # objects with a finalizer, such as coroutines, take another turn
        pass
    return Counter(type(each) for each in gc.get_objects() if type(each) in KINDS_LEFT)


class MovingWorld(World):
    """A world whose units are frozen, and move."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, moves=True)
