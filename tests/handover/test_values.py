"""Kinds of values: what each writes it reads, and it takes nothing else, from an object or from a record."""

from __future__ import annotations

import math
from typing import Any

import orjson
import pytest

from streamd.handover.values import (
    SECONDS_MAX,
    Blobs,
    Bytes,
    Flag,
    Many,
    Mask,
    Maybe,
    RecordError,
    Seconds,
    Text,
    TupleOf,
    Value,
    WholeNumber,
    Word,
)
from streamd.wire.sse import Edge


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Flag(), [True, False]),
        (WholeNumber(-1, 5), [-1, 0, 5]),
        (Text(3), ["", "äöü", "\0"]),
        (Seconds(), [0.0, -1.5, SECONDS_MAX]),
        (Seconds(or_never=True), [1.0, math.inf]),
        (Bytes(4), [b"", b"\0\xff\n{"]),
        (Mask(1024), [0, 1, 1 << 1023]),
        (Word(Edge), list(Edge)),
        (Maybe(Bytes(4)), [None, b"", b"abcd"]),
        (Many(TupleOf(WholeNumber(), Bytes(4)), 2), [(), ((1, b"a"), (2, b"b"))]),
    ],
)
def test_a_value_is_read_as_it_was_written(kind: Value, values: list[Any]) -> None:
    for value in values:
        blobs: list[bytes] = []
        json = orjson.loads(orjson.dumps(kind.put(value, blobs, 1)))
        reading = Blobs(blobs)
        again = kind.get(json, reading, 1)
        assert again == value and type(again) is type(value) and reading.are_used


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Flag(), [1, None, "true"]),
        (WholeNumber(-1, 5), [-2, 6, True, 1.0, None]),
        (Text(3), ["abcd", b"abc", None, "\ud800"]),
        (Text(3, str.isascii), ["ä"]),
        (Seconds(), [math.nan, math.inf, 2 * SECONDS_MAX, True, "1", None]),
        (Seconds(or_never=True), [-math.inf, math.nan]),
        (Bytes(4), [b"abcde", bytearray(b"a"), "a", None]),
        (Mask(8), [256, -1, "1", None]),
        (Word(Edge), ["plain", None, 1]),
        (Maybe(Flag()), [0]),
        (Many(Flag(), 1), [(True, True), [True], None, (1,)]),
        (TupleOf(Flag(), Flag()), [(True,), [True, True], (True, True, True), (True, 1)]),
    ],
)
def test_what_is_of_another_kind_is_not_written(kind: Value, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(RecordError):
            kind.put(value, [], 1)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (Flag(), [0, "x", None, []]),
        (WholeNumber(0, 5), [-1, 6, 1.0, True, "1", None]),
        (Text(3), ["abcd", 1, None]),
        (Seconds(), [None, "1", True, 1e300]),
        (Bytes(4), [1, -1, None, True, "0", 0.0]),
        (Mask(8), ["100", "", "0x1", "FF", "01", "-1", " 1", 255, "f" * 1000]),
        (Word(Edge), ["other", None, 1, []]),
        (Many(Flag(), 1), [{}, "t", None, [True, True]]),
        (TupleOf(Flag(), Flag()), [[True], [True, True, True], {}, "ab"]),
    ],
)
def test_what_is_of_another_kind_is_not_read(kind: Value, given: list[Any]) -> None:
    for each in given:
        with pytest.raises(RecordError):
            kind.get(each, Blobs([b"x"]), 1)


def test_bytes_are_used_once_and_in_their_order() -> None:
    pair = TupleOf(Bytes(4), Bytes(4))
    assert pair.get([0, 1], Blobs([b"a", b"b"]), 1) == (b"a", b"b")
    for order in ([0, 0], [1, 0], [0, 2]):
        with pytest.raises(RecordError):
            pair.get(order, Blobs([b"a", b"b"]), 1)
    with pytest.raises(RecordError, match="5 bytes where at most 4"):
        Bytes(4).get(0, Blobs([b"abcde"]), 1)
