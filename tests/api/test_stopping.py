"""DELETE at any node: the stream ends where it lives, for clients with the right to it."""

from __future__ import annotations

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from fake_engine import in_loop, until
from fakes import event
from loopback import Daemon
from model_server import Pair, pair

from streamd.core.stream import Stream
from streamd.core.terms import Terms
from streamd.engine.notes import NoteKind
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect


def opened(daemon: Daemon, *texts: str) -> Stream:
    """A stream of this worker."""
    runtime = daemon.worker.runtime
    stream = runtime.hub.open(Dialect.CHAT, runtime.time(), terms=Terms(retention_s=60.0))
    for text in texts:
        stream.append(event(text), runtime.time())
    return stream


async def delete(daemon: Daemon, stream: Stream) -> tuple[int, bytes]:
    answer = await daemon.ask(f"DELETE /v1/streams/{stream.id} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    return answer.status, answer.body


async def end(p: Pair) -> None:
    """Leave nothing behind."""
    for daemon in (p.a, p.b):
        hub = daemon.worker.runtime.hub
        for stream in hub:
            hub.remove(stream)


@in_loop
async def test_a_delete_at_another_node_ends_the_stream_where_it_lives() -> None:
    async with pair() as p:
        stream = opened(p.a, " a", " b")
        assert await delete(p.b, stream) == (204, b"")
        assert stream.reason is CloseReason.CANCELLED
        here = p.b.worker.runtime.hub.get(stream.id)
        assert here is not None and here.terms.is_copy
        await until(lambda: here.reason is CloseReason.CANCELLED)
        await end(p)


@in_loop
async def test_a_finished_stream_is_forgotten_everywhere() -> None:
    async with pair() as p:
        stream = opened(p.a, " a")
        stream.seal(CloseReason.COMPLETE, p.a.worker.runtime.time(), clean=True)
        assert await delete(p.b, stream) == (204, b"")
        assert len(p.a.worker.runtime.hub) == len(p.b.worker.runtime.hub) == 0
        assert not [key for key in p.server.engine.keys if b":l:" in key]


@in_loop
async def test_without_the_owners_word_nothing_is_promised() -> None:
    async with pair() as p:
        stream = opened(p.a, " a")
        cluster = p.a.worker.cluster
        assert cluster is not None
        cluster.notes._takers[NoteKind.CANCEL] = lambda note: None
        status, body = await delete(p.b, stream)
        assert status == 202 and stream.id.encode() in body and stream.reason is None
        await end(p)


@in_loop
async def test_a_running_stream_that_its_owner_does_not_have_is_not_found() -> None:
    async with pair() as p:
        stream = opened(p.a, " a")
        hub = p.a.worker.runtime.hub
        conn = await p.b.connect(f"GET /v1/streams/{stream.id} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        await until(lambda: len(p.b.worker.runtime.hub))
        hub.remove(stream)
        assert (await delete(p.b, stream))[0] == 404
        conn.close()
        await until(lambda: not any(each.readers for each in p.b.worker.runtime.hub))
        await end(p)
