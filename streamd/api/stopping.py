"""Stopping: DELETE of a stream that lives at another node.

The rights are checked at the node that was asked, from the facts of the stream's copy. The owner is asked by a note and
answers when the generation is stopped, or the finished stream forgotten. If it doesn't answer in time, the note may
still be on its way: 202, and the stream's end tells. A finished stream that its owner doesn't have any more is
forgotten here.
"""

from __future__ import annotations

from collections.abc import Callable

import orjson

from streamd.core.hub import Gone
from streamd.core.stream import Stream
from streamd.engine.cluster import Cluster
from streamd.engine.notes import ClusterNote, NoteKind
from streamd.net.answer import Answer, Pending
from streamd.net.http_error import stream_not_found
from streamd.net.runtime import Runtime

# The owner's answer to a note `cancel`.
STOPPED, NOT_HERE = b"stopped", b"not here"


class Stopping:
    """Stops this worker's streams for other nodes, and other nodes' streams for this worker's clients."""

    def __init__(self, runtime: Runtime, cluster: Cluster, stop_here: Callable[[Stream], None]) -> None:
        """`stop_here` stops a live stream of this worker, or forgets a finished one."""
        self._runtime = runtime
        self._cluster = cluster
        self._stop_here = stop_here
        cluster.notes.on(NoteKind.CANCEL, self._take)

    def stop(self, answer: Answer, stream: Stream) -> bool:
        """Have the followed stream stopped, and answer then. False: the engine can't be asked now."""
        waiting = StopElsewhere(self._runtime, self._cluster, answer, stream)
        is_asked = self._cluster.followed.ask_owner(stream, NoteKind.CANCEL, waiting.heard)
        if is_asked:
            answer.later(waiting)
        return is_asked

    def _take(self, note: ClusterNote) -> None:
        """Another node's client, which has the right to it, stops a stream of this worker."""
        try:
            stream = self._runtime.hub.get(note.body.decode())
        except Gone:
            stream = None
        if stream is None or stream.terms.is_copy:
            self._cluster.notes.answer(note, NOT_HERE)
            return
        self._stop_here(stream)
        self._cluster.notes.answer(note, STOPPED)


class StopElsewhere(Pending):
    """A DELETE that waits for the stream's owner."""

    __slots__ = ("_answer", "_cluster", "_runtime", "_stream")

    def __init__(self, runtime: Runtime, cluster: Cluster, answer: Answer, stream: Stream) -> None:
        self._runtime = runtime
        self._cluster = cluster
        self._answer = answer
        self._stream = stream

    def heard(self, word: bytes | None) -> None:
        """The owner's answer; None: there is none."""
        self._answer.settle(lambda: self._respond(word))

    def _respond(self, word: bytes | None) -> None:
        stream = self._stream
        is_over = stream.reason is not None
        if word is None:
            body = orjson.dumps({"id": stream.id, "status": "stopping"})
            self._answer.send(202, body, [(b"content-type", b"application/json")])
        elif word == STOPPED or is_over:
            if is_over and not stream.readers:
                self._cluster.followed.forget(stream)
            self._answer.send(204)
        else:
            raise stream_not_found(self._runtime.settings.retention_s)
