"""A worker's end in a cluster: all logs are written, and only then the others hear that it stopped."""

from __future__ import annotations

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from fake_engine import fake_engine, in_loop, until
from fakes import event
from loopback import serving

from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect


@in_loop
async def test_a_member_says_that_it_stopped_when_its_logs_are_written() -> None:
    async with fake_engine() as engine, serving(engine=(f"valkey://127.0.0.1:{engine.port}",)) as d:
        cluster, runtime = d.worker.cluster, d.worker.runtime
        assert cluster is not None
        await until(lambda: cluster.servers.shards[0].link.is_up)
        stream = runtime.hub.open(Dialect.CHAT, runtime.time())
        for _ in range(40):
            stream.append(event("word " * 400), runtime.time())
        stream.cancel(CloseReason.RESTARTED, runtime.time(), message="cut")
        await cluster.flush()
        writes = [k for k, command in enumerate(engine.commands) if command[0] == b"XADD"]
        stops = [k for k, command in enumerate(engine.commands) if command[0] == b"HSET" and b"stopped" in command[-1]]
        assert len(writes) >= 4 and len(stops) == 1, "a log of several entries"
        assert writes[-1] < stops[0] and b"restarted" in engine.commands[writes[-1]][-1]
        cluster.stop()
