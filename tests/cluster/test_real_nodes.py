"""Two real daemons that share a real Valkey: a stream started at A is read at B, whatever happens to the engine."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from loaded import new_key
from nodes import NodeReader, nodes, start_engine
from patient import Ending
from real_engine import RealEngine, engines
from served import PROJECT, WAIT_S

from streamd.engine.shards import CopyKeys

pytestmark = pytest.mark.cluster


def test_a_running_stream_is_read_live_at_the_other_node() -> None:
    with nodes() as n:
        at_a = n.start("a", tokens=150, interval_ms=20).read(10)
        at_b = n.read("b", at_a.stream_id)
        at_b.to_the_end()
        at_a.to_the_end()
        assert at_a.text and at_b.text == at_a.text
        assert at_b.events[-1] == at_a.events[-1]
        own = {event.id: event for event in at_a.events}
        same = [event for event in at_b.events if own.get(event.id) == event]
        assert len(same) > 20, "events that came live are the owner's, byte for byte"
        assert n.status("b")["followed"] == 1


def test_a_stream_is_resumed_in_its_middle_at_the_other_node() -> None:
    with nodes() as n:
        at_a = n.start("a", tokens=100, interval_ms=10).read(40)
        stream_id, last_id, first = at_a.stream_id, at_a.last_id, at_a.text
        at_b = n.read("b", stream_id, last_id).to_the_end()
        at_a.to_the_end()
        assert first + at_b.text == at_a.text
        assert int(at_b.events[0].id.rpartition(":")[2]) > int(last_id.rpartition(":")[2])


def test_a_finished_stream_is_read_at_the_other_node() -> None:
    with nodes() as n:
        at_a = n.start("a", tokens=50, interval_ms=0).to_the_end()
        n.until_copied("a")
        at_b = n.read("b", at_a.stream_id).to_the_end()
        assert at_b.text == at_a.text and at_b.events[-1] == at_a.events[-1]
        assert n.ask("b", at_a.stream_id, at_a.last_id).status == 204


def test_without_an_engine_the_own_readers_notice_nothing_and_others_are_told_to_come_back() -> None:
    with nodes("--engine-patience", "1s", "--engine-timeout", "1s") as n:
        at_a = n.start("a", tokens=600, interval_ms=10).read(20)
        at_b = n.read("b", at_a.stream_id).read(5)
        n.engine.kill()
        at_b.to_the_end()
        assert at_b.names[-1] == "reconnect"
        refused = n.ask("b", at_a.stream_id, at_b.last_id)
        assert refused.status == 503 and refused.headers["Retry-After"] and b"engine_unreachable" in refused.read()
        asked = n.ask("b", at_a.stream_id, at_b.last_id, Accept="text/event-stream")
        assert asked.status == 200 and asked.readline().startswith(b"retry: ")
        start_engine(n.engine)
        n.until_up()
        rest = n.read("b", at_a.stream_id, at_b.last_id).to_the_end()
        at_a.to_the_end()
        assert at_b.text + rest.text == at_a.text and at_a.events[-1].data == "[DONE]"
        lines = "\n".join(n["b"].lines)
        assert lines.count(" WARNING engine down") == 1 and lines.count(" engine up") == 2


def test_a_dead_nodes_streams_are_read_to_their_last_event_and_then_named_lost() -> None:
    with nodes() as n:
        at_a = n.start("a", tokens=2000, interval_ms=20).read(20)
        at_b = n.read("b", at_a.stream_id).read(5)
        n.kill("a")
        at_a.to_the_end()
        at_b.to_the_end()
        assert b"node_lost" in at_b.events[-1].data.encode() and at_b.last_id.endswith("!")
        assert at_a.text.startswith(at_b.text) and at_b.text
        assert n.ask("b", at_a.stream_id, at_b.last_id).status == 204, "an EventSource stops"
        again = n.read("b", at_a.stream_id, at_a.last_id).to_the_end()
        assert "node_lost" in again.events[-1].data and len(again.events) == 1
        assert n["b"].request("GET", "/healthz").status == 200


def test_a_node_that_stops_in_order_leaves_its_streams_to_the_others() -> None:
    with nodes("--drain-timeout", "1s") as n:
        at_a = n.start("a", tokens=2000, interval_ms=20).read(20)
        n["a"].signal(signal.SIGTERM)
        at_a.to_the_end()
        assert at_a.names[-1] == "reconnect" and n["a"].ended() == 0
        rest = n.read("b", at_a.stream_id, at_a.events[-2].id).to_the_end()
        assert "restarted" in rest.events[-1].data


def test_an_unknown_id_is_gone_at_every_node_and_a_position_ahead_is_no_mistake() -> None:
    with nodes() as n:
        unknown = "s_AZZZZ" + "x" * 22
        assert n.ask("b", unknown).status == n.ask("a", unknown).status == 410
        at_a = n.start("a", tokens=2000, interval_ms=20).read(5)
        stream_id = at_a.stream_id
        n.read("b", stream_id).read(1)
        ahead = n.ask("b", stream_id, f"{stream_id}:100000")
        assert ahead.status == 503 and b"engine_behind" in ahead.read()
        assert n.ask("a", stream_id, f"{stream_id}:100000").status == 400
        published = n["b"].request("POST", f"/v1/streams/{stream_id}/events", b"")
        assert published.status == 409 and b"stream_elsewhere" in published.read()
        assert n["b"].request("DELETE", f"/v1/streams/{unknown}").status == 410


def test_a_delete_at_any_node_stops_the_stream_where_it_is() -> None:
    with nodes(names="abc") as n:
        at_a = n.start("a", tokens=5000, interval_ms=20).read(10)
        at_b = n.read("b", at_a.stream_id).read(3)
        path = f"/v1/streams/{at_a.stream_id}"
        assert n["c"].request("DELETE", path).status == 204, "c has never followed the stream"
        for reader in (at_a, at_b):
            assert "stopped by request" in reader.to_the_end().events[-1].data
        n.until_copied("a")
        n.until(lambda: n["b"].request("DELETE", path).status == 204, "a finished stream without readers")
        n.until(lambda: n.ask("a", at_a.stream_id).status == 404, "it is forgotten")
        n.until(lambda: n.ask("c", at_a.stream_id).status == 410, "nor is it read at a node that had it")


def test_a_delete_whose_owner_says_nothing_is_accepted_and_promises_nothing() -> None:
    with nodes() as n:
        at_a = n.start("a", tokens=5000, interval_ms=20).read(10)
        n.read("b", at_a.stream_id).read(3)
        n.kill("a")
        answer = n["b"].request("DELETE", f"/v1/streams/{at_a.stream_id}")
        assert answer.status == 202 and b"stopping" in answer.read()


def test_the_access_list_of_the_documents_is_enough(tmp_path: Path) -> None:
    line = re.search(r"^user (streamd .*)$", Path(PROJECT, "docs/CLUSTER.md").read_text(), re.MULTILINE)
    assert line is not None
    password = tmp_path / "password"
    password.write_text("secret\n")
    password.chmod(0o600)
    engine = RealEngine()
    with engines(engine):
        start_engine(engine)
        engine.ask("ACL", "SETUSER", *line[1].replace("PASSWORD", "secret").split())
        flags = ("--engine-user", "streamd", "--engine-password-file", str(password))
        with nodes(*flags, engine=engine) as n:
            at_a = n.start("a", tokens=100, interval_ms=20).read(10)
            at_b = n.read("b", at_a.stream_id).to_the_end()
            at_a.to_the_end()
            assert at_b.text == at_a.text
            n.until_copied("a")
            for daemon in n.daemons.values():
                assert not [line for line in daemon.lines if " ERROR " in line or " WARNING engine" in line]
            found = engine.ask("ACL", "LOG")
            assert found == []


def test_an_engine_that_is_wrong_is_an_error_and_the_daemon_serves() -> None:
    engine = RealEngine("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    with engines(engine):
        start_engine(engine)
        engine.ask("ACL", "SETUSER", "default", "-xtrim")
        with nodes(engine=engine, names="a") as n:
            n["a"].line(r" ERROR .*maxmemory-policy.* policy=allkeys-lru")
            n["a"].line(r" ERROR .*refuses commands.* commands=XTRIM")
            assert n.start("a", tokens=5, interval_ms=0).to_the_end().events[-1].data == "[DONE]"


def test_several_workers_are_members_of_their_own_and_a_node_follows_a_stream_once() -> None:
    with nodes("--workers", "2") as n:
        running = [n.start("a", tokens=150, interval_ms=20) for _ in range(6)]
        for reader in running:
            reader.read(3)
        elsewhere = [(reader, n.read("b", reader.stream_id)) for reader in running for _ in range(3)]
        for reader in running:
            reader.to_the_end()
        for reader, other in elsewhere:
            assert other.to_the_end().text == reader.text and other.events[-1] == reader.events[-1]
        text = n["b"].request("GET", "/metrics").read().decode()
        assert re.search(r"^streamd_engine_lookups_total (6|7|8)\.0$", text, re.MULTILINE), text
        assert n.engine.ask("HLEN", CopyKeys("sd:").members()) == 4
        # As of b's last look around, which may be older than the last worker's first sign of life.
        assert re.search(r"^streamd_engine_members [1-4]\.0$", text, re.MULTILINE), text


def test_an_owner_that_was_cut_off_goes_on_and_takes_its_stream_back() -> None:
    """Only its own connections are cut: the way between it and the engine resets and refuses."""
    with nodes(counted=True) as n:
        at_a = n.begin("a")
        at_b = n.also(at_a, "b")
        n.until_read([at_a, at_b])
        n.ways["a"].shut()
        at_b.join(WAIT_S)
        assert at_b.ending is Ending.NODE_LOST and at_b.lost_at == at_b.seq and not at_b.wrong
        n.ways["a"].open()
        n.until_up("a")
        n.until(lambda: n.status("a")["lag_s"] < 2, "a copy")
        n.until(lambda: n.ask("b", at_b.stream_id, at_b.last_id).status == 200, "the stream again")
        at_b = n.goes_on(at_b)
        n.until_read([at_b])
        n.finish([at_a, at_b, n.also(at_a, "b")])
        lines = n["a"].request("GET", "/metrics").read().decode()
        assert "streamd_engine_revived_total 1.0" in lines


def test_keys_and_tokens_hold_at_every_node(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    keys = {name: new_key(file, name) for name in ("one", "two")}
    secret = tmp_path / "secret"
    secret.write_text("x" * 64)
    for path in (file, secret):
        path.chmod(0o600)
    flags = ("--keys-file", str(file), "--streams-auth", "token", "--token-secret-file", str(secret))
    with nodes(*flags, "--token-audience", "tests") as n:
        one, two = ({"Authorization": f"Bearer {keys[name]}"} for name in ("one", "two"))
        body = b'{"model":"mock-llm","stream":true,"messages":[{"role":"user","content":"Hello"}]}'
        fields = {"Content-Type": "application/json", "X-Mock-Tokens": "400", "X-Mock-Interval-Ms": "20", **one}
        at_a = NodeReader(n["a"].request("POST", "/v1/chat/completions", body, fields)).read(10)
        path = f"/v1/streams/{at_a.stream_id}"
        unknown = "/v1/streams/s_A" + "Z" * 26
        assert n["b"].request("GET", path, headers=one).status == 200
        for given in ({}, two):
            home, away = (n[node].request("GET", path, headers=given) for node in "ab")
            assert home.status == away.status >= 400 and home.read()[:60] == away.read()[:60]
        assert n["b"].request("GET", unknown).status == n["a"].request("GET", unknown).status == 401
