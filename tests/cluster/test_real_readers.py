"""Readers at other nodes are readers: their generations go on while they read, and end by the rule of the last."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from nodes import NodeReader, Nodes, nodes

pytestmark = pytest.mark.cluster


def until_known(n: Nodes, at_a: NodeReader) -> None:
    """Until a knows of the readers at b."""

    def is_known() -> bool:
        return b"\nstreamd_engine_remote_readers 1.0\n" in n["a"].request("GET", "/metrics").read()

    n.until(is_known, f"word of a reader of {at_a.stream_id}")


def state_at(n: Nodes, node: str, stream_id: str) -> str:
    state: dict[str, str] = json.loads(n.ask(node, stream_id, Accept="application/json").read())
    return f"{state['state']} {state['reason']}"


def test_a_generation_that_is_read_elsewhere_goes_on_without_a_reader_at_its_own_node() -> None:
    with nodes() as n:
        at_a = n.start("a", tokens=250, interval_ms=20).read(10)
        at_b = n.read("b", at_a.stream_id)
        until_known(n, at_a)
        at_a.answer.close()
        at_b.to_the_end()
        assert at_b.events[-1].data == "[DONE]" and at_b.text.startswith(at_a.text)
        assert state_at(n, "a", at_a.stream_id) == "sealed complete"


def test_the_last_reader_elsewhere_stops_the_generation_as_one_here_does() -> None:
    with nodes() as n:
        at_a = n.start("a", tokens=5000, interval_ms=20).read(10)
        at_b = n.read("b", at_a.stream_id).read(5)
        until_known(n, at_a)
        at_a.answer.close()
        at_b.read(20).answer.close()
        n.until(lambda: state_at(n, "a", at_a.stream_id) == "sealed reader_gone", "end of the generation")


def test_a_reader_that_comes_back_at_another_node_ends_the_grace_at_its_own() -> None:
    """The next reader is counted where it is, and not where the generation is."""
    with nodes("--detach-grace", "4s") as n:
        at_a = n.start("a", tokens=400, interval_ms=20).read(10)
        stream_id, last_id = at_a.stream_id, at_a.last_id
        at_a.answer.close()
        rest = n.read("b", stream_id, last_id).to_the_end()
        assert rest.events[-1].data == "[DONE]"
        assert state_at(n, "a", stream_id) == "sealed complete"


def test_a_node_that_dies_with_the_last_readers_is_a_lost_connection() -> None:
    with nodes("--resume-grace", "2s") as n:
        at_a = n.start("a", tokens=5000, interval_ms=20).read(10)
        n.read("b", at_a.stream_id).read(5)
        until_known(n, at_a)
        at_a.answer.close()
        n.kill("b")
        n.until(lambda: state_at(n, "a", at_a.stream_id) == "sealed abandoned", "end of the generation")


def test_a_copy_of_a_finished_stream_that_was_evicted_is_written_again_for_a_reader_elsewhere() -> None:
    with nodes() as n:
        at_a = n.start("a", tokens=50, interval_ms=0).to_the_end()
        n.until_copied("a")
        n.engine.ask("FLUSHDB")
        n.until(lambda: n.engine.ask("HLEN", "sd:m") == 2, "signs of life")
        at_b = n.read("b", at_a.stream_id).to_the_end()
        assert at_b.text == at_a.text and at_b.events[-1] == at_a.events[-1]
