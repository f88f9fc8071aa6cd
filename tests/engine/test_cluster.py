"""A worker's part in a cluster: its settings, its numbers, its memory, and its answers while the engine is away."""

from __future__ import annotations

import gc
import importlib.util
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from fake_engine import fake_engine, in_loop, until
from fakes import Answer, event
from loopback import serving
from test_owner import LIVE_TTL_S, Rig

from streamd.config import ConfigError, Settings, load, relations
from streamd.core.hub import CHARGE_TURNS
from streamd.core.replay import ReplayLog
from streamd.core.snapshot import choose
from streamd.core.stream import Stream
from streamd.core.terms import Terms
from streamd.daemon import engine_start
from streamd.daemon.engine_start import KeyFingerprint
from streamd.engine.connection import EngineError
from streamd.engine.owner import CopyFound, CopyOwner, CopyState
from streamd.engine.shards import CopyKeys
from streamd.measure import Label
from streamd.net.totals import KEYS, NO_ENGINE
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect


class CopiesOf:
    """An owner's part of a cluster."""

    def __init__(self, owner: CopyOwner) -> None:
        self.grown, self.need = owner.grown, owner.need

    def left(self, stream: Stream, reason: CloseReason) -> None:
        raise AssertionError("no stream of another worker is here")

    def is_read_elsewhere(self, stream: Stream) -> bool:
        return False


NOWHERE = ("valkey://127.0.0.1:1",)  # nothing listens there
FOREIGN = "s_AZZZZ" + "x" * 22


def problems(**given: Any) -> dict[str, str]:
    return dict(relations(Settings(**given)))


def test_settings_of_an_engine_fit_together() -> None:
    assert problems(engine=NOWHERE) == {}
    assert problems(engine=("valkey://a", "valkey://b")) == {}
    assert "different servers" in problems(engine=("valkey://a", "redis://a:6379"))["engine"]
    assert "different servers" in problems(engine=("valkey://a", "valkeys://b"))["engine"]
    assert "without engine" in problems(engine_password_file="x")["engine_password_file"]
    assert "valkeys://" in problems(engine=NOWHERE, engine_ca_file="x")["engine_ca_file"]
    assert "used together" in problems(engine=NOWHERE, engine_user="u")["engine_password_file"]


def test_a_password_in_a_url_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError) as refused:
        load(file=None, environ={}, flags={"engine": ["valkey://user@host"]})
    assert "without user, password" in str(refused.value)


def test_an_installation_without_the_extra_is_told_which(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "engine" not in problems(engine=NOWHERE)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "make install EXTRAS=cluster, or pip install '.[cluster]'" in problems(engine=NOWHERE)["engine"]


def test_a_password_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("secret\n")
    path.chmod(0o644)
    settings = Settings(engine=NOWHERE, engine_password_file=str(path))
    with pytest.raises(ConfigError, match="engine_password_file") as refused:
        engine_start._password(settings)
    assert "secret" not in str(refused.value).replace(str(path), "")
    path.chmod(0o600)
    assert engine_start._password(settings) == "secret"


def test_the_words_of_metrics_are_those_of_the_engine() -> None:
    assert KEYS[Label.FOUND] == tuple(found.value for found in CopyFound)


@in_loop
async def test_while_the_engine_is_away_a_foreign_id_is_unknown_and_not_gone() -> None:
    async with serving(engine=NOWHERE) as d:
        for path, status in ((f"/v1/streams/{FOREIGN}", 503), ("/v1/streams/a-name", 404)):
            conn = await d.connect()
            await conn.send(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            answer = await conn.answer()
            assert answer.status == status, answer
            if status == 503:
                assert b"engine_unreachable" in answer.body and answer.get("retry-after")
        cluster = d.worker.cluster
        assert cluster is not None and cluster.gauges().keys() == NO_ENGINE.keys()
        assert cluster.gauges()["engine_down"] == 1 and len(cluster.followed) == 0
        cluster.stop()


@in_loop
async def test_a_foreign_id_is_looked_for_once_and_then_gone() -> None:
    engine_of = fake_engine()
    async with engine_of as engine, serving(engine=(f"valkey://127.0.0.1:{engine.port}",)) as d:
        cluster = d.worker.cluster
        assert cluster is not None
        shard = cluster.servers.shards[0]
        await until(lambda: shard.link.is_up and shard.channels.link.is_up)
        engine.script = lambda command: (
            b"*0\r\n" if command[0] == b"XRANGE" else b"*2\r\n$1\r\nx\r\n_\r\n" if command[0] == b"HMGET" else None
        )
        conns = [await d.connect() for _ in range(3)]
        for conn in conns:
            await conn.send(f"GET /v1/streams/{FOREIGN} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        assert [(await conn.answer()).status for conn in conns] == [410] * 3
        channel = CopyKeys().channel(FOREIGN)
        assert engine.commands.count((b"SUBSCRIBE", channel)) == 1 and len(cluster.followed) == 0
        cluster.stop()


@in_loop
async def test_too_many_look_ups_of_an_address_are_refused() -> None:
    async with fake_engine() as engine:
        engine.script = lambda command: b"" if command[0] == b"XRANGE" and b":l:" in command[1] else None
        async with serving(engine=(f"valkey://127.0.0.1:{engine.port}",), engine_lookups_max=8) as d:
            cluster = d.worker.cluster
            assert cluster is not None
            shard = cluster.servers.shards[0]
            await until(lambda: shard.link.is_up and shard.channels.link.is_up)
            conns = [await d.connect() for _ in range(3)]
            for number, conn in enumerate(conns):
                await conn.send(f"GET /v1/streams/{FOREIGN[:-1]}{number} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            answer = await conns[2].answer()
            assert answer.status == 503 and b"over_capacity" in answer.body
            assert len(cluster.followed) == 2
            for conn in conns:
                conn.close()
            await until(lambda: len(cluster.followed) == 0)
            cluster.stop()


def test_a_copy_takes_at_most_250_bytes_of_its_owner() -> None:
    rig = Rig()
    rig.link.up()
    streams = [rig.open() for _ in range(1000)]
    for stream in streams:
        for _ in range(30):
            stream.append(b'data: {"choices":[{"delta":{"content":" a"}}]}\n\n', rig.now)
    rig.hub.sweep(streams, rig.now)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for stream in streams:
        rig.owner.grown(stream)
        rig.link.commands.clear()
        _, on_reply = rig.link.asked.popleft()
        on_reply(b"1-0")
        rig.link.commands.clear()
        rig.link.asked.clear()
    rig.server.written.clear()
    gc.collect()
    held = (tracemalloc.get_traced_memory()[0] - before) / len(streams)
    tracemalloc.stop()
    assert all(copy.state is CopyState.WRITTEN for copy in rig.server.copies.values())
    assert held <= 250, held


def test_the_loss_window_is_the_age_of_the_oldest_unwritten_event() -> None:
    rig = Rig()
    rig.link.up()
    stream = rig.open()
    rig.grow(stream, " a")
    rig.link.turn()
    assert rig.owner.lag_s(rig.now) == 0.0
    rig.tick(0.25)
    rig.owner.grown(stream)
    rig.link.is_up = False
    rig.grow(stream, " b")
    for _ in range(12):
        rig.tick(0.25)
    assert 2.9 <= rig.owner.lag_s(rig.now) <= 4.0
    rig.engine.flush()
    rig.link.up()
    rig.settle()
    assert rig.owner.lag_s(rig.now) == 0.0


def test_a_stream_that_is_to_be_forgotten_leaves_no_copy() -> None:
    rig = Rig()
    rig.link.up()
    stream = rig.open()
    rig.grow(stream, " a")
    rig.link.turn()
    rig.engine._unlink = rig.engine.evict  # type: ignore[attr-defined]
    rig.owner.forget(stream)
    rig.link.turn()
    assert rig.entries(stream) == [] and not rig.server.copies


def test_the_word_of_an_engines_error_is_its_first() -> None:
    assert EngineError("NOPERM this user has no permissions").word == "NOPERM"


@in_loop
async def test_a_reader_of_a_lost_stream_is_told_until_it_says_that_it_knows() -> None:
    async with serving() as d:
        hub, now = d.worker.runtime.hub, d.worker.runtime.time()
        stream = hub.open(Dialect.CHAT, now, terms=Terms(retention_s=60.0))
        for text in (" a", " b"):
            stream.append(event(text), now)
        stream.seal(CloseReason.NODE_LOST, now, clean=False)

        async def ask(position: str) -> Answer:
            fields = f"Host: 127.0.0.1\r\nLast-Event-ID: {stream.id}:{position}\r\n"
            return await d.ask(f"GET /v1/streams/{stream.id} HTTP/1.1\r\n{fields}\r\n".encode())

        told, again = await ask("1"), await ask("2")
        for answer in (told, again):
            assert answer.status == 200 and not answer.whole
            assert f"id: {stream.id}:2!\n".encode() in answer.body and b"node_lost" in answer.body
        assert b" b" in told.body and b" b" not in again.body
        assert (await ask("2!")).status == 204
        assert b" b" in (await ask("1!")).body, "a stream that went on has more for it"


def test_the_sweep_writes_live_streams_once_a_second() -> None:
    rig = Rig()
    rig.link.up()
    stream = rig.open()
    rig.hub.copies = CopiesOf(rig.owner)
    stream.append(event(" a"), rig.now)
    for turn in range(CHARGE_TURNS):
        rig.hub.sweep([stream], rig.now, turn)
    assert [command[0] for command in rig.link.commands] == [b"XADD"]


def test_a_finished_stream_stays_until_its_copy_has_the_end_but_not_longer_than_a_copy_would() -> None:
    rig = Rig()
    rig.hub.copies = CopiesOf(rig.owner)
    rig.link.up()
    written, cut_off = rig.open(), rig.open()
    for stream in (written, cut_off):
        rig.grow(stream, " a")
        rig.link.turn()
        stream.seal(CloseReason.COMPLETE, rig.now, clean=True)
    rig.owner.grown(written)
    rig.link.turn()
    rig.now += 60
    rig.hub.sweep(tuple(rig.hub), rig.now)
    assert tuple(rig.hub) == (cut_off,), "whoever reads it elsewhere waits for the end"
    rig.now += LIVE_TTL_S
    rig.hub.sweep(tuple(rig.hub), rig.now)
    assert len(rig.hub) == 0


@in_loop
async def test_streams_of_other_nodes_are_neither_written_nor_saved_nor_changed_here() -> None:
    async with serving(engine=NOWHERE) as d:
        cluster, runtime = d.worker.cluster, d.worker.runtime
        assert cluster is not None
        terms = Terms(is_copy=True, retention_s=10.0)
        log = ReplayLog(bytes_max=1 << 20, events_max=1 << 20)
        copy = runtime.hub.restore(FOREIGN, log, Dialect.CHAT, runtime.time(), kind=Stream, terms=terms)
        assert copy is not None
        copy.append(event(" a"), runtime.time())
        runtime.hub.sweep([copy], runtime.time())
        assert cluster.status()["copies"] == 0 and choose(runtime.hub, 1 << 30) == []
        refusals = (("DELETE", "", 503, b"engine_unreachable"), ("POST", "/events", 409, b"stream_elsewhere"))
        for method, path, status, code in refusals:
            fields = "Host: 127.0.0.1\r\nContent-Length: 0\r\n"
            answer = await d.ask(f"{method} /v1/streams/{FOREIGN}{path} HTTP/1.1\r\n{fields}\r\n".encode())
            assert answer.status == status and code in answer.body
        assert copy.reason is None
        runtime.hub.remove(copy)
        cluster.stop()


@in_loop
async def test_a_position_ahead_of_the_copy_waits_for_it() -> None:
    async with serving(engine=NOWHERE) as d:
        runtime = d.worker.runtime
        terms = Terms(is_copy=True, retention_s=10.0)
        log = ReplayLog(bytes_max=1 << 20, events_max=1 << 20)
        copy = runtime.hub.restore(FOREIGN, log, Dialect.CHAT, runtime.time(), kind=Stream, terms=terms)
        assert copy is not None
        head = f"GET /v1/streams/{FOREIGN} HTTP/1.1\r\nHost: 127.0.0.1\r\nLast-Event-ID: {FOREIGN}:"
        conn = await d.connect(f"{head}2\r\n\r\n".encode())
        await d.until(lambda: len(runtime.sweep) > 1)
        for text in (" a", " b", " c"):
            copy.append(event(text), runtime.time())
        copy.seal(CloseReason.COMPLETE, runtime.time(), clean=True)
        answer = await conn.answer()
        assert answer.status == 200 and b" c" in answer.body and b" b" not in answer.body
        runtime.hub.remove(copy)
        assert d.worker.cluster is not None
        d.worker.cluster.stop()


@in_loop
async def test_a_reload_takes_up_the_engines_times_and_keeps_its_connections() -> None:
    async with fake_engine() as engine, serving(engine=(f"valkey://127.0.0.1:{engine.port}",)) as d:
        cluster = d.worker.cluster
        assert cluster is not None
        link = cluster.servers.shards[0].link
        await until(lambda: link.is_up)
        changed = {"engine_push_s": 0.5, "engine_lease_s": 60.0, "engine_live_ttl_s": 60.0, "engine_timeout_s": 30.0}
        d.worker.reload(replace(d.worker.settings, **changed))
        assert cluster._push_s == 0.5 and link._terms.timeout_s == 30.0
        assert cluster.members._lease_s == 60.0 and cluster.owner._live_ttl_s == 60.0
        assert cluster.followed._settings is d.worker.settings and link.times_up == 1

        missing = replace(d.worker.settings, engine_password_file="/nowhere/password", engine_push_s=0.1)
        with pytest.raises(ConfigError, match="engine_password_file"):
            d.worker.reload(missing)
        assert cluster._push_s == 0.5 and link.is_up
        cluster.stop()


def test_nodes_with_other_keys_or_other_issuers_of_tokens_have_other_fingerprints() -> None:
    key, other = SimpleNamespace(id="one"), SimpleNamespace(id="two")
    tokens, foreign = (SimpleNamespace(fingerprint=lambda text=text: text) for text in ("a", "b"))
    rights: Any = SimpleNamespace(keys=None, verifier=None)
    fingerprint = KeyFingerprint(rights)
    made: set[str] = set()
    for rights.keys in (None, [key], [other]):
        for rights.verifier in (None, tokens, foreign):
            made.add(fingerprint())
            assert fingerprint() in made
    assert len(made) == 9
