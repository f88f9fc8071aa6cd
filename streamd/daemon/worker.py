"""Worker: everything that serves in one process, wired together, with its clock work.

It knows no signals, no systemd and no parent: daemon/worker_process.py runs it.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import math
import random
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from streamd import metrics
from streamd.api.admin import Admin
from streamd.api.ending import Ended, EndedCounts, Ending
from streamd.api.kept import MAKERS, KeptObjects
from streamd.api.key_table import KeyTable
from streamd.api.live import Live
from streamd.api.llama import LOOKUP, Llama
from streamd.api.log_level import LogLevelRoute
from streamd.api.models import Models
from streamd.api.ops import Ops
from streamd.api.page_files import PageFiles
from streamd.api.publish import Publish
from streamd.api.reader_table import ReaderTable
from streamd.api.relay import Relay
from streamd.api.relayed_ask import ask_of
from streamd.api.responses import ResponsesRoute
from streamd.api.rights import Rights
from streamd.api.router import Router
from streamd.api.stream_table import StreamTable
from streamd.api.streams import LIST, Streams
from streamd.api.tables import Table
from streamd.config import Settings
from streamd.core.admission import Admission, Budget
from streamd.core.auth import ANONYMOUS
from streamd.core.hub import CHARGE_TURNS, KEPT_STREAM_BYTES, Hub
from streamd.core.stream import Stream
from streamd.daemon import listen, logs, machine
from streamd.daemon.budget import admission_of, budget_of, limits_of, prices_of
from streamd.daemon.control import ADMIN, QUICK_DRAIN_S, DaemonState, Reloaded, Report, Standing
from streamd.daemon.credential_files import CredentialFiles, LoadedFiles
from streamd.daemon.drain import Drain, DrainStep
from streamd.daemon.engine_start import cluster_of, join_cluster, link_terms_of
from streamd.daemon.levels import Levels
from streamd.daemon.request_log import LateLines, RequestLog, shown_id, without_secrets, write_step
from streamd.daemon.shared import Shared, shared_alone
from streamd.daemon.upstream_reports import UpstreamReports
from streamd.log_levels import LevelChange, LogLevels
from streamd.net import totals
from streamd.net.application import Application
from streamd.net.client import ClientConnection
from streamd.net.generation import observe_end
from streamd.net.handover import hand_over
from streamd.net.http_error import HttpError
from streamd.net.in_turns import SlowWork, Steps, at_once
from streamd.net.inquiry import Answerer, Inquiries
from streamd.net.layers import Adopted, protocol_factory
from streamd.net.origin import Entrance
from streamd.net.peers import Malformed, Note, Passed, Peers
from streamd.net.runtime import Runtime
from streamd.net.totals import Totals
from streamd.net.tracing import Tracing
from streamd.net.upstream import Upstream
from streamd.net.upstreams import Upstreams
from streamd.server_state import ServerView

# Slice size of a pass over all streams: a slice takes 0.15 ms, with a quarter of its streams charged.
STREAMS_SLICE_MAX = 250

# Interval at which a worker publishes its numbers, and so their highest age when they are read from another worker.
# Adding up 10,000 streams and clients takes 4 ms.
PUBLISH_EVERY_S = 1.0

if TYPE_CHECKING:
    from streamd.engine.link import LinkTerms

# The numbers of an upstream in /status, beside its state.
UPSTREAM_NUMBERS = ("in_flight", "idle", "left_out")

# Time limit for emptying the accept queue of a listener before it closes: a flood must not hold up the drain.
ACCEPT_EMPTY_S_MAX = 1.0


class Prepared(NamedTuple):
    """Everything that a reload needs, read and computed but not in use yet."""

    settings: Settings
    budget: Budget
    files: LoadedFiles
    upstreams: list[Upstream]
    engine: LinkTerms | None


class Worker:
    """The share of the daemon that a process has.

    Raises BudgetError if the machine is too small for the settings, and ConfigError for files that can't be used.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        settings: Settings,
        *,
        slot: int = 0,
        budget: Budget | None = None,
        admission: Admission | None = None,
        rng: random.Random | None = None,
        on_drain: Callable[[], None] | None = None,
        on_take_back: Callable[[], None] | None = None,
        on_level: Callable[[LevelChange], None] | None = None,
        busy_s: Callable[[], float] = lambda: 0.0,
        on_upstream: Callable[[str, ServerView], bool] | None = None,
    ) -> None:
        """`busy_s`: the seconds that this process had work, from any start on; the write interval follows them."""
        self.loop = loop
        self.settings = settings
        self.rng = rng or random.Random()
        self.budget = budget or budget_of(settings)
        self._has_peers = admission is not None  # join() follows
        admission = admission or admission_of(settings, self.budget)
        hub = Hub(
            log_bytes_max=admission.logs_bytes_max,
            stream_log_bytes_max=settings.log_bytes_max,
            stream_log_events_max=settings.log_events_max,
            detached_max=self._detached_max(settings),
            slot=slot,
            on_sealed=self._stream_sealed,
            on_removed=self._stream_removed,
            on_response_id=self._response_named,
            new_fanout=lambda stream: self.runtime.new_fanout(stream),
            soon=loop.call_soon,
        )
        self.runtime = Runtime(loop, settings, hub, admission=admission, rng=self.rng, on_bug=logs.bug)
        self.upstreams = Upstreams(self.runtime, settings)
        self.upstream_reports = UpstreamReports(self.runtime, self.upstreams, on_upstream)
        self.rights = Rights(self.runtime)
        self.credential_files = CredentialFiles(self.runtime, self.rights, self.upstreams)
        self.credential_files.load(settings)
        self.shared: Shared | None = None  # with several workers: the mapping of their rows
        self._publish_at = 0.0
        self._resident_bytes = 0
        self.reloaded = Reloaded(succeeded=True, unix_s=time.time())  # the last reload, as the parent tells it
        self.parent_bytes = 0  # of the parent process, which doesn't grow
        self._busy_s = busy_s
        self._busy_at = (busy_s(), loop.time())
        self._saturation: dict[str, float] = {}  # the daemon's, as of the last totals()
        self.state = DaemonState.STARTING
        self.started_at = loop.time()
        self._lines = LateLines(loop)
        self._request_log = RequestLog(self.runtime, self._lines, self.upstreams.served)
        self.draining: Drain | None = None
        self.drained: asyncio.Future[Report] = loop.create_future()
        self._charged_logs = self._charge_turn = self._standing_events = 0
        self._entrances: dict[tuple[str, int, bool], Entrance] = {}
        # by whether they are of operators
        self._servers: dict[bool, list[asyncio.AbstractServer]] = {False: [], True: []}
        self._sockets: dict[bool, list[socket.socket]] = {False: [], True: []}
        self.removes_sockets = True  # the files of Unix listeners: a single worker of the daemon does
        self._kept_open: set[int] = set()  # descriptors of sockets that outlive this process: systemd's
        self._drain_task: asyncio.Task[None] | None = None
        self._on_drain = on_drain or self.drain  # an operator asks for a drain of the whole daemon
        self._on_take_back = on_take_back or self.take_back
        self._waiting_drainers: list[Callable[[], None]] = []  # for the order of the drain that they asked for
        self._waiting_operators: list[Callable[[HttpError | None], None]] = []  # for whether a drain is taken back
        self._begin_log(on_level)
        self._finish_telemetry: Callable[[], Awaitable[None]] | None = None
        self._adopting: set[asyncio.Task[None]] = set()  # bounded by the connections that peers receive in a turn
        self._wire()

    def _detached_max(self, settings: Settings) -> int:
        """This worker's share of detached_max."""
        return math.ceil(settings.detached_max / self.budget.resources.workers)

    def _wire(self) -> None:
        runtime, upstreams, rights = self.runtime, self.upstreams, self.rights
        self.kept = KeptObjects(runtime, upstreams)
        self.streams = streams = Streams(runtime, rights)
        slow_work = self.slow_work = SlowWork(self.loop, runtime.bug, runtime.turns.postpones)
        readers = ReaderTable(runtime, rights, slow_work)
        tables: dict[str, Table] = {
            Ended.READER.value: readers,
            Ended.STREAM.value: StreamTable(runtime, rights, slow_work),
            Ended.KEY.value: KeyTable(runtime, rights, slow_work),
        }
        ending = Ending(runtime, rights, streams, readers, slow_work, self._note_ending)
        log_level = LogLevelRoute(runtime, rights, self._on_level, lambda: self.log_levels)
        self.router = Router(
            runtime,
            rights,
            Relay(runtime, upstreams, streams, rights, self.kept),
            streams,
            Publish(runtime, streams, rights),
            Models(runtime, upstreams, rights, lambda request: ask_of(request, runtime.cors)),
            Ops(runtime, metrics=self._rendered(), status=self.status, ready=self._readiness, pages=PageFiles(runtime)),
            Admin(
                tables=tables,
                ending=ending,
                drain=self._ask_drain,
                take_back=self._ask_take_back,
                log_level=log_level.methods,
                live=Live(runtime, slow_work, tables, self.status),
            ),
            llama := Llama(runtime, streams, rights),
            responses := ResponsesRoute(runtime, streams, rights),
        )
        self.responses = responses
        self._answerers: dict[str, Answerer] = {
            LIST: streams.answer_list,
            **{table.kind: table.answer_question for table in tables.values()},
            ending.kind: ending.answer_question,
            LOOKUP: llama.answer_lookup,
            MAKERS: self.kept.answer_makers,
        }
        self.application = Application(
            plan=self.router.plan,
            ended=self._request_log.request_ended,
            hand_over=functools.partial(hand_over, runtime),
        )
        self.cluster = cluster_of(runtime, self.settings, rights, self.rng)
        if self.cluster is not None:
            join_cluster(runtime, streams, self.cluster)
            if not self._has_peers:
                self.cluster.key_limits.board = alone = shared_alone()
                rights.share(alone)
        runtime.sweep.on_tick += [
            self._tick,
            upstreams.tick,
            self.upstream_reports.tick,
            self.credential_files.watch,
        ]

    # -- the log

    def _begin_log(self, on_level: Callable[[LevelChange], None] | None) -> None:
        """Log as the settings say; `on_level` is called when an operator wants another level."""
        self._own_levels = Levels(self.settings.log_level)  # without a parent
        self._on_level = on_level or self._change_level
        self.log_levels = self._own_levels.now
        self.runtime.story.write = write_step
        self.runtime.story.want((), everything=self.log_levels.level == "debug")

    def set_levels(self, levels: LogLevels) -> None:
        """Log as this says from now on."""
        self.log_levels = levels
        logs.set_level(levels.level)
        self.runtime.story.want(levels.watches, everything=levels.level == "debug")

    def _change_level(self, change: LevelChange) -> None:
        """Without a parent: an operator wants another level."""
        self._own_levels.now = self.log_levels
        self._own_levels.change(change, self.runtime.time())
        self.set_levels(self._own_levels.now)

    # -- reports

    def _rendered(self) -> Callable[[], tuple[bytes, bytes]]:
        collector = metrics.StreamdCollector(self.totals, lambda: self._saturation)
        self.metric_families = collector.collect  # the daemon's metrics at this moment
        return metrics.Metrics(collector).render

    def take_telemetry(
        self, tracing: Tracing, tick: Callable[[float, float], None], finish: Callable[[], Awaitable[None]]
    ) -> None:
        """Trace generations from now on; `tick` comes with every sweep, `finish` at the end of a drain."""
        self.runtime.tracing = tracing
        self.runtime.sweep.on_tick.append(tick)
        self._finish_telemetry = finish

    def totals(self) -> Totals:
        """The daemon's totals: with several workers, the sum of their rows."""
        own = self._own_totals()
        self._saturation = own.saturation
        summed = own
        if self.shared is not None:
            self.shared.publish(own)
            summed = self.shared.add_up()
            summed.models = own.models
            self._saturation = {**own.saturation, **summed.saturation}
        summed.upstreams = self._judged(summed.upstreams)
        return summed

    def _own_totals(self) -> Totals:
        """This worker's totals at this moment."""
        counters, files = self.runtime.counters, self.credential_files
        unix_offset_s = self.runtime.unix_time() - self.loop.time()
        counters.log_lines_lost = logs.lines_lost()
        counters.cpu_us = machine.cpu_us()
        if self.cluster is not None:
            self.cluster.count()
        started_at = self.started_at if self.shared is None else self.shared.started_at
        drain = totals.NO_DRAIN
        if self.draining is not None:
            progress = self.draining.progress()
            drain = {
                "draining": 1,
                "drain_deadline_s": round(self.draining.deadline + unix_offset_s),
                "drain_left": progress.left,
                "drain_finished": progress.finished,
                "drain_sent_away": progress.sent_away,
                "drain_cut": progress.cut,
            }
        facts = {
            "descriptors_max": machine.descriptors_max(),
            "started_ms": round((started_at + unix_offset_s) * 1000),
            **drain,
            **(totals.NO_ENGINE if self.cluster is None else self.cluster.gauges()),
            "reload_succeeded": int(self.reloaded.succeeded),
            "reloaded_ms": round(self.reloaded.unix_s * 1000),
            "certificate_s": files.certificate_until,
        }
        facts["virtual_bytes"], facts["rss_bytes"] = machine.sizes()
        return totals.of_worker(self.runtime, self.upstreams, self._resident_bytes, facts)

    def _drain_status(self, gauges: Mapping[str, int]) -> dict[str, Any] | None:
        """The drain as /status shows it: its times are this worker's, its numbers those of all workers."""
        drain = self.draining
        if drain is None:
            return None
        progress, now_unix = drain.progress(), self.runtime.unix_time()
        return {
            "by": drain.by,
            "since": _utc(now_unix - progress.since_s),
            "since_s": round(progress.since_s, 1),
            "deadline": _utc(now_unix + progress.deadline_s),
            "deadline_s": round(progress.deadline_s, 1),
            "may_be_taken_back": drain.may_be_taken_back,
            "left": gauges["drain_left"],
            "finished": gauges["drain_finished"],
            "sent_away": gauges["drain_sent_away"],
            "cut": gauges["drain_cut"],
        }

    def _judged(self, upstreams: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
        """The numbers of the servers that the settings name now, with the newest verdicts: rows are a second old."""
        ups = {each.settings.name: int(each.is_up) for each in self.upstreams}
        return {name: upstreams[name] | {"up": up} for name, up in ups.items() if name in upstreams}

    def _readiness(self) -> str:
        return "ready" if self.state is DaemonState.SERVING else self.state.value

    def status(self) -> dict[str, Any]:
        runtime, shared, summed = self.runtime, self.shared, self.totals()
        admission = runtime.admission.status()
        started_at = self.started_at
        if shared is not None:
            gauges = summed.gauges
            admission["refused"] = summed.counters.refused_by_gate
            admission["descriptors"], admission["reserved"] = gauges["descriptors"], gauges["reserved"]
            admission["loop_lag_s"] = gauges["lag_us"] / 1e6
            started_at = shared.started_at
        admission["saturation"] = self._saturation
        uptime_s = runtime.time() - started_at
        status = metrics.status(summed, state=self.state.value, uptime_s=uptime_s, admission=admission)
        status["drain"] = self._drain_status(summed.gauges)
        status["upstreams"] = {
            name: {each: numbers[each] for each in UPSTREAM_NUMBERS} | self.upstream_reports.shown(name)
            for name, numbers in status["upstreams"].items()
        }
        if shared is not None:
            status["workers"] = shared.each()
        if self.cluster is not None:
            status["cluster"] = self.cluster.status()
        return status

    def standing(self, elapsed_s: float) -> Standing:
        """This worker's part of the status line; `elapsed_s` is the time since the last call."""
        hub = self.runtime.hub
        events, self._standing_events = hub.text_events_total - self._standing_events, hub.text_events_total
        return Standing(
            connections=len(self.runtime.clients),
            streams=sum(stream.reason is None for stream in hub),
            tokens_per_s=events / max(0.001, elapsed_s),
            saturation=self.runtime.admission.saturation_highest(),
        )

    def _response_named(self, stream: Stream) -> None:
        self.responses.learned(stream)
        self.kept.learned(stream)

    def _stream_removed(self, stream: Stream) -> None:
        self.responses.forgotten(stream)
        if self.cluster is not None:
            self.cluster.removed(stream)

    def _stream_sealed(self, stream: Stream) -> None:
        assert stream.reason is not None
        if stream.terms.is_copy:
            return  # its owner counts it, and tells of it
        if self.cluster is not None:
            self.cluster.sealed(stream)
        self.runtime.counters.streams_ended[stream.reason] += 1
        if self.runtime.tracing is not None:
            self.runtime.tracing.sealed(stream)
        if stream.upstream and not stream.terms.published:
            observe_end(self.runtime.counters, self.upstreams.served(stream.upstream, stream.terms.model), stream)
        usage, strays = stream.progress.usage, stream.progress.strays
        self._lines.info(
            "stream",
            stream=shown_id(stream),
            reason=stream.reason,
            duration_s=round(stream.sealed_at - stream.opened_at, 4),
            events=stream.events,
            text_events=stream.text_events,
            text_bytes=stream.text_bytes,
            input_tokens=usage[0] if usage else None,
            output_tokens=usage[1] if usage else None,
            stray_lines=strays.lines if strays else None,
            stray_bytes=strays.bytes if strays else None,
            stray_fields=",".join(strays.names) if strays else None,
            upstream=stream.upstream or None,
            model=without_secrets(stream.terms.model) or None,
            principal=stream.terms.owner if stream.terms.owner not in ("", ANONYMOUS.id) else None,
            key_name=self.rights.name_of(stream.terms.owner),
        )

    def _note_ending(self, path: str, counts: EndedCounts) -> None:
        self._lines.info("ended by an operator", path=without_secrets(path), **counts._asdict())

    # -- clock work

    def _tick(self, now: float, lag_s: float) -> None:
        runtime = self.runtime
        logs.flush()
        if (levels := self.log_levels.at(now)) is not self.log_levels:
            self.set_levels(levels)
        runtime.counters.loop_lag_s.observe(lag_s)
        admission, log_bytes = runtime.admission, runtime.hub.log_bytes
        admission.note_lag(lag_s)
        self._note_load(now, lag_s)
        admission.note_idle_upstreams(sum(upstream.idle for upstream in self.upstreams))
        admission.charge_logs(log_bytes - self._charged_logs)
        self._charged_logs = log_bytes
        runtime.hub.log_bytes_max = admission.logs_bytes_max
        self._resident_bytes = machine.private_bytes()
        workers_bytes = self._resident_bytes if self.shared is None else self.shared.resident_bytes()
        admission.note_resident(workers_bytes + self.parent_bytes)
        self._show(now)
        runtime.hub.free_kept()
        self._charge_turn = (self._charge_turn + 1) % CHARGE_TURNS
        self.loop.call_soon(self._sweep_streams, tuple(runtime.hub), 0)

    def _note_load(self, now: float, lag_s: float) -> None:
        """Let the write interval follow the share of time since the tick before in which this process had work."""
        busy_s, (busy_before_s, before) = self._busy_s(), self._busy_at
        self._busy_at = (busy_s, now)
        if now > before:
            self.runtime.pacing.note_load(min(1.0, (busy_s - busy_before_s) / (now - before)), lag_s)
            self.runtime.admission.note_held(self.runtime.pacing.adaptive.seconds)

    def _show(self, now: float) -> None:
        """Bring the keys' limits up to date, and let the other workers, if any, see this worker's beat and numbers."""
        shared = self.shared
        if shared is not None:
            shared.beat(now)
        if now >= self._publish_at:
            self._publish_at = now + PUBLISH_EVERY_S
            self.rights.publish(now)
            if shared is not None:
                shared.publish(self._own_totals())

    def _sweep_streams(self, streams: tuple[Stream, ...], start: int) -> None:
        piece = streams[start : start + STREAMS_SLICE_MAX]
        with self.runtime.guard:
            self.runtime.hub.sweep(piece, self.loop.time(), self._charge_turn)
        if start + STREAMS_SLICE_MAX < len(streams):
            self.loop.call_soon(self._sweep_streams, streams, start + STREAMS_SLICE_MAX)

    # -- life

    async def listen(self, sockets: Iterable[socket.socket], kind: str = "", *, keep_open: bool = False) -> None:
        """Accept on each socket, through several dups of it.

        `kind` is "admin", "metrics" or "" (public or loopback, as the address says). `keep_open`: systemd holds the
        socket too, so that connections in its accept queue aren't lost when this process stops.
        """
        for sock in sockets:
            listen.set_options(sock, self.settings)
            self._sockets[bool(kind)].append(sock)
            if keep_open:
                self._kept_open.add(sock.fileno())
            name = kind or ("loopback" if listen.is_loopback(sock) else "public")
            make = protocol_factory(self.application, self.entrance(name, self._price(sock, plain=bool(kind))), sock)
            for _ in range(1 if kind else listen.DUPS):
                if sock.family == socket.AF_UNIX:
                    server = await self.loop.create_unix_server(make, sock=sock.dup(), backlog=listen.BACKLOG)
                else:
                    server = await self.loop.create_server(make, sock=sock.dup(), backlog=listen.BACKLOG)
                self._servers[bool(kind)].append(server)

    def entrance(self, listener: str, price_bytes: int = 0, *, is_tunnelled: bool = False) -> Entrance:
        """Where connections of a kind come in: the same object for all of them."""
        key = (listener, price_bytes, is_tunnelled)
        if key not in self._entrances:
            self._entrances[key] = Entrance(self.runtime, *key)
        return self._entrances[key]

    def _price(self, sock: socket.socket, *, plain: bool) -> int:
        prices = prices_of(self.settings)
        if sock.family == socket.AF_UNIX:
            return prices.unix_bytes
        return prices.tls_tcp_bytes if self.settings.tls_cert and not plain else prices.tcp_bytes

    def join(self, peers: Peers, shared: Shared) -> None:
        """Join the other workers: own a part of the streams, take connections from them, count where all can see it."""
        self.shared = shared
        self.runtime.peers = peers
        self.runtime.inquiries = Inquiries(self.loop, peers, self._answerers, self.runtime.guard, self.slow_work)
        self.upstreams.share(shared)
        self._request_log.faults.board = shared
        self.rights.share(shared)
        if self.cluster is not None:
            self.cluster.key_limits.board = shared
        peers.start()

    def take_note(self, note: Note) -> None:
        """Another worker asks, answers, or tells. Raises Malformed for a kind that no worker sends."""
        inquiries = self.runtime.inquiries
        assert inquiries is not None
        if not (inquiries.take(note) or self.responses.take(note) or self.kept.take(note)):
            raise Malformed(f"a note of an unknown kind: {note.kind!r}")

    def take_passed(self, passed: Passed) -> None:
        """Another worker hands a connection over."""
        entrance = self.entrance(passed.listener, passed.price_bytes, is_tunnelled=passed.tunnelled)
        if passed.fresh:
            make = protocol_factory(self.application, entrance, passed.sock, stays=True)
        else:
            connection = ClientConnection(self.application, entrance, adopted=passed.data, remote=passed.remote)
            make = lambda: connection  # noqa: E731
        shared = self.shared
        assert shared is not None
        adopted = Adopted(self.runtime, make, functools.partial(shared.taken, passed.sender))
        task = self.loop.create_task(self._adopt(adopted, passed.sock))
        self._adopting.add(task)
        task.add_done_callback(self._adopting.discard)

    async def _adopt(self, adopted: Adopted, sock: socket.socket) -> None:
        try:
            await self.loop.connect_accepted_socket(lambda: adopted, sock)
        except OSError:
            sock.close()  # the connection was lost on the way: there is no peer to tell
        except Exception as error:
            sock.close()
            self.runtime.bug("worker.adopt", error)
        finally:
            adopted.arrived()

    def start(self) -> None:
        """Serve: deadlines run, readiness is 200."""
        # Objects that exist now live as long as the process: the collector need not look at them again. Later objects
        # are freed by their reference counts. A collection over 10,000 streams takes 100 ms in which no token moves, so
        # the remaining cycles, which come with bugs and exceptions, are left to accumulate before they are collected.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        self._resident_bytes = machine.private_bytes()
        self._show(self.loop.time())
        self.runtime.sweep.start()
        self.upstreams.start()
        if self.cluster is not None:
            self.cluster.start()
        self.state = DaemonState.SERVING

    def reload(self, settings: Settings) -> None:
        """Use new settings for everything that begins from now on. No connection is dropped.

        Raises ConfigError for files that can't be used, BudgetError for limits that are too small; in both cases the
        old settings stay in use.
        """
        self.apply(at_once(self.prepare(settings)))

    def prepare(self, settings: Settings) -> Steps[Prepared]:
        """Read and build everything that reload() needs, in slices, without changing anything. Raises as reload() does,
        OSError for certificates that can't be used, and ValueError.
        """
        self.runtime.check(settings)
        budget, upstreams = budget_of(settings), self.upstreams.prepare(settings)
        yield
        files = yield from self.credential_files.read(settings)
        return Prepared(settings, budget, files, upstreams, link_terms_of(settings, self.runtime.hub.member))

    def apply(self, prepared: Prepared) -> None:
        """Use the prepared settings from now on."""
        settings, budget, files, upstreams, engine = prepared
        self.budget = budget
        self.runtime.admission.reload(budget, limits_of(settings))
        self.settings = settings
        self.runtime.reload(settings)
        self.upstreams.take(upstreams)
        self.upstream_reports.reload(settings)
        self.credential_files.take(files)  # some are for the upstreams of now
        if self.cluster is not None and engine is not None:
            self.cluster.reload(settings, engine)
        hub = self.runtime.hub
        hub.log_bytes_max = self.runtime.admission.logs_bytes_max
        hub.stream_log_bytes_max = settings.log_bytes_max
        hub.stream_log_events_max = settings.log_events_max
        hub.detached_max = self._detached_max(settings)
        hub.kept_max = hub.log_bytes_max // KEPT_STREAM_BYTES
        self.set_levels(LogLevels.of(settings.log_level, self.log_levels.watches))
        logs.set_format(settings.log_format)

    def drain(self, *, quick: bool = False, waits: bool = False, by: str = ADMIN) -> None:
        """Begin to stop; a second call goes to the end at once. `drained` gets the report.

        `quick`: with short times. `waits`: end_delay() ends the first step. `by`: a signal's name, or ADMIN.
        """
        waiting, self._waiting_drainers = self._waiting_drainers, []
        for told in waiting:
            with self.runtime.guard:
                told()
        if self.draining is not None:
            self._answer_operators(_too_late())
            self.draining.hurry()
            return
        settings = self.settings
        self.state = DaemonState.DRAINING
        self.draining = Drain(
            self.runtime,
            delay_s=0.0 if quick else settings.drain_delay_s,
            timeout_s=min(settings.drain_timeout_s, QUICK_DRAIN_S) if quick else settings.drain_timeout_s,
            close_listeners=functools.partial(self._close_listeners, of_operators=False),
            close_operators=functools.partial(self._close_listeners, of_operators=True),
            waits=waits,
            by=by,
        )
        if not self.draining.may_be_taken_back:
            self._answer_operators(_too_late())
        self._drain_task = self.loop.create_task(self._drain(self.draining))

    def end_delay(self) -> None:
        """The first step of the drain is over."""
        self._answer_operators(_too_late())
        if self.draining is not None:
            self.draining.end_delay()

    def take_back(self) -> None:
        """Serve as before, if the drain is in its first step."""
        drain = self.draining
        if drain is None:
            self._answer_operators(HttpError(409, "streamd isn't draining.", code="not_draining"))
        elif drain.may_be_taken_back:
            drain.take_back()
            self.draining, self.state = None, DaemonState.SERVING
            self._answer_operators(None)

    def _ask_drain(self, told: Callable[[], None]) -> None:
        """An operator asks for a drain; `told` is called when the order for all workers has reached this worker."""
        self._waiting_drainers.append(told)
        self._on_drain()

    def _ask_take_back(self, told: Callable[[HttpError | None], None]) -> None:
        """An operator takes the drain back; `told` gets the error 409 if it isn't possible. Raises HttpError 409.

        A worker that knows of no drain asks as well: another may have begun it a moment ago.
        """
        drain = self.draining
        if drain is not None and not drain.may_be_taken_back:
            raise _too_late()
        self._waiting_operators.append(told)
        self._on_take_back()

    def _answer_operators(self, error: HttpError | None) -> None:
        waiting, self._waiting_operators = self._waiting_operators, []
        for told in waiting:
            with self.runtime.guard:
                told(error)

    async def _drain(self, drain: Drain) -> None:
        guard = self.runtime.guard
        with guard:
            await drain.run()
        if drain.step is DrainStep.TAKEN_BACK:
            return
        if self._finish_telemetry is not None:
            with guard:
                await self._finish_telemetry()
        self.state = DaemonState.STOPPED
        if self.cluster is not None:
            with guard:
                await self.cluster.flush()
        self.runtime.sweep.stop()
        if self.cluster is not None:
            with guard:
                self.cluster.stop()
        with guard:
            self.upstreams.close()
        for tunnel in tuple(self.runtime.tunnels):
            with guard:
                tunnel.abort()
        with guard:
            self._lines.flush()
        if self.shared is not None:
            with guard:  # workers that drain on show these numbers
                self.shared.publish(self._own_totals())
        self.drained.set_result(drain.report)

    async def _close_listeners(self, *, of_operators: bool) -> None:
        """Accept every connection that waits in a queue of this daemon, then close; queues that systemd holds stay.

        The parent removes the file of an operators' Unix listener, because workers end at different times.
        """
        deadline = self.loop.time() + ACCEPT_EMPTY_S_MAX
        sockets, servers = self._sockets[of_operators], self._servers[of_operators]
        own = [sock for sock in sockets if sock.fileno() not in self._kept_open]
        while self.loop.time() < deadline and any(map(listen.connection_waits, own)):  # noqa: ASYNC110 (the kernel's queue)
            await asyncio.sleep(0)
        for server in servers:
            server.close()
        for sock in sockets:
            listen.close(sock, remove=self.removes_sockets and sock in own and not of_operators)
        servers.clear()
        sockets.clear()
        await asyncio.sleep(0)  # connections accepted last get a turn before the drain goes on


def _utc(unix_s: float) -> str:
    """A moment as RFC 3339 writes it."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _too_late() -> HttpError:
    why = "its listeners are closed, or a signal began it, whose sender waits for the end."
    return HttpError(409, f"This drain can't be taken back: {why}", code="drain_under_way")


# For gc.set_threshold(): allocations minus frees of containers before a pass over the youngest generation, then the
# passes over each generation before a pass over the next older.
GC_THRESHOLDS = (50_000, 50, 100)
