"""Lags: how far the readers of a stream are behind, in events, and how many events they have lost.

With a crowd of readers the figures cost milliseconds, and whoever may read a public stream may ask for its state
hundreds of times a second. So a crowded stream's figures are computed once in KEPT_S, and given out again meanwhile.
"""

from __future__ import annotations

import statistics
from typing import Final, NamedTuple

from streamd.core.stream import Stream

# Readers from which on the figures are kept: 64 take 20 us, which the answer itself takes too.
CROWD_READERS: Final = 64
KEPT_S: Final = 1.0


class Lag(NamedTuple):
    """The figures of a stream; 0 without readers."""

    most: int
    median: float
    dropped: int  # over all readers of this moment


class Lags:
    """The figures of crowded streams that were asked for in this second: at most as many as there are such streams."""

    __slots__ = ("_kept", "_since")

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Lag] = {}  # by id and epoch
        self._since = 0.0

    def of(self, stream: Stream, now: float) -> Lag:
        """The figures of this moment; with a crowd of readers up to KEPT_S old."""
        if now - self._since >= KEPT_S:
            self._kept.clear()
            self._since = now
        kept = self._kept.get((stream.id, stream.epoch))
        if kept is not None:
            return kept
        lags = [stream.log.seq_next - reader.position for reader in stream.readers]
        dropped = sum(reader.dropped for reader in stream.readers)
        lag = Lag(max(lags, default=0), statistics.median(lags) if lags else 0, dropped)
        if len(lags) >= CROWD_READERS:
            self._kept[stream.id, stream.epoch] = lag
        return lag
