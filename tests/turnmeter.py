"""Counts the work that streamd does in each turn of the loop, where the work is done and not where streamd counts it.

A turn ends where `Turns` begins the next. Work is counted in the pieces of net/turns.py: events appended or published,
chunks decoded, heads parsed, and bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from streamd.core.stream import Stream
from streamd.net import client as net_client
from streamd.net import upstream as net_upstream
from streamd.net.client import ClientConnection
from streamd.net.intake import Intake
from streamd.net.turns import BYTES_PER_PIECE, REQUEST_PIECES, Turns
from streamd.net.upstream import HEAD_PIECES, UpstreamConnection
from streamd.wire.chunked import ChunkedDecoder
from streamd.wire.publish import EventsPublication, LinesPublication, TextPublication


class TurnMeter:
    """The work of the present turn, and the most of any turn so far: of all connections, and of a single one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self.now = 0
        self.worst = 0
        self.total = 0
        for owner in (EventsPublication, LinesPublication, TextPublication, ChunkedDecoder):
            self._count(owner, "feed", lambda found, *given: len(found))
        self._count(Stream, "append_pieces", lambda found, stream, pieces, now: len(pieces))
        self._count(Intake, "feed", lambda found, intake, data: len(data) // BYTES_PER_PIECE)
        self._count(UpstreamConnection, "_take", lambda found, link, data: len(data) // BYTES_PER_PIECE)
        self._count(net_client, "parse_request", lambda found, *given: REQUEST_PIECES)
        self._count(net_upstream, "parse_response", lambda found, *given: HEAD_PIECES)
        begin = Turns._begin

        def begin_turn(turns: Turns) -> None:
            self.end_turn()
            begin(turns)

        patch.setattr(Turns, "_begin", begin_turn)

    def _count(self, owner: Any, name: str, pieces: Callable[..., int]) -> None:
        original = getattr(owner, name)

        def counted(*given: Any) -> Any:
            found = original(*given)
            self.now += pieces(found, *given)
            return found

        self._patch.setattr(owner, name, counted)

    def end_turn(self) -> None:
        self.worst = max(self.worst, self.now)
        self.total += self.now
        self.now = 0


def waits(connection: ClientConnection | UpstreamConnection) -> int:
    """Bytes that the connection has read and not processed yet."""
    held = connection._behind if isinstance(connection, ClientConnection) else connection._read
    return len(held or b"")
