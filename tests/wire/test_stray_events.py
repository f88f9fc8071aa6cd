"""Lines that are no events, of any content: they make whole events or none, and an error ends its stream as failed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamd.wire.dialect import STRAY_BYTES_MAX, STRAY_LINES_MAX, Dialect, stray_events
from streamd.wire.dialects.api import Progress
from streamd.wire.sse import is_event, parse_event

NAMES = st.sampled_from(
    [
        *("error", "detail", "object", "type", "choices", "delta", "message", "content", "code", "candidates"),
        *("index", "text", "tool_calls", "usage", "errors", "loc", "msg", "status", "output", "role", "unheard_of"),
    ]
)
LEAVES: Any = st.sampled_from([None, True, 0, -1, 1.5, 10**25, "", "x", "é", "\ud83d", "error", "slow down"])
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=3))
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=4)
ERRORS = OBJECTS.map(lambda body: {"error": body}) | OBJECTS.map(lambda body: {**body, "object": "error"})
PREFIXES = st.sampled_from([b"", b"", b"error: ", b"Error:", b"x: ", b"event: ", b" "])


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    text = json.dumps(draw(ERRORS | VALUES)).encode()
    cut = draw(st.sampled_from([len(text), len(text), draw(st.integers(0, len(text)))]))
    return draw(PREFIXES) + text[:cut].replace(b"x", draw(st.sampled_from([b"x", b"\xff"]))) + b"\n"


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(Dialect), st.lists(lines(), min_size=1, max_size=3).map(b"".join))
def test_any_lines_make_whole_events_and_an_error_is_known_as_the_end(dialect: Dialect, block: bytes) -> None:
    events, is_failure = stray_events(dialect, block, sequence_number=5)
    for event in events:
        assert is_event(event) and b"\n\n" not in event[:-2] and parse_event(event)[1]
    if is_failure and dialect is not Dialect.UNKNOWN:
        progress = Progress(dialect.api)
        progress.see(events[-1])
        assert progress.failed and progress.terminal


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("block", [b"x" * STRAY_BYTES_MAX, b"\n" * STRAY_LINES_MAX], ids=["bytes", "lines"])
def test_a_block_beyond_the_bounds_is_not_searched(dialect: Dialect, block: bytes) -> None:
    assert stray_events(dialect, b"error: slow down\n" + block, sequence_number=0) == ([], False)
    assert stray_events(dialect, b"error: slow down\n", sequence_number=0)[1]
