"""Records: versions, unknown names, defaults, and any other bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.handover.record import (
    REQUIRED,
    VERSION,
    AnyOf,
    Fact,
    RecordKind,
    agreed_version,
    pack,
    readable_versions,
    unpack,
)
from streamd.handover.values import Bytes, Flag, Many, RecordError, Text, WholeNumber


class Lamp(NamedTuple):
    is_on: bool
    wire: bytes


@dataclass(frozen=True)
class House:
    name: str
    lamps: tuple[Lamp, ...]
    floors: int = 1


LAMP = RecordKind("lamp", Lamp, {"is_on": Flag(), "wire": Bytes(100)})
OLD = RecordKind("house", House, {"name": Text(20), "lamps": Many(LAMP), "floors": Fact(WholeNumber(), default=1)})
# The same kind in the version after, in which a house has floors.
NEW = RecordKind("house", House, {"name": Text(20), "lamps": Many(LAMP), "floors": Fact(WholeNumber(), 2, 1)})

HOME = House("home", (Lamp(True, b"\0\xff"), Lamp(False, b"")))


def record(version: int, facts: object, *blobs: bytes) -> bytes:
    pieces = [facts if isinstance(facts, bytes) else orjson.dumps(facts), *blobs]
    return bytes((version,)) + b"".join(len(piece).to_bytes(4, "big") + piece for piece in pieces)


def test_a_state_is_read_as_it_was_written() -> None:
    assert unpack(OLD, pack(OLD, HOME)) == HOME
    assert unpack(LAMP, pack(LAMP, HOME.lamps[0])) == HOME.lamps[0]


def test_a_release_reads_and_writes_its_own_version_and_the_one_before() -> None:
    assert readable_versions(1) == (1,) and readable_versions(2) == (2, 1) and readable_versions(9) == (9, 8)
    assert readable_versions() == readable_versions(VERSION)
    assert unpack(NEW, pack(NEW, HOME, 2), newest=2) == unpack(NEW, pack(NEW, HOME, 1), newest=2) == HOME
    for version in (0, 3, 4, 255):
        with pytest.raises(RecordError, match="doesn't read"):
            unpack(NEW, record(version, {}), newest=2)


@pytest.mark.parametrize(
    ("others", "newest", "expected"),
    [((1,), 1, 1), ((2, 1), 1, 1), ((1,), 2, 1), ((2, 1), 2, 2), ((3, 2), 2, 2), ((3, 2), 1, None), ((), 1, None)],
)
def test_the_giver_writes_the_newest_version_that_both_sides_know(
    others: tuple[int, ...], newest: int, expected: int | None
) -> None:
    assert agreed_version(others, newest) == expected


def test_a_roll_back_moves_what_the_version_before_can_say_and_refuses_the_rest() -> None:
    wire = pack(NEW, HOME, 1)
    assert b"floors" not in wire and unpack(OLD, wire) == HOME
    with pytest.raises(RecordError, match=r"house\.floors can't be told in version 1"):
        pack(NEW, House("tower", (), 9), 1)
    assert unpack(NEW, pack(NEW, House("tower", (), 9), 2), newest=2).floors == 9


def test_a_name_that_the_reader_does_not_know_refuses_the_record() -> None:
    facts = {"kind": "lamp", "is_on": True, "wire": 0}
    assert unpack(LAMP, record(1, facts, b"w")) == Lamp(True, b"w")
    with pytest.raises(RecordError, match="doesn't know: colour"):
        unpack(LAMP, record(1, facts | {"colour": "red"}, b"w"))
    with pytest.raises(RecordError, match="doesn't know: floors"):  # a name of the next version is unknown in this one
        unpack(NEW, record(1, {"kind": "house", "name": "a", "lamps": [], "floors": 2}), newest=2)


def test_a_fact_that_is_missing_has_its_default_or_refuses_the_record() -> None:
    assert unpack(NEW, record(2, {"kind": "house", "name": "a", "lamps": []}), newest=2) == House("a", ())
    with pytest.raises(RecordError, match=r"lamp\.wire is missing"):
        unpack(LAMP, record(1, {"kind": "lamp", "is_on": True}))


def test_a_kind_has_every_field_of_its_state_and_a_default_for_each_later_fact() -> None:
    with pytest.raises(AssertionError, match="wire"):
        RecordKind("lamp", Lamp, {"is_on": Flag()})
    with pytest.raises(AssertionError):
        RecordKind("lamp", Lamp, {"is_on": Flag(), "wire": Fact(Bytes(1), since=2, default=REQUIRED)})


def test_a_state_of_another_class_is_not_written() -> None:
    either = AnyOf(LAMP, OLD)
    assert [unpack(either, pack(either, each)) for each in (HOME, HOME.lamps[0])] == [HOME, HOME.lamps[0]]
    for kind in (LAMP, either):
        with pytest.raises(RecordError, match="object"):
            pack(kind, object())


LIGHT = {"kind": "lamp", "is_on": True, "wire": 0}


@pytest.mark.parametrize(
    "wire",
    [
        b"",
        b"\1",
        b"\1\0\0\0",
        b"\1\0\0\0\1",
        b"\1\xff\xff\xff\xff{}",
        record(1, b"{"),
        record(1, b'{"kind":"lamp","kind":"lamp"}'),
        record(1, []),
        record(1, None),
        record(1, {"kind": ["lamp"]}),
        record(1, LIGHT | {"kind": "house"}, b"w"),
        record(1, LIGHT | {"is_on": 1}, b"w"),
        record(1, LIGHT),
        record(1, LIGHT, b"w", b"more"),
        record(1, LIGHT, b"w" * 101),
        record(1, LIGHT, b"w") + b"\0",
        record(1, LIGHT, b"w")[:-1],
        record(1, b"[" * 100_000),
    ],
)
def test_other_bytes_are_refused(wire: bytes) -> None:
    for kind in (LAMP, AnyOf(LAMP, OLD)):
        with pytest.raises(RecordError):
            unpack(kind, wire)


@given(st.binary(max_size=60), st.integers(0, 59), st.integers(0, 255))
def test_a_damaged_record_is_refused_or_is_another_state(bytes_of_wire: bytes, at: int, byte: int) -> None:
    wire = bytearray(pack(LAMP, Lamp(True, bytes_of_wire)))
    wire[at % len(wire)] = byte
    try:
        found = unpack(LAMP, bytes(wire))
    except RecordError:
        return
    assert type(found) is Lamp and type(found.is_on) is bool and unpack(LAMP, pack(LAMP, found)) == found
