"""Waits that an upstream tells clients: each form that an SDK obeys is bounded, any other is left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.wire.retry_after import bounded, wait_s_in

NOW = 1_800_000_000.0  # Fri, 15 Jan 2027 08:00:00 GMT


@pytest.mark.parametrize(
    ("value", "passed"),
    [
        (b"0", b"0"),
        (b"7", b"7"),
        (b" 60 ", b"60"),
        (b"61", b"60"),
        (b"1.2", b"2"),
        (b"86400.5", b"60"),
        (b"Fri, 15 Jan 2027 08:00:09 GMT", b"9"),
        (b"Friday, 15-Jan-27 08:00:09 GMT", b"9"),
        (b"Fri Jan 15 08:00:09 2027", b"9"),
        (b"Fri, 15 Jan 2027 09:00:09 +0100", b"9"),
        (b"Fri, 15 Jan 2027 07:00:00 GMT", b"0"),
        (b"Fri, 31 Dec 9999 23:59:59 GMT", b"60"),
        (b"Fri, 31 Dec 99999 23:59:59 GMT", None),
        (b"+5", None),
        (b"-5", None),
        (b"5, 5", None),
        (b"1e9", None),
        (b"9" * 40, None),
        (b"", None),
        (b"soon", None),
        ("\u0665".encode(), None),
    ],
)
def test_a_wait_in_seconds_is_at_most_the_bound(value: bytes, passed: bytes | None) -> None:
    assert bounded(b"retry-after", value, 60.0, NOW) == passed


@pytest.mark.parametrize(
    ("value", "passed"),
    [(b"250", b"250"), (b"0.5", b"1"), (b"86400000", b"60000"), (b"x", None), (b"Fri, 15 Jan 2027 08:00:09 GMT", None)],
)
def test_a_wait_in_milliseconds_is_at_most_the_bound(value: bytes, passed: bytes | None) -> None:
    assert bounded(b"retry-after-ms", value, 60.0, NOW) == passed


@given(st.binary(max_size=60))
def test_every_value_is_a_short_wait_or_none(value: bytes) -> None:
    passed = bounded(b"retry-after", value, 60.0, NOW)
    assert passed is None or 0 <= int(passed) <= 60
    assert bounded(b"x-other", value, 60.0, NOW) == value


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ([(b"retry-after", b"7")], 7),
        ([(b"retry-after", b"7"), (b"retry-after-ms", b"1200")], 2),
        ([(b"retry-after-ms", b"0")], 0),
        ([(b"retry-after-ms", b"soon"), (b"retry-after", b"9000")], 60),
        ([(b"retry-after", b"Fri, 15 Jan 2027 08:00:09 GMT")], 9),
        ([(b"retry-after", b"soon"), (b"x-retry", b"5")], None),
        ([], None),
    ],
)
def test_the_wait_of_an_answer_is_read_as_the_sdks_read_it(
    headers: list[tuple[bytes, bytes]], wait_s: int | None
) -> None:
    assert wait_s_in(headers, 60, NOW) == wait_s
