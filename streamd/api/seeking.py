"""Seeking: requests for streams of other nodes, which wait for the engine.

A stream that isn't here may be another node's, or this node's before a restart. Its copy is looked for only after every
right that can be decided without the stream, and once for all requests of the same time (engine/followed.py). A request
waits for SEEK_S at most. If the engine can't be asked, streamd doesn't know whether the stream exists: 503
`engine_unreachable` with Retry-After, never 404, 410 or 204.

BOUNDS. engine_lookups_max requests wait in all; beyond it the principal or address that has most gives way. Of these a
principal or an address has a quarter at most: an address may be a proxy with all readers of a dead node behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from streamd.core.auth import ANONYMOUS
from streamd.core.refusal import Refusal, Retry
from streamd.core.shares import Shares
from streamd.core.stream import Stream
from streamd.net.answer import Answer, Pending
from streamd.net.http_error import HttpError
from streamd.net.runtime import Runtime
from streamd.net.sweep import INTERVAL_S, NEVER
from streamd.reasons import CloseReason
from streamd.wire.event_id import valid_stream_id

if TYPE_CHECKING:
    from streamd.api.stopping import Stopping
    from streamd.engine.cluster import Cluster

# A look-up takes two round trips and the reading of a log: 10 ms, or a second where thousands come at once.
SEEK_S: Final = 5.0
# A reader that was ahead of the copy at its former node: the copy follows within a second and a round trip.
AHEAD_S: Final = 3.0
# Divisor of the bound for all: the share of a principal or an address.
SHARE_MAX: Final = 4

UNREACHABLE = Refusal(
    CloseReason.ENGINE_UNREACHABLE,
    "engine_unreachable",
    "The engine that knows the streams of other nodes can't be reached; try again shortly.",
    retry=Retry.SOON,
)
BEHIND = Refusal(
    CloseReason.ENGINE_UNREACHABLE,
    "engine_behind",
    "This node hasn't got as far in the stream as your position yet; try again shortly.",
    retry=Retry.SOON,
)
TOO_MANY = Refusal(
    CloseReason.OVER_BUDGET,
    "over_capacity",
    "As many requests as there is room for wait for streams of other nodes. Try again later.",
    retry=Retry.WITH_ROOM,
)


class Seeking:
    """The requests that wait for streams of other nodes. Without an engine there are none."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.cluster: Cluster | None = None
        self.stopping: Stopping | None = None  # with a cluster
        self._waiting: Shares[SeekStream] = Shares()

    def may_be_elsewhere(self, stream_id: str) -> bool:
        """Whether a stream of this id, which isn't here, may be another node's."""
        return self.cluster is not None and valid_stream_id(stream_id.encode("utf-8", "replace"))

    def seek(self, answer: Answer, stream_id: str, found: Callable[[Stream | None], None]) -> None:
        """Look for the stream; later `found` is called with it, or with None if there is none, and may raise HttpError.

        Raises HttpError 503 if the engine can't be asked, or too many wait.
        """
        runtime, cluster = self._runtime, self.cluster
        assert cluster is not None
        owner, most = holder_of(answer), runtime.settings.engine_lookups_max
        if self._waiting.count(owner) >= max(1, most // SHARE_MAX):
            raise runtime.refused(TOO_MANY)
        if self._waiting.total >= most:
            yielding = self._waiting.yielding(owner, lambda waiting: True)
            if yielding is None:
                raise runtime.refused(TOO_MANY)
            yielding.give_way()
        seeker = SeekStream(runtime, self, cluster, answer, stream_id, owner, found)
        if not cluster.followed.seek(stream_id, seeker):
            raise runtime.refused(UNREACHABLE)
        self._waiting.add(owner, seeker)
        seeker.wait()

    def forget(self, seeker: SeekStream) -> None:
        """The request waits no more."""
        self._waiting.discard(seeker.owner, seeker)

    def wait_for_copy(self, answer: Answer, stream: Stream, seq: int, reached: Callable[[], None]) -> None:
        """Wait until the followed stream has the event in front of `seq`, or has ended; then call `reached`, which may
        raise HttpError.
        """
        assert self.cluster is not None
        WaitForCopy(self._runtime, self.cluster, answer, stream, seq, reached)

    def stop(self, answer: Answer, stream: Stream) -> None:
        """Stop a stream of another node, and answer then. Raises HttpError 503 if its owner can't be asked."""
        assert self.stopping is not None
        if not self.stopping.stop(answer, stream):
            raise self._runtime.refused(UNREACHABLE)

    def check_followed(self, stream: Stream) -> None:
        """Raises HttpError 503 for a followed stream while the engine can't be asked for long."""
        if stream.terms.is_copy and self.cluster is not None and self.cluster.followed.is_stale(stream):
            raise self._runtime.refused(UNREACHABLE)


class SeekStream(Pending):
    """A request that waits for a stream of another node: a Seeker of engine/followed.py."""

    __slots__ = ("_answer", "_cluster", "_found", "_id", "_runtime", "_seeking", "due_at", "owner")

    def __init__(
        self,
        runtime: Runtime,
        seeking: Seeking,
        cluster: Cluster,
        answer: Answer,
        stream_id: str,
        owner: str,
        found: Callable[[Stream | None], None],
    ) -> None:
        self._runtime = runtime
        self._seeking = seeking
        self._cluster = cluster
        self._answer = answer
        self._id = stream_id
        self._found = found
        self.owner = owner
        self.due_at = runtime.time() + SEEK_S

    def wait(self) -> None:
        """The look-up is under way."""
        self._answer.later(self)
        self._runtime.sweep.add(self)

    def _settle(self, respond: Callable[[], None]) -> None:
        self._leave()
        self._answer.settle(respond)

    def _leave(self) -> None:
        self._runtime.sweep.discard(self)
        self._seeking.forget(self)

    # -- the outcome

    def found(self, stream: Stream) -> None:
        """The stream is here from now on."""
        self._settle(lambda: self._found(stream))

    def absent(self) -> None:
        """There is none."""
        self._settle(lambda: self._found(None))

    def unreachable(self) -> None:
        """The engine can't be asked, or can't tell."""
        self._settle(lambda: self._refuse(UNREACHABLE))

    def no_room(self, refused: HttpError) -> None:
        """The stream is there, and this worker has no room for it."""
        self._settle(lambda: _raise(refused))

    def give_way(self) -> None:
        """There are too many, and this one's owner has most of them."""
        self._cluster.followed.give_up(self._id, self)
        self._settle(lambda: self._refuse(TOO_MANY))

    def _refuse(self, refusal: Refusal) -> None:
        raise self._runtime.refused(refusal)

    # -- as a member of the sweep, and as Pending

    def on_due(self, now: float) -> float:
        """The engine didn't answer in time."""
        self._cluster.followed.give_up(self._id, self)
        self.unreachable()
        return NEVER

    def crash(self, where: str, error: Exception) -> None:
        """on_due() raised: the request ends. Never raises."""
        self._leave()
        self._answer.crash(where, error)

    def on_gone(self, reason: CloseReason) -> None:
        """The client left."""
        self._cluster.followed.give_up(self._id, self)
        self._leave()


class WaitForCopy(Pending):
    """A reader with a position beyond the end of the followed copy: it has read those events at another node.

    The stream is followed as long as such requests come: if its owner is lost, the end of the copy is the answer.
    """

    __slots__ = ("_answer", "_cluster", "_reached", "_runtime", "_seq", "_stream", "_until", "due_at")

    def __init__(
        self,
        runtime: Runtime,
        cluster: Cluster,
        answer: Answer,
        stream: Stream,
        seq: int,
        reached: Callable[[], None],
    ) -> None:
        self._runtime = runtime
        self._cluster = cluster
        self._answer = answer
        self._stream = stream
        self._seq = seq
        self._reached = reached
        self._until = runtime.time() + AHEAD_S
        self.due_at = runtime.time() + INTERVAL_S
        answer.later(self)
        runtime.sweep.add(self)

    def on_due(self, now: float) -> float:
        """Look again, at each sweep."""
        stream = self._stream
        self._cluster.followed.awaited(stream, now)
        if stream.log.seq_next >= self._seq or stream.reason is not None:
            self._runtime.sweep.discard(self)
            self._answer.settle(self._reached)
        elif now >= self._until:
            self._runtime.sweep.discard(self)
            self._answer.settle(self._refuse)
        else:
            return now + INTERVAL_S
        return NEVER

    def _refuse(self) -> None:
        raise self._runtime.refused(BEHIND)

    def crash(self, where: str, error: Exception) -> None:
        """on_due() raised: the request ends. Never raises."""
        self._runtime.sweep.discard(self)
        self._answer.crash(where, error)

    def on_gone(self, reason: CloseReason) -> None:
        """The client left."""
        self._runtime.sweep.discard(self)


def _raise(error: HttpError) -> None:
    raise error


def holder_of(answer: Answer) -> str:
    """The holder of a waiting request's place: its principal, or where it has none its address."""
    request = answer.request
    if request.principal is not ANONYMOUS:
        return request.principal.id
    return f"{ANONYMOUS.id} {request.client or answer.origin.address or ''}"
