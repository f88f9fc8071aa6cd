"""DELETE /streams/{id}, /readers/{id} and /keys/{id} on the admin surface: an operator ends something, in any worker.

a stream    its upstream is aborted and its readers are told, as by DELETE /v1/streams/{id}
a reader    it is sent away with its position; its generation has the grace of a connection that broke
a key       all streams that it opened, all streams that it reads, and its requests that wait for an answer. Its next
            request is served: only `streamd keys revoke` shuts it out
"""

from __future__ import annotations

import enum
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import orjson

from streamd.api.reader_table import ReaderTable, connections
from streamd.api.rights import Rights
from streamd.api.streams import JSON, Streams
from streamd.api.tables import in_all_workers
from streamd.net.answer import Answer
from streamd.net.client import ClientConnection
from streamd.net.http_error import HttpError
from streamd.net.in_turns import SlowWork, Steps
from streamd.net.runtime import WORKER_BUSY, Runtime
from streamd.reasons import CloseReason

# Streams ended in a turn of the loop: 50 us each, with a reader.
SLICE_ENDED: Final = 50
# Connections looked at in a turn of the loop, of which few are ended: 1 us each.
SLICE_LOOKED_AT: Final = 500

SENT_AWAY: Final = "An operator ended this connection; reconnect to go on reading."
STOPPED: Final = HttpError(
    409,
    "An operator stopped this request.",
    code="cancelled",
    reason=CloseReason.CANCELLED,
    should_retry=False,
    close=True,
)


class Ended(enum.Enum):
    """The kinds of object that an operator ends; the values are the first words of their paths."""

    STREAM = "streams"
    READER = "readers"
    KEY = "keys"


class EndedCounts(NamedTuple):
    """The numbers of streams, readers and waiting requests that were ended."""

    streams: int = 0
    readers: int = 0
    requests: int = 0


class Ending:
    """Ends streams, readers and everything of a key. `note` gets the path and the counts, for the log."""

    kind: Final = "end"

    def __init__(
        self,
        runtime: Runtime,
        rights: Rights,
        streams: Streams,
        readers: ReaderTable,
        slow_work: SlowWork,
        note: Callable[[str, EndedCounts], None],
    ) -> None:
        self._runtime = runtime
        self._rights = rights
        self._streams = streams
        self._readers = readers
        self._slow_work = slow_work
        self._note = note

    def end(self, answer: Answer) -> None:
        """Answer a DELETE whose path is the kind of object and its id. Raises HttpError."""
        path = answer.request.path
        _, first, word = path.split("/", 2)
        word = urllib.parse.unquote(word)
        ended = Ended(first)
        names = self._rights.principals_named(word) if ended is Ended.KEY else (word,)
        is_known = ended is Ended.KEY and any(self._rights.key_of(name) for name in names)

        def finish(parts: Sequence[bytes], missing: int) -> None:
            counts = EndedCounts(*map(sum, zip(*(orjson.loads(part) for part in parts), strict=True)))
            if not any(counts) and not is_known:
                raise self._nothing_found(path, missing)
            self._note(path, counts)
            fields = counts._asdict() | ({"workers_missing": missing} if missing else {})
            answer.send(200, orjson.dumps(fields) + b"\n", [JSON])

        question = orjson.dumps([ended.value, names])
        in_all_workers(self._runtime, self._slow_work, answer, self.kind, question, self._part(ended, names), finish)

    def answer_question(self, question: bytes) -> Steps[bytes]:
        """Answer another worker's question: end what is here."""
        first, names = orjson.loads(question)
        return self._part(Ended(first), tuple(names))

    def _nothing_found(self, path: str, missing: int) -> HttpError:
        if missing:  # the worker that has it may be late
            return self._runtime.refused(WORKER_BUSY)
        text = f"There is nothing to end at {path}; GET the table for what there is."
        return HttpError(404, text, code="nothing_to_end", reason=CloseReason.NOT_FOUND)

    def _part(self, ended: Ended, names: tuple[str, ...]) -> Steps[bytes]:
        if ended is Ended.STREAM:
            counts = self._end_stream(names[0])
        elif ended is Ended.READER:
            counts = yield from self._end_clients(lambda client: self._is_reader(client, names[0]))
        else:
            streams = yield from self._end_streams_of(names)
            counts = yield from self._end_clients(lambda client: _belongs_to(client, names))
            counts = counts._replace(streams=streams)
        return orjson.dumps(tuple(counts))

    def _end_stream(self, name: str) -> EndedCounts:
        stream = self._streams.here(name)
        if stream is None:
            return EndedCounts()
        self._streams.stop_stream(stream)
        return EndedCounts(streams=1)

    def _end_streams_of(self, owners: tuple[str, ...]) -> Steps[int]:
        count = 0
        for stream in self._runtime.hub:
            if stream.reason is None and stream.terms.owner in owners:
                self._streams.stop_stream(stream)
                count += 1
                if count % SLICE_ENDED == 0:
                    yield
        return count

    def _end_clients(self, is_meant: Callable[[ClientConnection], bool]) -> Steps[EndedCounts]:
        readers = requests = 0
        for k, client in enumerate(connections(self._runtime), 1):
            if is_meant(client):
                if client.reader is not None:
                    readers += bool(client.send_away(CloseReason.CANCELLED, SENT_AWAY))
                else:
                    client.give_up(STOPPED)
                    requests += 1
                if (readers + requests) % SLICE_ENDED == 0:
                    yield
            if k % SLICE_LOOKED_AT == 0:
                yield
        return EndedCounts(readers=readers, requests=requests)

    def _is_reader(self, client: ClientConnection, word: str) -> bool:
        """Whether the connection is the reader of this id, or of the request of this id (clients may repeat these)."""
        answer = client.answer
        if answer is None or answer.reader is None:
            return False
        return answer.request.id == word or self._readers.id_of(answer) == word


def _belongs_to(client: ClientConnection, owners: tuple[str, ...]) -> bool:
    """Whether a request of these principals is under way here; an operator's isn't meant."""
    answer = client.answer
    return answer is not None and client.origin.listener != "admin" and answer.request.principal.id in owners
