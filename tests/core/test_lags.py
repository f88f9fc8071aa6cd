"""The figures of a stream's readers: of this moment for a few readers, of this second for a crowd."""

from __future__ import annotations

import pytest
from sinks import Loop, Reader, feed, new_hub, new_stream

from streamd.core.lags import CROWD_READERS, KEPT_S, Lag, Lags
from streamd.core.stream import Policy
from streamd.wire.dialect import Dialect


def test_a_few_readers_are_looked_at_each_time() -> None:
    loop, lags = Loop(), Lags()
    stream = new_stream(loop)
    assert lags.of(stream, 5.0) == Lag(0, 0, 0)
    for _ in range(2):
        Reader(stream, loop)
    stalled = Reader(stream, loop, capacity=0)
    feed(stream, 4)
    loop.rest()
    assert lags.of(stream, 5.0).median == 0 and lags.of(stream, 5.0).most > 0
    stalled.take()
    loop.rest()
    assert lags.of(stream, 5.0) == Lag(0, 0, 0)


def test_lost_events_are_added_up_over_the_readers() -> None:
    loop, lags = Loop(), Lags()
    stream = new_stream(loop)
    for _ in range(2):
        Reader(stream, loop, policy=Policy.DROP_OLDEST, capacity=0)
    feed(stream, 200)
    loop.rest()
    assert lags.of(stream, 5.0).dropped == sum(reader.dropped for reader in stream.readers) > 0


@pytest.mark.parametrize("later_s", [0.0, KEPT_S / 2, KEPT_S, 100.0])
def test_a_crowd_is_looked_at_once_a_second(later_s: float) -> None:
    loop, lags = Loop(), Lags()
    stream = new_stream(loop)
    readers = [Reader(stream, loop, capacity=0) for _ in range(CROWD_READERS)]
    feed(stream, 4)
    loop.rest()
    before = lags.of(stream, 5.0)
    assert before.most > 0
    for reader in readers:
        reader.take()
    loop.rest()
    after = lags.of(stream, 5.0 + later_s)
    assert after == (before if later_s < KEPT_S else Lag(0, 0, 0))


def test_a_later_life_of_a_name_has_figures_of_its_own() -> None:
    loop, lags = Loop(), Lags()
    hub = new_hub(loop)
    stream = hub.open(Dialect.UNKNOWN, 0.0, name="room", epoch="aaaaaa")
    readers = [Reader(stream, loop, capacity=0) for _ in range(CROWD_READERS)]
    feed(stream, 4)
    loop.rest()
    assert lags.of(stream, 5.0).most > 0
    for reader in readers:
        reader.leave()
    hub.remove(stream)
    assert lags.of(hub.open(Dialect.UNKNOWN, 0.0, name="room", epoch="bbbbbb"), 5.0) == Lag(0, 0, 0)
