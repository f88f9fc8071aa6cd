"""GET /readers: the connections that read a stream now. DELETE /readers/{id} finds them by the same ids.

A reader's id is derived, so that a connection stores nothing for it: the worker's slot, and in a number where its
answer lies in this process and when its request came. A request's id won't do, because clients choose it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, cast

from streamd.api.rights import Rights
from streamd.api.tables import Shown, Table, TableQuery, merged, part_of, slot_of
from streamd.core.auth import ANONYMOUS
from streamd.core.hub import SLOT_CHARS
from streamd.core.pace import age_of_event_s
from streamd.core.stream import Subscriber, SubscriberState
from streamd.net.answer import Answer
from streamd.net.client import ClientConnection
from streamd.net.in_turns import SlowWork, Steps
from streamd.net.outlet import outstanding
from streamd.net.runtime import Runtime

# The part of an id that is the time of the request: 2**24 ms are 4.6 hours. An answer that lies where an earlier answer
# lay has the same id only if its request came in the same millisecond of these hours.
_TIME_MASK = 2**24 - 1


class ReaderTable(Table):
    """The readers of all workers."""

    kind = "readers"
    sorts = ("lag", "paused", "age")
    filters = ("stream", "upstream", "model")

    def __init__(self, runtime: Runtime, rights: Rights, slow_work: SlowWork) -> None:
        super().__init__(runtime, rights, slow_work)
        self._mask = secrets.randbits(48)  # an id doesn't show an address of this process

    def part(self, wanted: TableQuery) -> Steps[bytes]:
        return part_of(connections(self._runtime), lambda client: self._rank(client, wanted), self._row, wanted.limit)

    def whole(self, wanted: TableQuery, parts: Sequence[bytes]) -> Steps[Shown]:
        yield from ()
        return merged(parts, wanted.limit)

    def id_of(self, answer: Answer) -> str:
        """The id of the reader that this answer is."""
        began_ms = int(answer.request.started_at * 1000) & _TIME_MASK
        number = (id(answer) ^ self._mask) << 24 | began_ms
        return f"r_{SLOT_CHARS[slot_of(self._runtime)]}{number:x}"

    def _rank(self, client: ClientConnection, wanted: TableQuery) -> float | None:
        answer = client.answer
        reader = answer.reader if answer is not None else None
        if answer is None or reader is None or reader.state is SubscriberState.ENDED:
            return None
        stream = reader.stream
        if not (
            wanted.has_owner(answer.request.principal.id)
            and wanted.has("stream", stream.id)
            and wanted.has("upstream", stream.upstream)
            and wanted.has("model", stream.terms.model)
        ):
            return None
        if wanted.sort == "lag":
            return stream.log.seq_next - reader.position
        now = self._runtime.time()
        return paused_s(client, now) if wanted.sort == "paused" else now - answer.request.started_at

    def _row(self, client: ClientConnection) -> dict[str, Any] | None:
        answer = client.answer
        reader = answer.reader if answer is not None else None
        if answer is None or reader is None:
            return None
        stream, request, now = reader.stream, answer.request, self._runtime.time()
        principal = request.principal
        return {
            "id": self.id_of(answer),
            "request": request.id,
            "peer": answer.origin.peer(request),
            "key": principal.id if principal is not ANONYMOUS else None,
            "key_name": principal.key.name if principal.key is not None else None,
            "stream": stream.id,
            "model": stream.terms.model or None,
            "upstream": stream.upstream or None,
            "state": reader.state.value,
            "policy": reader.policy.value,
            "position": reader.position - 1,
            "last_seq": stream.events,
            "lag_events": stream.log.seq_next - reader.position,
            "lag_s": round(age_of_event_s(stream, reader.position, now), 3),
            "unsent_bytes": outstanding(client.transport),
            "paused_s": round(paused_s(client, now), 3),
            "events": reader.events_delivered,
            "bytes": reader.bytes_delivered,
            "dropped_events": reader.dropped,
            "tokens": stream.text_events,
            "first_s": _first_s(reader, request.started_at),
            "age_s": round(now - request.started_at, 3),
            "worker": slot_of(self._runtime),
        }


def connections(runtime: Runtime) -> tuple[ClientConnection, ...]:
    """All client connections of this worker."""
    # Why a cast: the layer of the runtime is below that of the connections.
    return cast("tuple[ClientConnection, ...]", tuple(runtime.clients))


def paused_s(client: ClientConnection, now: float) -> float:
    """How long the client has been paused, seconds; 0 if it isn't."""
    return now - client.stall.since if client.paused and client.stall is not None else 0.0


def _first_s(reader: Subscriber, started_at: float) -> float | None:
    """From the request to its stream's first event; None for a reader that didn't begin at the stream's beginning."""
    first_at = reader.stream.first_event_at
    return round(max(0.0, first_at - started_at), 4) if first_at and reader.seq_start == 1 else None
