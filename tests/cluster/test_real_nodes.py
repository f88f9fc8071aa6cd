"""Two real daemons that share a real Valkey: a stream started at A is read at B, whatever happens to the engine."""

from __future__ import annotations

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from nodes import Nodes, nodes

pytestmark = pytest.mark.cluster


def compare(n: Nodes, full: str, last_id: str, stream_id: str, at: str) -> None:
    """From every position that a reader may have, node `at` has the rest."""
    read = n.read(at, stream_id, last_id).to_the_end()
    assert full.endswith(read.text) and read.events[-1].data == "[DONE]"


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
