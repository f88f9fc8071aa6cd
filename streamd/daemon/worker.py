"""Worker: one process's loop, wiring, signals and listeners."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterable
from functools import partial

import uvloop

from streamd import __version__, metrics
from streamd.addresses import parse_address
from streamd.api.access import Access
from streamd.api.models import Models
from streamd.api.ops import Ops
from streamd.api.publish import Publish
from streamd.api.relay import Relay, ask_of
from streamd.api.router import Router
from streamd.api.streams import Streams
from streamd.config import Settings
from streamd.core.hub import Hub
from streamd.core.stream import Stream
from streamd.daemon import logs
from streamd.daemon.access import AccessLog
from streamd.net import listen
from streamd.net.client import ClientConnection
from streamd.net.runtime import Runtime
from streamd.net.upstreams import Upstreams

# A pass over the streams goes in slices of so many, about half a millisecond each.
STREAMS_SLICE_MAX = 1000


class Worker:
    """Everything that serves, wired together; `serve()` runs it until it is told to stop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, settings: Settings) -> None:
        self.loop = loop
        self.settings = settings
        hub = Hub(
            log_bytes_max=settings.logs_bytes_max or 1 << 40,
            stream_log_bytes_max=settings.log_bytes_max,
            stream_log_events_max=settings.log_events_max,
            detached_max=settings.detached_max,
        )
        self.runtime = runtime = Runtime(loop, settings, hub)
        self.upstreams = Upstreams(runtime, settings)
        self.state = "starting"
        self.started_at = loop.time()
        self._servers: list[asyncio.AbstractServer] = []
        self._stopped = asyncio.Event()
        self._wire()

    def _wire(self) -> None:
        runtime, upstreams = self.runtime, self.upstreams
        self.access = access = Access(runtime)
        streams = Streams(runtime, access)
        publish = Publish(runtime, streams, access)
        relay = Relay(runtime, upstreams, streams, access)
        rendered = metrics.Metrics(metrics.StreamdCollector(runtime, upstreams))
        ops = Ops(
            runtime,
            metrics=rendered.render,
            status=lambda: metrics.status(runtime, upstreams, state=self.state, started_at=self.started_at),
            ready=lambda: "ready" if self.state == "serving" else self.state,
        )
        router = Router(access, relay, streams, publish, Models(runtime, upstreams, ask_of), ops)
        runtime.plan = router.plan
        runtime.on_request_end = AccessLog(runtime).request_ended
        runtime.on_bug = logs.bug
        runtime.hub.on_sealed = self._count_sealed
        runtime.hub.new_fanout = runtime.new_fanout
        runtime.sweep.on_tick += [self._tick, upstreams.tick]

    def _count_sealed(self, stream: Stream) -> None:
        assert stream.reason is not None
        self.runtime.counters.streams_sealed[stream.reason] += 1
        usage = stream.progress.usage
        logs.event(
            logs.INFO,
            "stream",
            stream=stream.id,
            reason=stream.reason,
            duration_s=round(stream.sealed_at - stream.opened_at, 4),
            events=stream.events,
            text_events=stream.text_events,
            text_bytes=stream.text_bytes,
            input_tokens=usage[0] if usage else None,
            output_tokens=usage[1] if usage else None,
            upstream=stream.upstream or None,
            model=stream.model or None,
        )

    def _tick(self, now: float, lag_s: float) -> None:
        counters = self.runtime.counters
        counters.loop_lag_s.observe(lag_s)
        counters.loop_lag_last_s = lag_s
        self._sweep_streams(tuple(self.runtime.hub), 0)

    def _sweep_streams(self, streams: tuple[Stream, ...], start: int) -> None:
        self.runtime.hub.sweep(streams[start : start + STREAMS_SLICE_MAX], self.loop.time())
        if start + STREAMS_SLICE_MAX < len(streams):
            self.loop.call_soon(self._sweep_streams, streams, start + STREAMS_SLICE_MAX)

    # -- life

    async def listen(self, sockets: Iterable[socket.socket], kind: str) -> None:
        """Accept on each socket through several dups of it."""
        for sock in sockets:
            listen.set_options(sock, self.settings)
            name = kind or ("loopback" if listen.is_loopback(sock) else "public")
            make = partial(ClientConnection, self.runtime, name)
            for _ in range(listen.DUPS):
                dup = sock.dup()
                if sock.family == socket.AF_UNIX:
                    server = await self.loop.create_unix_server(make, sock=dup, backlog=listen.BACKLOG)
                else:
                    server = await self.loop.create_server(make, sock=dup, backlog=listen.BACKLOG)
                self._servers.append(server)

    async def serve(self) -> int:
        sockets = [listen.bind(parse_address(address)) for address in self.settings.listen]
        await self.listen(sockets, "")
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self._stopped.set)
        self.runtime.sweep.start()
        self.state = "serving"
        addresses = tuple(listen.shown(sock) for sock in sockets)
        logs.event(logs.INFO, "serving", version=__version__, listen=addresses, pid=os.getpid())
        await self._stopped.wait()
        for server in self._servers:
            server.close()
        return 0


def run(settings: Settings) -> int:
    """`streamd serve`: the exit status."""
    logs.setup(settings.log_level, settings.log_format, journal_stream=os.environ.get("JOURNAL_STREAM"))
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(settings))
    except OSError as error:
        print(f"streamd: {error}", file=sys.stderr)
        return 1


async def _serve(settings: Settings) -> int:
    worker = Worker(asyncio.get_running_loop(), settings)
    with contextlib.ExitStack():
        return await worker.serve()
