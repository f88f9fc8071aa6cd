"""How fast a stream's tokens come, and how long ago an event came, without a stored time for each."""

from __future__ import annotations

import pytest
from fakes import event
from sinks import new_stream

from streamd.core.pace import age_of_event_s, tokens_per_s
from streamd.core.stream import Stream
from streamd.reasons import CloseReason


def even(count: int, every_s: float) -> Stream:
    """A stream opened at 0 with an event at each multiple of `every_s`, from 1 s on."""
    stream = new_stream()
    for k in range(count):
        stream.append(event(str(k)), 1 + k * every_s)
    return stream


@pytest.mark.parametrize("seq", [1, 2, 10, 19, 20])
def test_the_age_of_an_event_is_exact_where_events_come_evenly(seq: int) -> None:
    stream = even(20, 0.5)
    now = 100.0
    assert age_of_event_s(stream, seq, now) == pytest.approx(now - (1 + (seq - 1) * 0.5))


def test_an_event_that_is_still_to_come_has_no_age() -> None:
    assert age_of_event_s(even(3, 1.0), 4, 50.0) == 0.0
    assert age_of_event_s(new_stream(), 1, 50.0) == 0.0


def test_the_only_event_is_as_old_as_it_is() -> None:
    assert age_of_event_s(even(1, 1.0), 1, 5.0) == pytest.approx(4.0)


def test_after_a_streams_end_ages_grow_no_more() -> None:
    stream = even(11, 1.0)
    stream.seal(CloseReason.COMPLETE, 12.0, clean=True)
    assert age_of_event_s(stream, 1, 1000.0) == age_of_event_s(stream, 1, 5000.0) == pytest.approx(11.0)
    assert tokens_per_s(stream, 20.0) == 0.0


def test_the_pace_is_the_mean_since_the_first_token() -> None:
    stream = even(21, 0.5)
    assert tokens_per_s(stream, 11.0) == pytest.approx(2.1)
    assert tokens_per_s(new_stream(), 11.0) == 0.0
    assert tokens_per_s(even(1, 1.0), 1.001) == 1.0, "a burst at the beginning is no pace of a thousand a second"
