"""Shared: the mapping in which all workers count, one row of unsigned 64-bit numbers each, and a base row for the dead.

A worker writes its own row; every process reads all. Aligned 64-bit stores and loads are whole on x86-64 and arm64,
so a sum may be a moment old but never torn. The layout of a row is net/totals.py's.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

from streamd.net import totals
from streamd.net.totals import (
    GAUGES,
    GAUGES_AT,
    ROW_LEN,
    UPSTREAM_GAUGES,
    UPSTREAM_GAUGES_AT,
    UPSTREAMS_MAX,
    Row,
    Totals,
)

BYTES_PER_NUMBER = 8


class Shared:
    """All rows. `slot` is this worker's; the supervisor has none of its own and only reads, or folds."""

    def __init__(self, fd: int, workers: int, names: Sequence[str], slot: int | None = None) -> None:
        self._map = mmap.mmap(fd, size_bytes(workers))
        numbers = memoryview(self._map).cast("Q")
        self.base: Row = numbers[:ROW_LEN]
        self.rows: list[Row] = [numbers[(k + 1) * ROW_LEN : (k + 2) * ROW_LEN] for k in range(workers)]
        self.names = tuple(names)  # of upstreams, by index; only ever grows
        self._slot = slot

    @property
    def row(self) -> Row:
        """This worker's."""
        assert self._slot is not None
        return self.rows[self._slot]

    def publish(self, own: Totals) -> None:
        """Write this worker's numbers."""
        own.gauges["pid"] = os.getpid()
        totals.write(self.row, own, self.names)

    def set_in_flight(self, upstream: str, count: int) -> None:
        """This worker's requests at an upstream, as they change: limits look at all workers'."""
        self.row[self._in_flight_at(upstream)] = count

    def in_flight_elsewhere(self, upstream: str) -> int:
        """The other workers' requests at an upstream; they may overshoot a limit by one each."""
        at = self._in_flight_at(upstream)
        return sum(row[at] for slot, row in enumerate(self.rows) if slot != self._slot)

    def _in_flight_at(self, upstream: str) -> int:
        index = self.names.index(upstream) if upstream in self.names else UPSTREAMS_MAX - 1
        return UPSTREAM_GAUGES_AT + min(index, UPSTREAMS_MAX - 1) * len(UPSTREAM_GAUGES)

    def add_up(self) -> Totals:
        """The daemon's totals."""
        return totals.add_up([self.base, *self.rows], self.names)

    def each(self) -> list[dict[str, int]]:
        """Every worker's gauges, for /status."""
        return [{gauge: row[GAUGES_AT + k] for k, gauge in enumerate(GAUGES)} for row in self.rows]

    def bury(self, slot: int) -> None:
        """The worker in this slot has died (the supervisor)."""
        totals.fold(self.base, self.rows[slot])


def size_bytes(workers: int) -> int:
    return (workers + 1) * ROW_LEN * BYTES_PER_NUMBER


def create(workers: int) -> int:
    """A new mapping, all zero: its descriptor."""
    fd = os.memfd_create("streamd-counters")
    os.ftruncate(fd, size_bytes(workers))
    return fd
