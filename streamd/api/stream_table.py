"""GET /streams: the streams of all workers, with their owners, paces and lags. /v1/streams pages through them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamd.api.streams import state_of
from streamd.api.tables import Shown, Table, TableQuery, merged, part_of, slot_of
from streamd.core.auth import ANONYMOUS
from streamd.core.pace import tokens_per_s
from streamd.core.stream import Stream
from streamd.net.in_turns import Steps


class StreamTable(Table):
    """The streams of all workers."""

    kind = "stream_table"
    sorts = ("lag", "age", "idle", "tokens", "readers")
    filters = ("stream", "upstream", "model", "state")
    states = ("live", "detached", "sealed")

    def part(self, wanted: TableQuery) -> Steps[bytes]:
        return part_of(self._runtime.hub, lambda stream: self._rank(stream, wanted), self._row, wanted.limit)

    def whole(self, wanted: TableQuery, parts: Sequence[bytes]) -> Steps[Shown]:
        yield from ()
        return merged(parts, wanted.limit)

    def _rank(self, stream: Stream, wanted: TableQuery) -> float | None:
        terms = stream.terms
        if not (
            wanted.has_owner(terms.owner)
            and wanted.has("stream", stream.id)
            and wanted.has("upstream", stream.upstream)
            and wanted.has("model", terms.model)
            and wanted.has("state", state_of_life(stream))
        ):
            return None
        now = self._runtime.time()
        match wanted.sort:
            case "lag":
                return self._runtime.lags.of(stream, now).most if stream.readers else 0
            case "age":
                return now - stream.opened_at
            case "idle":
                return _idle_s(stream, now)
            case "tokens":
                return stream.text_events
            case _:
                return len(stream.readers)

    def _row(self, stream: Stream) -> dict[str, Any]:
        now, owner = self._runtime.time(), stream.terms.owner
        return {
            **state_of(stream, self._runtime),
            "state": state_of_life(stream),
            "key": owner if owner not in ("", ANONYMOUS.id) else None,
            "key_name": self._rights.name_of(owner),
            "tokens": stream.progress.tokens(stream.text_events),
            "tokens_per_s": round(tokens_per_s(stream, now), 1),
            "first_s": round(stream.first_event_at - stream.opened_at, 4) if stream.first_event_at else None,
            "idle_s": round(_idle_s(stream, now), 3),
            "grace_s": round(stream.grace_until - now, 3) if stream.grace_until else None,
            "worker": slot_of(self._runtime),
        }


def state_of_life(stream: Stream) -> str:
    """`live`, `detached` (it runs without a reader, within a grace), or `sealed`: the word that /metrics has, too."""
    if stream.reason is not None:
        return "sealed"
    return "detached" if stream.grace_until else "live"


def _idle_s(stream: Stream, now: float) -> float:
    """How long ago the last event of a running stream came, or the stream opened; 0 after its end."""
    return max(0.0, now - stream.touched_at) if stream.reason is None else 0.0
