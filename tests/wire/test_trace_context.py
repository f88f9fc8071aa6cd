"""The fields of W3C's trace context."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.wire.trace_context import TraceParent, parent_in, passed_on

TRACE, SPAN = b"4bf92f3577b34da6a3ce929d0e0e4736", b"00f067aa0ba902b7"
PARENT = TraceParent(int(TRACE, 16), int(SPAN, 16), 1)
OWN = TraceParent(PARENT.trace_id, 0xB7, 1)


def fields(*values: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"accept", b"*/*"), *((b"traceparent", value) for value in values), (b"tracestate", b"a=1")]


@pytest.mark.parametrize(
    ("value", "flags"),
    [
        (b"00-%b-%b-01", 1),
        (b"00-%b-%b-00", 0),
        (b" 00-%b-%b-01 ", 1),
        (b"00-%b-%b-03", 3),
        (b"cc-%b-%b-01", 1),
        (b"cc-%b-%b-01-later", 1),
    ],
)
def test_a_valid_traceparent_names_the_span_that_asks(value: bytes, flags: int) -> None:
    assert parent_in(fields(value % (TRACE, SPAN))) == PARENT._replace(flags=flags)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"00",
        b"ff-%b-%b-01" % (TRACE, SPAN),
        b"00-%b-%b-01-later" % (TRACE, SPAN),
        b"cc-%b-%b-01later" % (TRACE, SPAN),
        b"00-%b-%b-01" % (TRACE.upper(), SPAN),
        b"00-%b-%b-01" % (b"0" * 32, SPAN),
        b"00-%b-%b-01" % (TRACE, b"0" * 16),
        b"00-%b-%b-1" % (TRACE, SPAN),
        b"00-%b-%b-zz" % (TRACE, SPAN),
        b"00-%b-%b-01" % (TRACE[1:], SPAN),
    ],
)
def test_anything_else_is_no_parent_and_its_tracestate_is_dropped(value: bytes) -> None:
    given_fields = fields(value)
    assert parent_in(given_fields) is None
    assert passed_on(given_fields, OWN, has_parent=False) == [
        (b"accept", b"*/*"),
        (b"traceparent", b"00-%b-00000000000000b7-01" % TRACE),
    ]


def test_two_traceparents_are_none() -> None:
    assert parent_in(fields(*[b"00-%b-%b-01" % (TRACE, SPAN)] * 2)) is None


def test_a_tracestate_passes_beside_its_parent() -> None:
    passed = passed_on(fields(b"00-%b-%b-01" % (TRACE, SPAN)), OWN, has_parent=True)
    assert passed[1:] == [(b"tracestate", b"a=1"), (b"traceparent", OWN.encoded().encode())]


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.integers(0, 3))
def test_a_traceparent_is_read_as_it_was_written(trace_id: int, span_id: int, flags: int) -> None:
    written = TraceParent(trace_id, span_id, flags)
    assert parent_in([(b"traceparent", written.encoded().encode())]) == written


def test_flags_of_later_levels_go_no_further() -> None:
    assert PARENT._replace(flags=0xFF).encoded().endswith("-03")
