"""Story: the steps of a request, for the log at debug: upstream and why, retries, connection, first event, pauses.

A step costs its place in the code a look at `is_on` while nobody wants it; a token has no step. Steps are wanted for
all requests (the level is debug), or for those of a watched key or stream.
"""

from __future__ import annotations

from collections.abc import Callable

from streamd.core.stream import Stream, Subscriber
from streamd.log_levels import Watch
from streamd.net.request import Request

# Writes a line at debug: its name, then its fields.
WriteStep = Callable[..., None]


class Story:
    """A worker's steps of requests. `write` gets each that is wanted."""

    __slots__ = ("_everything", "_keys", "_streams", "is_on", "time", "write")

    def __init__(self, time: Callable[[], float], write: WriteStep = lambda name, **fields: None) -> None:
        self.time = time
        self.write = write
        self._everything = False
        self._keys: frozenset[str] = frozenset()
        self._streams: frozenset[str] = frozenset()
        self.is_on = False  # whether a step may be wanted

    def want(self, watches: tuple[Watch, ...], *, everything: bool) -> None:
        """Steps of all requests are wanted from now on, or those of watched keys and streams."""
        self._everything = everything
        self._keys = frozenset(each.key for each in watches if each.key)
        self._streams = frozenset(each.stream for each in watches if each.stream)
        self.is_on = everything or bool(watches)

    def is_watched(self, request: Request, stream: Stream | None) -> bool:
        """Whether the request belongs to a watched key or stream."""
        return request.principal.id in self._keys or (stream is not None and stream.id in self._streams)

    def tell(self, request: Request, stream: Stream | None, name: str, /, **fields: object) -> None:
        """A step of the request, which reads or makes the stream. Callers look at `is_on` first."""
        if self._everything or self.is_watched(request, stream):
            at_s = round(self.time() - request.started_at, 4)
            self.write(name, request, stream, {"at_s": at_s, **fields})

    def tell_of_reader(self, request: Request, reader: Subscriber, name: str, /, **fields: object) -> None:
        """A step of a reader, with its position: the last event that its connection took, and the stream's last."""
        stream = reader.stream
        places = {"position": reader.position - 1, "last_seq": stream.events}
        self.tell(request, stream, name, **places, **fields)
