"""Entries of a copy: written as they are read, and refused where no owner writes them so."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.engine.entry import End, Entry, NewerVersion, Position, fields_of, parse, position_of


def reply(entry_id: bytes, fields: list[bytes | str | int]) -> Any:
    """An entry as the engine returns it."""
    return [entry_id, [each if isinstance(each, bytes) else str(each).encode() for each in fields]]


END = End("complete", True)


def test_an_entry_is_read_as_it_was_written() -> None:
    start = fields_of(record=b"r", starts_over=True, facts=b"{}", end=END, raised_by="m1", last_seq=7)
    assert parse(reply(b"3-0", start)) == Entry(Position(3, 0), b"r", True, b"{}", END, "", "m1", 7)
    assert parse(reply(b"3-9", fields_of(record=b"r"))) == Entry(Position(3, 9), b"r", False, b"", None, "", "", 9)
    alone = parse(reply(b"4-0", fields_of(end=END, raised_by="m1", last_seq=9)))
    assert (alone.end, alone.record, alone.starts_over) == (END, b"", False)
    assert parse([b"5-0", [b"w", b"m2", b"n", b"9", b"t", b"m2"]]).taken_by == "m2"


def test_a_field_of_a_later_version_is_passed_over_unless_it_has_to_be_understood() -> None:
    known = [b"d", b"r"]
    assert parse([b"3-9", [*known, b"x", b"1"]]) == parse([b"3-9", known])
    with pytest.raises(NewerVersion):
        parse([b"3-9", [*known, b"X", b"1"]])


def test_positions_are_in_the_order_of_the_engines_ids() -> None:
    ids = [b"1-0", b"1-2", b"1-10", b"2-0", b"10-1"]
    assert sorted(map(position_of, ids)) == [position_of(each) for each in ids]
    assert [str(position_of(each)).encode() for each in ids] == ids


RAISED = [b"w", b"m1", b"n", b"3"]
REFUSED = {
    "a delta without a position": [b"1-0", [b"d", b"r"]],
    "a delta at a raised fence": [b"1-0", [*RAISED, b"d", b"r"]],
    "a start over at a seq": [b"1-3", [b"s", b"r"]],
    "a writer at a seq": [b"1-3", [*RAISED, b"d", b"r"]],
    "a fence without its writer": [b"1-0", [b"n", b"3", b"s", b"r"]],
    "a fence without its place": [b"1-0", [b"w", b"m1", b"s", b"r"]],
    "a place that is no number": [b"1-0", [b"w", b"m1", b"n", b"-3"]],
    "a long place": [b"1-0", [b"w", b"m1", b"n", b"9" * 17]],
    "a long member": [b"1-0", [b"w", b"m" * 65, b"n", b"3"]],
    "none of the known fields": [b"1-3", [b"x", b"r"]],
    "a field of a newer version": [b"1-3", [b"d", b"r", b"X", b""]],
    "a field twice": [b"1-3", [b"d", b"r", b"d", b"r"]],
    "half a field": [b"1-3", [b"d"]],
    "an end that is no JSON": [b"1-3", [b"e", b"{"]],
    "an end without a reason": [b"1-3", [b"e", b'{"clean":true}']],
    "an end that is a list": [b"1-3", [b"e", b"[]"]],
    "an id without a fence": [b"13", [b"d", b"r"]],
    "an id with a zero in front": [b"01-3", [b"d", b"r"]],
    "an id beyond all numbers": [b"1-99999999999999999", [b"d", b"r"]],
    "an id that is a number": [1, [b"d", b"r"]],
    "a value that is a number": [b"1-3", [b"d", 1]],
    "no list": b"1-3",
    "no entry": [],
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_entry_that_no_owner_writes_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        parse(REFUSED[name])


@given(st.recursive(st.none() | st.integers() | st.binary(max_size=8), st.lists, max_leaves=12))
def test_no_reply_breaks_the_reader_of_entries(value: Any) -> None:
    for form in (value, [b"1-3", value], [value, [b"d", b"r"]]):
        try:
            assert isinstance(parse(form), Entry)
        except ValueError:
            continue
