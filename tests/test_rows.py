"""Units and kinds: the values that a row accepts and refuses, and written values that read back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.rows import (
    WORD_S,
    Kind,
    Refused,
    Row,
    format_bytes,
    format_duration,
    parse_bytes,
    parse_duration,
)


@pytest.mark.parametrize(
    ("raw", "seconds"),
    [
        ("30s", 30.0),
        ("500ms", 0.5),
        ("2m", 120.0),
        ("1h", 3600.0),
        ("1.5 s", 1.5),
        ("0", 0.0),
        ("45", 45.0),
        (" 7s ", 7.0),
        (5, 5.0),
        (0.25, 0.25),
        ("100MS", 0.1),
    ],
)
def test_a_duration_is_parsed_in_every_unit(raw: object, seconds: float) -> None:
    assert parse_duration(raw) == seconds


@pytest.mark.parametrize(
    ("raw", "size"),
    [
        ("16KiB", 16384),
        ("1MiB", 1048576),
        ("1GiB", 1073741824),
        ("64kB", 64000),
        ("2MB", 2_000_000),
        ("1.5KiB", 1536),
        ("100B", 100),
        ("7", 7),
        (4096, 4096),
        (4096.0, 4096),
        ("1 GB", 10**9),
    ],
)
def test_a_size_is_parsed_in_every_unit(raw: object, size: int) -> None:
    assert parse_bytes(raw) == size


@pytest.mark.parametrize(
    "raw",
    [
        "",
        "s",
        "-1s",
        "1d",
        "1e3",
        "1_000",
        "1s 2s",
        "0x10",
        "١s",
        "NaN",
        "inf",
        True,
        None,
        [],
        -1,
        math.inf,
        math.nan,
        10**400,
        1e300,
    ],
)
def test_a_value_that_is_no_duration_is_refused(raw: object) -> None:
    with pytest.raises(Refused):
        parse_duration(raw)


@pytest.mark.parametrize(
    "raw", ["1K", "1M", "16 Ki", "1s", "0.5", "1.0000001KiB", 1.5, False, {}, "-1", "9" * 40, 10**400]
)
def test_a_value_that_is_no_size_is_refused(raw: object) -> None:
    with pytest.raises(Refused):
        parse_bytes(raw)


@given(st.integers(0, 10**9))
def test_a_written_size_reads_back(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == size


@given(st.integers(0, 10**6), st.sampled_from([1.0, 0.001, 60.0]))
def test_a_written_duration_reads_back(number: int, unit_s: float) -> None:
    seconds = round(number * unit_s, 3)
    assert parse_duration(format_duration(seconds)) == seconds


def _row(kind: Kind, **more: object) -> Row:
    return Row(kind, "Section", "What", "why", "", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "raw", "value"),
    [
        (_row(Kind.COUNT, low=1, high=8), "3", 3),
        (_row(Kind.COUNT, low=1, high=8), 8, 8),
        (_row(Kind.COUNT, low=5, high=8, zero="off"), 0, 0),
        (_row(Kind.RATIO, low=0, high=1), "0.25", 0.25),
        (_row(Kind.RATIO, low=0, high=1), 0.5, 0.5),
        (_row(Kind.RATIO, low=0, high=1), 1, 1.0),
        (_row(Kind.DURATION, low=5, high=8, zero="off"), "0", 0.0),
        (_row(Kind.DURATION, low=0, high=8, words=("auto",)), "auto", WORD_S),
        (_row(Kind.DURATION, low=0, high=8, words=("auto",)), "50ms", 0.05),
        (_row(Kind.BYTES, low=5, high=8), "8B", 8),
        (_row(Kind.WORD, words=("a", "b")), "b", "b"),
        (_row(Kind.TEXT), "é", "é"),
        (_row(Kind.FLAG), True, True),
        (_row(Kind.FLAG), "Yes", True),
        (_row(Kind.FLAG), "0", False),
        (_row(Kind.LIST), ["x"], ("x",)),
        (_row(Kind.LIST), [], ()),
        (_row(Kind.TABLE), {"x": "y"}, {"x": "y"}),
    ],
)
def test_each_kind_of_row_accepts_its_values(row: Row, raw: object, value: object) -> None:
    taken = row.parse(raw)
    assert taken == value
    assert type(taken) is type(value)


@pytest.mark.parametrize(
    ("row", "raw", "allowed"),
    [
        (_row(Kind.COUNT, low=1, high=8), 9, "a whole number from 1 to 8"),
        (_row(Kind.COUNT, low=1, high=8), 0, "a whole number from 1 to 8"),
        (_row(Kind.COUNT, low=1, high=8), True, "a whole number"),
        (_row(Kind.COUNT, low=1, high=8), 2.0, "a whole number"),
        (_row(Kind.COUNT, low=1, high=8), "auto", "a whole number"),
        (
            _row(Kind.COUNT, low=2, high=8, zero="off", words=("auto",)),
            1,
            "a whole number from 2 to 8, or 0 (off), or auto",
        ),
        (_row(Kind.RATIO, low=0, high=1), 1.1, "a number from 0 to 1"),
        (_row(Kind.RATIO, low=0, high=1), "-0.1", "a number from 0 to 1"),
        (_row(Kind.RATIO, low=0, high=1), "1e-3", "a number from 0 to 1"),
        (_row(Kind.RATIO, low=0, high=1), True, "a number from 0 to 1"),
        (_row(Kind.RATIO, low=0, high=1), math.nan, "a number from 0 to 1"),
        (_row(Kind.DURATION, low=1, high=90), "2m", "a duration from 1s to 90s"),
        (_row(Kind.DURATION, low=0, high=90, words=("auto",)), "Auto", "a duration from 0s to 90s, or auto"),
        (_row(Kind.DURATION, low=0, high=90, words=("auto",)), -1, "a duration from 0s to 90s, or auto"),
        (_row(Kind.BYTES, low=1024, high=2048), "1", "a size from 1KiB to 2KiB"),
        (_row(Kind.WORD, words=("a", "b")), "c", "one of a, b"),
        (_row(Kind.WORD, words=("a", "b")), 1, "one of a, b"),
        (_row(Kind.TEXT), 1, "a text"),
        (_row(Kind.TEXT), "a\nb", "a text"),
        (_row(Kind.PATH), "a\0b", "a file's path"),
        (_row(Kind.FLAG), 1, "true or false"),
        (_row(Kind.FLAG), "maybe", "true or false"),
        (_row(Kind.LIST), "x", "a list of texts"),
        (_row(Kind.LIST), ["x", 1], "a list of texts"),
        (_row(Kind.LIST), [""], "a list of texts"),
        (_row(Kind.TABLE), {"x": 1}, "a table of texts"),
        (_row(Kind.TABLE), ["x"], "a table of texts"),
    ],
)
def test_a_refused_value_is_told_the_allowed_values(row: Row, raw: object, allowed: str) -> None:
    with pytest.raises(Refused, match="^" + allowed.replace("(", r"\(").replace(")", r"\)")):
        row.parse(raw)


def test_auto_means_the_cores_that_this_process_may_use() -> None:
    assert 1 <= _row(Kind.COUNT, low=1, high=64, words=("auto",)).parse("auto") <= 64  # type: ignore[operator]
