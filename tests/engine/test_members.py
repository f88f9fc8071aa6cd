"""Members: they are lost when their signs of life stop, by this process's own clock, and by nothing else."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

import hiredis

from streamd.engine.connection import EngineError
from streamd.engine.link import LinkState
from streamd.engine.members import Members, Sign


class Seat:
    """A server with the hash of all members."""

    def __init__(self) -> None:
        self.link = self
        self.state = LinkState.UP
        self.has_room = True
        self.times_up = 1
        self.is_late = False  # replies don't come yet
        self.is_full = False
        self.fields: dict[bytes, bytes] = {}
        self.commands: list[bytes] = []

    def ask(self, command: bytes, on_reply: Any) -> None:
        reader = hiredis.Reader()
        reader.feed(command)
        name, _, *rest = reader.gets()
        self.commands.append(name)
        if self.is_late:
            return
        match name:
            case b"HSET" if self.is_full:
                on_reply(EngineError("OOM command not allowed when used memory > 'maxmemory'."))
            case b"HSET":
                is_new = rest[0] not in self.fields
                self.fields[rest[0]] = rest[1]
                on_reply(int(is_new))
            case b"HGET":
                on_reply(self.fields.get(rest[0]))
            case b"HGETALL":
                on_reply(dict(self.fields))
            case b"HMGET":
                on_reply([self.fields.get(name) for name in rest])
            case b"HDEL":
                self.fields.pop(rest[0], None)
                on_reply(1)


class Rig:
    def __init__(self) -> None:
        self.now = 1000.0
        self.said: list[tuple[str, str, dict[str, Any]]] = []
        self.seat = Seat()
        self.keys = "k1"
        self.members = Members(
            [self.seat],  # type: ignore[list-item]
            b"sd:m",
            "Aaaaa",
            node="a",
            fingerprint=lambda: self.keys,
            time=lambda: self.now,
            say=lambda level, name, **fields: self.said.append((level, name, fields)),
            lease_s=10.0,
            forget_s=3600.0,
        )
        self.beats = 0

    def beat(self, **changes: object) -> None:
        """The other member's sign of life."""
        self.beats += 1
        facts = {"beat": self.beats, "node": "b", "state": "up", "keys": "k1"} | changes
        self.seat.fields[b"Abbbb"] = orjson.dumps(facts)

    def go_on(self, seconds: float, *, beats: bool) -> bool:
        """Time passes; whether the other member is lost at its end."""
        lost = False
        for second in range(int(seconds * 4)):
            self.now += 0.25
            if beats and second % 8 == 0:
                self.beat()
            self.members.tick(self.now)
            lost = self.members.is_lost(self.seat, "Abbbb")  # type: ignore[arg-type]
        return lost


def test_a_member_that_beats_is_never_lost_and_one_that_stops_is_after_the_lease() -> None:
    rig = Rig()
    assert not rig.go_on(40, beats=True)
    assert not rig.go_on(7, beats=False)
    assert rig.go_on(5, beats=False)
    assert not rig.go_on(3, beats=True), "it lives after all"


def test_a_member_without_a_field_is_unknown_for_the_lease() -> None:
    rig = Rig()
    assert not rig.go_on(19, beats=False)
    assert rig.go_on(3, beats=False)


def test_a_member_that_says_that_it_stopped_is_lost_at_once() -> None:
    rig = Rig()
    rig.go_on(12, beats=True)
    rig.beat(state="stopped")
    assert rig.go_on(2, beats=False)


def test_a_process_that_was_cut_off_itself_judges_no_member() -> None:
    rig = Rig()
    rig.go_on(12, beats=True)
    rig.seat.state = LinkState.DOWN
    assert not rig.go_on(60, beats=False)
    rig.seat.state = LinkState.UP
    assert not rig.go_on(9, beats=False)
    assert rig.go_on(12, beats=False)


def test_a_link_that_was_lost_between_two_ticks_was_disturbed_too() -> None:
    rig = Rig()
    rig.go_on(12, beats=True)
    rig.go_on(8, beats=False)
    rig.members.up(rig.seat)  # type: ignore[arg-type]
    assert not rig.go_on(8, beats=False)
    assert rig.go_on(14, beats=False)


def test_a_full_engine_takes_no_signs_of_life_and_so_shows_no_deaths() -> None:
    rig = Rig()
    rig.go_on(12, beats=True)
    rig.seat.is_full = True
    assert not rig.go_on(60, beats=False)
    rig.seat.is_full = False
    assert not rig.go_on(7, beats=False)
    assert rig.go_on(14, beats=False)


def test_copies_may_be_missing_in_a_server_that_came_back_or_is_full_and_in_no_other() -> None:
    rig = Rig()
    rig.members.up(rig.seat)  # type: ignore[arg-type]
    assert not rig.members.may_lack_copies(rig.seat), "the first time"  # type: ignore[arg-type]
    rig.seat.times_up = 2
    rig.members.up(rig.seat)  # type: ignore[arg-type]
    assert rig.members.may_lack_copies(rig.seat)  # type: ignore[arg-type]
    rig.go_on(11, beats=True)
    assert not rig.members.may_lack_copies(rig.seat)  # type: ignore[arg-type]
    rig.seat.is_full = True
    rig.go_on(3, beats=True)
    assert rig.members.may_lack_copies(rig.seat)  # type: ignore[arg-type]


def sign_of(rig: Rig, member: str = "Abbbb") -> Sign:
    signs: list[Sign] = []
    rig.members.ask_for_sign(rig.seat, member, signs.append)  # type: ignore[arg-type]
    (sign,) = signs
    return sign


def test_a_member_lives_if_it_gave_a_sign_since_it_was_looked_at() -> None:
    rig = Rig()
    rig.go_on(12, beats=True)
    rig.now += 30
    rig.beat()
    assert sign_of(rig) is Sign.SILENT, "it may have died since that sign"
    rig.beat()
    rig.now += 2
    assert sign_of(rig) is Sign.LIVES
    rig.now += 9
    assert sign_of(rig) is Sign.SILENT
    rig.now += 1
    assert sign_of(rig) is Sign.LOST
    rig.beat(state="stopped")
    assert sign_of(rig) is Sign.LOST
    assert sign_of(rig, "Acccc") is Sign.UNKNOWN


def test_a_process_that_was_cut_off_itself_says_of_none_that_it_is_lost() -> None:
    rig = Rig()
    rig.go_on(12, beats=True)
    sign_of(rig)
    rig.now += 20
    rig.members.up(rig.seat)  # type: ignore[arg-type]
    assert sign_of(rig) is Sign.SILENT
    rig.seat.has_room = False
    assert sign_of(rig) is Sign.UNSURE


def test_an_engine_that_lost_this_members_field_tells_nothing_of_others() -> None:
    """FLUSHALL, or an eviction: no connection ends, and the owners have still to write."""
    rig = Rig()
    rig.go_on(12, beats=True)
    rig.seat.fields.clear()
    assert sign_of(rig) is Sign.UNSURE
    assert rig.members.may_lack_copies(rig.seat)  # type: ignore[arg-type]
    rig.go_on(3, beats=False)
    assert sign_of(rig) is Sign.UNSURE, "others have still to give a sign"
    rig.go_on(12, beats=False)
    assert sign_of(rig) is Sign.UNKNOWN


def test_a_sign_of_life_that_finds_its_field_gone_shows_that_copies_are_missing() -> None:
    rig = Rig()
    rig.go_on(12, beats=True)
    assert not rig.members.may_lack_copies(rig.seat)  # type: ignore[arg-type]
    rig.seat.fields.clear()
    rig.go_on(3, beats=True)
    assert rig.members.may_lack_copies(rig.seat)  # type: ignore[arg-type]


def test_a_copy_of_ones_own_that_is_gone_shows_that_others_may_be_missing() -> None:
    rig = Rig()
    rig.members.lacks_copies(rig.seat)  # type: ignore[arg-type]
    assert rig.members.may_lack_copies(rig.seat)  # type: ignore[arg-type]


def test_an_old_look_says_nothing() -> None:
    rig = Rig()
    rig.beat()
    rig.members.tick(rig.now)
    rig.members.is_lost(rig.seat, "Abbbb")  # type: ignore[arg-type]
    rig.now += 300.0
    rig.seat.is_late = True
    assert not rig.members.is_lost(rig.seat, "Abbbb")  # type: ignore[arg-type]


def test_other_keys_are_told_once_with_the_nodes_name() -> None:
    rig = Rig()
    rig.beat(keys="k2")
    for _ in range(3):
        rig.now += 61.0
        rig.members.tick(rig.now)
        rig.beat(keys="k2")
    assert [(level, fields["node"]) for level, _, fields in rig.said] == [("warning", "b")]
    assert {facts.node for facts in rig.members.shown().values()} == {"a", "b"}


def test_fields_of_members_long_gone_are_removed() -> None:
    rig = Rig()
    rig.beat()
    for _ in range(70):
        rig.now += 61.0
        rig.members.tick(rig.now)
    assert rig.seat.fields.keys() == {b"Aaaaa"}


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b"1", b'{"node":1,"state":"up","keys":"k"}', b"x" * 2000])
def test_a_field_that_no_member_writes_is_passed_over(value: bytes) -> None:
    rig = Rig()
    rig.seat.fields[b"Abbbb"] = value
    rig.seat.fields[b"\xff"] = value
    rig.now += 61.0
    rig.members.tick(rig.now)
    assert rig.members.shown().keys() == {"Aaaaa"}
