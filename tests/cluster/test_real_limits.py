"""Limits of keys over real daemons that share a real Valkey: nobody waits for the engine, and the sum is the limit."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from loaded import new_key
from nodes import Nodes, nodes
from served import Served

pytestmark = pytest.mark.cluster

BODY = b'{"model":"mock-llm","messages":[{"role":"user","content":"Hello"}]}'


def limited(path: Path, *flags: str) -> dict[str, str]:
    """A key with limits, as a header field."""
    return {"Authorization": f"Bearer {new_key(path, 'one', *flags)}"}


def ask(daemon: Served, key: dict[str, str]) -> int:
    """The status of a request that isn't streamed."""
    fields = {"Content-Type": "application/json", "X-Mock-Tokens": "1", **key}
    answer = daemon.request("POST", "/v1/chat/completions", BODY, fields)
    answer.read()
    return answer.status


def storm(n: Nodes, key: dict[str, str], seconds: float) -> dict[str, int]:
    """Ask all nodes at the same time, each as fast as it answers; how many requests each let in."""
    admitted = dict.fromkeys(n.daemons, 0)
    until = time.monotonic() + seconds

    def storm_one(name: str) -> None:
        while time.monotonic() < until:
            admitted[name] += ask(n[name], key) == 200

    threads = [threading.Thread(target=storm_one, args=(name,)) for name in n.daemons]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return admitted


def test_requests_a_minute_are_counted_over_nodes(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    key = limited(path, "--rpm", "120")
    with nodes("--keys-file", str(path), names="abc") as n:
        for daemon in n.daemons.values():
            assert ask(daemon, key) == 200
        n.until(lambda: _fields(n) == 3, "fields of all nodes")
        first = storm(n, key, 10)
        # The bucket and 10 s of refill; beyond it what each node lets in before it hears of the others.
        print(f"a bucket of 120 and 20 of refill: let in {first}, {sum(first.values())} in all")
        assert 130 <= sum(first.values()) <= 3 * 120 + 20
        # All of it was taken off at all nodes: the bucket is paid back, and the next minutes have the rate.
        more = storm(n, key, 10)
        print(f"20 of refill: let in {more}, {sum(more.values())} in all")
        assert sum(more.values()) <= 24


def _fields(n: Nodes) -> int:
    """How many nodes have told what they spent."""
    found: list[bytes] = n.engine.ask("KEYS", "*:k:*")
    return sum(n.engine.ask("HLEN", each.decode()) for each in found)


def test_streams_at_once_are_counted_over_nodes_and_given_back_by_a_dead_one(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    key = limited(path, "--streams-max", "2")
    with nodes("--keys-file", str(path)) as n:

        def opens(name: str) -> bool:
            answer = n[name].request("POST", "/v1/streams", b"{}", key | {"Content-Type": "application/json"})
            opened.append(json.loads(answer.read()).get("id"))
            return answer.status == 201

        def may_open(name: str) -> bool:
            """Whether another stream may be opened; none stays."""
            if not opens(name):
                return False
            return n[name].request("DELETE", f"/v1/streams/{opened[-1]}", headers=key).status == 204

        opened: list[str] = []
        assert opens("b") and opens("a")
        n.until(lambda: not may_open("b"), "word of a's stream")
        n.kill("a")
        n.until(lambda: may_open("b"), "b's right to a's place")
