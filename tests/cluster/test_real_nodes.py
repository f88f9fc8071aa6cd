"""Two real daemons that share a real Valkey: a stream started at A is read at B, whatever happens to the engine."""

from __future__ import annotations

import signal

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from nodes import Nodes, nodes, start_engine

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


def fault_kill(n: Nodes) -> None:
    n.engine.kill()
    start_engine(n.engine)


def fault_stop(n: Nodes) -> None:
    n.engine.signal(signal.SIGSTOP)
    n.until(lambda: n.status("a")["engine"] and "up" not in engine_states(n), "slow engine")
    n.engine.signal(signal.SIGCONT)


def engine_states(n: Nodes) -> set[str]:
    return {each["state"] for name in n.daemons for each in n.status(name)["engine"].values()}


FAULTS = {
    "kill -9, and empty again": fault_kill,
    "a stall": fault_stop,
    "FLUSHALL": lambda n: n.engine.ask("FLUSHALL"),
    "all connections cut": lambda n: n.engine.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"),
    "connections for pushes cut": lambda n: n.engine.ask("CLIENT", "KILL", "TYPE", "pubsub"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_engine_costs_no_reader_a_token(name: str) -> None:
    with nodes() as n:
        at_a = n.start("a", tokens=400, interval_ms=20).read(20)
        at_b = n.read("b", at_a.stream_id).read(5)
        late = n.read("b", at_a.stream_id, at_a.last_id)
        for _ in range(2):
            FAULTS[name](n)
            at_a.read(60)
        at_a.to_the_end()
        at_b.to_the_end()
        late.to_the_end()
        assert at_a.events[-1].data == "[DONE]" and at_b.text == at_a.text and at_a.text.endswith(late.text)
        assert at_b.events[-1] == at_a.events[-1] and "gap" not in at_b.names
        n.until_up()
        n.until_copied("a")
        assert n.read("b", at_a.stream_id).to_the_end().text == at_a.text


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
        stopped = n["b"].request("DELETE", f"/v1/streams/{stream_id}")
        assert stopped.status == 409 and b"stream_elsewhere" in stopped.read()
