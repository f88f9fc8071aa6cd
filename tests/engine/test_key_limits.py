"""Limits of keys over nodes that share an engine: what one spends, all take off; nothing is counted twice."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

import hiredis

from streamd.core.auth import Key
from streamd.core.guard import BARE
from streamd.core.limits import Accounts
from streamd.daemon.shared import Shared, create, hash_of
from streamd.engine.connection import EngineLost
from streamd.engine.key_limits import KeyLimits, LimitedKeys

LEASE_S = 10.0


class Hashes:
    """An engine that knows hashes."""

    def __init__(self) -> None:
        self.keys: dict[bytes, dict[bytes, bytes]] = {}
        self.commands: list[bytes] = []

    def execute(self, command: list[bytes]) -> Any:
        name, key, *rest = command
        self.commands.append(name)
        fields = self.keys.setdefault(key, {})
        match name:
            case b"HSET":
                fields[rest[0]] = rest[1]
                return 1
            case b"HDEL":
                return int(fields.pop(rest[0], None) is not None)
            case b"HGETALL":
                return dict(fields)
            case b"PEXPIRE":
                return 1
        raise AssertionError(command)


class Node:
    """A node: its link, its mapping with a worker or two, and what each worker admits."""

    def __init__(self, world: World, name: str, workers: int = 1) -> None:
        self.world = world
        self.link = self
        self.is_up = True
        self.asked: deque[tuple[list[bytes], Any]] = deque()
        fd = create(workers)
        self.workers = [Shared(fd, workers, (), slot) for slot in range(workers)]
        self.accounts = [Accounts() for _ in self.workers]
        self.nodes = 1
        self.limits: list[KeyLimits] = []
        for slot, (shared, accounts) in enumerate(zip(self.workers, self.accounts, strict=True)):
            accounts.board = shared
            shared.beat(world.now)
            limits = KeyLimits(
                LimitedKeys(
                    lambda: world.keys,
                    hash_of,
                    lambda key, accounts=accounts: accounts.of(key).refresh(key, world.now),  # type: ignore[misc]
                    lambda key, levels, accounts=accounts: accounts.of(key).lower(key, levels, world.now),  # type: ignore[misc]
                ),
                shard_of=lambda text: self,  # type: ignore[arg-type,return-value]
                name_of=lambda text: text.encode(),
                member=f"{name}{slot}",
                nodes=lambda: self.nodes,
                guard=BARE,
                time=lambda: world.now,
                soon=lambda call: call(),
                lease_s=LEASE_S,
                shares_alone=True,
            )
            limits.board = shared
            self.limits.append(limits)
            limits.tick(world.now)

    @property
    def has_room(self) -> bool:
        return self.is_up

    def ask(self, command: bytes, on_reply: Any) -> None:
        reader = hiredis.Reader()
        reader.feed(command)
        self.asked.append((reader.gets(), on_reply))
        if not self.world.is_slow:
            self.turn()

    def turn(self) -> None:
        while self.asked:
            command, on_reply = self.asked.popleft()
            on_reply(self.world.engine.execute(command))

    def cut(self) -> None:
        self.is_up = False
        lost = list(self.asked)
        self.asked.clear()
        for _, on_reply in lost:
            on_reply(EngineLost("LOST"))

    def admits(self, key: Key, slot: int = 0) -> bool:
        """A request, counted if it is let in."""
        account = self.accounts[slot].of(key)
        if account.refuse_request(key, self.world.now) is not None:
            return False
        account.count_request()
        return True

    def burst(self, key: Key, slot: int = 0) -> int:
        """As many requests as are let in."""
        return next(count for count in range(10_000) if not self.admits(key, slot))


class World:
    def __init__(self, *limits: dict[str, int]) -> None:
        self.now = 1000.0
        self.engine = Hashes()
        self.is_slow = False
        self.nodes: list[Node] = []
        self.keys = [Key(f"k{n}", f"key {n}", b"", b"", **each) for n, each in enumerate(limits)]  # type: ignore[arg-type]

    def node(self, **more: int) -> Node:
        made = Node(self, f"n{len(self.nodes)}", **more)
        self.nodes.append(made)
        return made

    def pass_s(self, seconds: float) -> None:
        for _ in range(round(seconds * 4)):
            self.now += 0.25
            for node in self.nodes:
                for slot, (limits, shared) in enumerate(zip(node.limits, node.workers, strict=True)):
                    if limits.board is not None:
                        shared.beat(self.now)
                    for each in node.accounts[slot : slot + 1]:
                        each.publish(self.now)
                    limits.tick(self.now)

    def fields(self) -> int:
        return sum(map(len, self.engine.keys.values()))


def test_what_a_node_spends_all_others_take_off() -> None:
    w = World({"requests_per_minute": 60})
    a, b, c = w.node(), w.node(), w.node()
    (key,) = w.keys
    assert b.admits(key) and c.admits(key)
    w.pass_s(2)
    spent = a.burst(key)
    assert 58 <= spent <= 60
    w.pass_s(1)
    assert b.burst(key) + c.burst(key) <= 4


@pytest.mark.parametrize("seed", range(2))
def test_over_minutes_the_sum_is_the_limit(seed: int) -> None:
    """Random nodes are stormed; what they let in together stays within the limit, the bucket, and the overshoot."""
    rng = random.Random(seed)
    w = World({"requests_per_minute": 120})
    nodes = [w.node() for _ in range(3)]
    (key,) = w.keys
    admitted = 0
    minutes = 4
    for _ in range(minutes * 240):
        for node in nodes:
            if rng.random() < 0.7:
                admitted += sum(node.admits(key) for _ in range(rng.randrange(6)))
        w.pass_s(0.25)
        if rng.random() < 0.01:
            w.engine.keys.clear()
    assert 120 * minutes - 20 <= admitted <= 120 * (minutes + 1) + 40, "each node has a bucket; the rest is the rate"


def test_an_emptied_engine_changes_nothing_and_is_filled_again() -> None:
    w = World({"requests_per_minute": 60})
    a, b = w.node(), w.node()
    (key,) = w.keys
    assert a.admits(key) and b.admits(key)
    w.pass_s(2)
    assert a.burst(key) > 50
    w.pass_s(1)
    for _ in range(3):
        w.engine.keys.clear()
        w.pass_s(1)
        assert b.burst(key) <= 2, "neither given back nor counted twice"
        assert w.fields() == 2
    before = a.accounts[0].usage(key, w.now).requests_left
    assert before is not None and before > -10, "counted once"


def test_a_lost_reply_is_repeated_without_harm() -> None:
    w = World({"requests_per_minute": 60})
    a, b = w.node(), w.node()
    (key,) = w.keys
    assert a.admits(key) and b.admits(key)
    w.pass_s(2)
    for _ in range(10):
        assert a.admits(key)
    w.is_slow = True
    w.pass_s(0.25)
    for command, _ in a.asked:
        w.engine.execute(command)
    a.cut()
    b.turn()
    w.is_slow, a.is_up = False, True
    w.pass_s(2)
    left = b.accounts[0].usage(key, w.now).requests_left
    assert left is not None and 50 <= left <= 53


def test_a_node_that_restarts_gives_nothing_back_and_its_field_goes() -> None:
    w = World({"requests_per_minute": 60})
    a, b = w.node(), w.node()
    (key,) = w.keys
    assert b.admits(key) and a.admits(key)
    w.pass_s(2)
    assert a.burst(key) > 50
    w.pass_s(1)
    a.cut()
    w.nodes.remove(a)
    a = w.node()
    assert b.burst(key) <= 2
    assert a.admits(key), "a new process doesn't know yet"
    w.pass_s(2.5)
    assert a.burst(key) <= 5, "it has learned the level of those who were there"
    for _ in range(300):
        b.admits(key)
        w.pass_s(1)
    assert w.fields() == 1, "those of the process that died, and of the one that is idle, are gone"


def test_tokens_of_others_are_paid_as_they_come_and_not_in_a_lump() -> None:
    w = World({"tokens_per_minute": 600})
    a, b = w.node(), w.node()
    (key,) = w.keys
    account = a.accounts[0].of(key)
    assert b.accounts[0].of(key).refuse_request(key, w.now) is None
    b.accounts[0].of(key).count_tokens(1)
    w.pass_s(2)
    for _ in range(300):  # five minutes at the rate
        account.count_tokens(10)
        w.pass_s(1)
    left = b.accounts[0].usage(key, w.now).tokens_left
    assert left is not None and left > 500
    assert b.admits(key)
    account.count_tokens(3000)
    w.pass_s(6)
    assert not b.admits(key)


def test_streams_at_once_are_counted_over_nodes_and_end_with_their_node() -> None:
    w = World({"streams_max": 3})
    a, b = w.node(), w.node()
    (key,) = w.keys
    at_a, at_b = a.accounts[0].of(key), b.accounts[0].of(key)
    assert at_b.open_stream(key) is None and at_a.open_stream(key) is None
    w.pass_s(1)
    assert at_a.open_stream(key) is None
    w.pass_s(1)
    assert at_b.open_stream(key) is not None and at_a.open_stream(key) is not None
    at_a.close_stream()
    w.pass_s(0.5)
    assert at_b.open_stream(key) is None, "given back within a tick"
    w.pass_s(60)
    assert at_b.open_stream(key) is not None, "a long stream stays counted"
    w.nodes.remove(a)
    w.pass_s(LEASE_S - 2)
    assert at_b.open_stream(key) is not None
    w.pass_s(4)
    assert at_b.open_stream(key) is None, "the node is dead"


def test_a_node_that_stops_in_order_gives_its_streams_back_at_once() -> None:
    w = World({"streams_max": 1})
    a, b = w.node(), w.node()
    (key,) = w.keys
    assert b.accounts[0].of(key).open_stream(key) is None
    w.pass_s(1)
    b.accounts[0].of(key).close_stream()
    w.pass_s(1)
    assert a.accounts[0].of(key).open_stream(key) is None
    w.pass_s(1)
    assert b.accounts[0].of(key).open_stream(key) is not None
    a.limits[0].stop()
    w.nodes.remove(a)
    w.pass_s(1.25)
    assert b.accounts[0].of(key).open_stream(key) is None


def test_nodes_that_cannot_ask_each_other_have_a_share_each() -> None:
    w = World({"requests_per_minute": 60, "streams_max": 4})
    a, b = w.node(), w.node()
    (key,) = w.keys
    a.nodes = b.nodes = 2
    assert a.admits(key) and b.admits(key)
    w.pass_s(2)
    for node in (a, b):
        node.cut()
    for _ in range(int(LEASE_S) + 2):
        a.admits(key)
        w.pass_s(1)
    assert a.accounts[0].of(key).refresh(key, w.now).requests == pytest.approx(30, abs=2)
    a.burst(key)
    w.pass_s(10)
    assert a.burst(key) in (4, 5, 6), "half of the rate"
    account = a.accounts[0].of(key)
    assert [account.open_stream(key) is None for _ in range(3)] == [True, True, False]
    refusal = account.open_stream(key)
    assert refusal is not None and "4 streams at once" in refusal.message and "1/2" in refusal.message
    for node in (a, b):
        node.is_up = True
    w.pass_s(1)
    assert account.open_stream(key) is None


def test_one_worker_speaks_for_its_node_and_another_takes_over() -> None:
    w = World({"requests_per_minute": 60})
    a, b = w.node(workers=2), w.node()
    (key,) = w.keys
    assert a.admits(key, 1) and b.admits(key)
    w.pass_s(2)
    assert w.fields() == 2
    for _ in range(20):
        assert a.admits(key, 1)
    w.pass_s(1)
    left = b.accounts[0].usage(key, w.now).requests_left
    assert left is not None and 38 <= left <= 41
    a.limits[0].stop()  # its beat ends
    w.pass_s(3)
    for _ in range(10):
        assert a.admits(key, 1)
    w.pass_s(1)
    now_left = b.accounts[0].usage(key, w.now).requests_left
    assert now_left is not None and now_left in (left - 10 + 4, left - 10 + 5), "counted on, not anew"
    assert b.burst(key) <= now_left + 1
    w.pass_s(1)
    assert a.burst(key, 1) <= 3


def test_a_worker_that_takes_over_gives_nothing_back() -> None:
    w = World({"requests_per_minute": 60})
    a, b = w.node(workers=2), w.node()
    (key,) = w.keys
    assert a.admits(key, 1) and b.admits(key)
    w.pass_s(2)
    assert b.burst(key) > 50
    w.pass_s(1)
    a.limits[0].stop()
    w.nodes.remove(b)  # it tells its level no more
    w.pass_s(3)
    assert a.admits(key, 1)
    w.pass_s(2)
    assert a.burst(key, 1) < 15


def test_what_was_spent_long_ago_is_history() -> None:
    w = World({"requests_per_minute": 60})
    a = w.node()
    (key,) = w.keys
    for _ in range(150):
        assert a.admits(key)
        w.pass_s(2)
    b = w.node()
    assert b.admits(key)
    w.pass_s(2)
    assert b.burst(key) > 50


def test_counts_are_shown_by_node_and_the_rest_over_all() -> None:
    w = World({"requests_per_minute": 60})
    a, b = w.node(), w.node()
    (key,) = w.keys
    assert b.admits(key)
    w.pass_s(2)
    assert sum(a.admits(key) for _ in range(20)) == 20
    w.pass_s(1)
    usage = b.accounts[0].usage(key, w.now)
    assert usage.requests_total == 1 and usage.requests_left is not None and usage.requests_left < 42


def test_keys_without_limits_and_keys_that_nobody_uses_cost_no_command() -> None:
    w = World({}, {"requests_per_minute": 60})
    a = w.node()
    free, limited = w.keys
    w.pass_s(10)
    assert a.admits(free)
    w.pass_s(10)
    assert w.engine.commands == []
    assert a.admits(limited)
    w.pass_s(1)
    assert set(w.engine.commands) == {b"HSET", b"HGETALL", b"PEXPIRE"}
    w.pass_s(200)
    w.engine.commands.clear()
    w.pass_s(60)
    assert w.engine.commands == [] and w.fields() == 0


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"1", b"[1,2]", b"[1,2,-1,4,null,null]", b"[1e99,2,3,4,null,null]", b"x" * 999]
)
def test_a_field_that_no_node_writes_is_passed_over(text: bytes) -> None:
    w = World({"requests_per_minute": 60})
    a = w.node()
    (key,) = w.keys
    assert a.admits(key)
    w.pass_s(2)
    w.engine.keys[next(iter(w.engine.keys))][b"1.x"] = text
    w.pass_s(2)
    assert a.burst(key) >= 58
