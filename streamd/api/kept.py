"""A request for an object that an upstream keeps goes to the upstream that made it, for the principal of the object.

A response's id is read from its first event or from the answer's first bytes, that of a stored chat completion at its
end if it is a stream, and told to the other workers. An id that
isn't known here may be known to another worker (a note is on its way, or this worker has begun after it), so they are
asked. An id that no worker knows was made before this daemon, or past it: it may belong to any principal. So it is off
for keys with limits, and goes where a request without an id would go for all others (SECURITY.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from streamd.api.gather import Gathered, all_others, gather
from streamd.core.auth import Principal
from streamd.core.makers import Made, Makers
from streamd.core.stream import Stream
from streamd.net.answer import Answer
from streamd.net.http_error import HttpError
from streamd.net.peers import Note
from streamd.net.request import Request
from streamd.net.runtime import Runtime
from streamd.net.upstreams import Upstreams
from streamd.reasons import CloseReason
from streamd.wire.dialects.members import says_yes
from streamd.wire.kept_objects import STORE, IdReader, ids_in, in_path

# A note to the other workers, and a question.
MADE, MAKERS = "made", "makers"


class KeptObjects:
    """The makers that this worker knows, and the decision where a request has to go."""

    def __init__(self, runtime: Runtime, upstreams: Upstreams) -> None:
        self._runtime = runtime
        self._upstreams = upstreams
        self.makers = Makers()

    # -- requests

    def find(self, answer: Answer, fields: dict[str, Any], go_on: Callable[[str], None]) -> None:
        """Go on with the name of the only upstream that may be asked; "": any. Raises HttpError, or answers with it."""
        request = answer.request
        path = in_path(request.method, request.path)
        named = [path.ids] if path.ids else []
        named += [(each,) if each is not None else () for each in ids_in(fields)]
        if path.lists and _is_limited(request.principal):
            text = "This API key has limits, and may not list what the upstream keeps of all keys."
            raise HttpError(403, text, code="route_not_allowed", reason=CloseReason.FORBIDDEN)
        unknown = [each for ids in named for each in ids if not self.makers.of(each)]
        others = all_others(self._runtime, orjson.dumps(unknown))
        if not unknown or not others:
            go_on(self._place(request, named))
            return

        def finish(gathered: Gathered) -> None:
            for known in gathered.answers:
                self._learn_all(known)
            go_on(self._place(request, named))

        gather(self._runtime, answer, MAKERS, others, finish)

    def _place(self, request: Request, named: list[tuple[str, ...]]) -> str:
        """The upstream that made the objects, each with all readings of its id. Raises HttpError 404."""
        principal, places = request.principal, []
        for ids in named:
            made = [each for object_id in ids for each in self.makers.of(object_id)]
            own = [each.upstream for each in made if principal.admin or each.principal == principal.id]
            if not own and (made or _is_limited(principal)):
                raise _no_object()
            places += [each for each in own if self._upstreams.has(each)]
        return places[0] if places else ""

    # -- answers

    def reader(self, request: Request, fields: dict[str, Any]) -> MadeReader | None:
        """Takes an answer's upstream and bytes, to learn what it has made; None for a request that makes nothing."""
        path = in_path(request.method, request.path)
        if not path.makes and not (path.stores and says_yes(fields.get(STORE))):
            return None
        return MadeReader(self, request.principal.id)

    def learned(self, stream: Stream) -> None:
        """A stream of this worker has its response id."""
        if stream.progress.response_id is not None and stream.upstream:
            self.learn(stream.progress.response_id, Made(stream.terms.owner, stream.upstream))

    def learn(self, object_id: str, made: Made) -> None:
        """An answer has named an object that its upstream keeps: remember the maker, here and in the other workers."""
        self.makers.learn(object_id, *made)
        peers = self._runtime.peers
        if peers is not None:
            body = orjson.dumps([[object_id, *made]])
            for slot in peers.others():
                peers.tell(slot, MADE, body)

    # -- several workers

    def take(self, note: Note) -> bool:
        """Whether a note belongs here; if so, record it."""
        if note.kind != MADE:
            return False
        self._learn_all(note.body)
        return True

    def _learn_all(self, body: bytes) -> None:
        for object_id, principal, upstream in orjson.loads(body):
            self.makers.learn(str(object_id), str(principal), str(upstream))

    def answer_makers(self, question: bytes) -> bytes:
        """Another worker asks for the makers of some objects."""
        return orjson.dumps([[each, *made] for each in orjson.loads(question) for made in self.makers.of(str(each))])


class MadeReader:
    """The Learner of an answer (net/exchange.py) whose upstream keeps what it has made."""

    __slots__ = ("_ids", "_kept", "_principal_id")

    def __init__(self, kept: KeptObjects, principal_id: str, read: bytes | None = b"") -> None:
        """`read`: the answer's bytes so far, as `read` of another process's had them."""
        self._kept = kept
        self._principal_id = principal_id
        self._ids = IdReader()
        self._ids.go_on_from(read)

    @property
    def read(self) -> bytes | None:
        """The bytes that were read; None: the id was found, or won't be."""
        return self._ids.read

    def learn(self, upstream: str, piece: bytes) -> None:
        """The next bytes of an answer of the upstream with this name."""
        object_id = self._ids.feed(piece)
        if object_id is not None:
            self._kept.learn(object_id, Made(self._principal_id, upstream))


def _is_limited(principal: Principal) -> bool:
    return principal.key is not None and principal.key.is_limited


def _no_object() -> HttpError:
    text = "There is no such object here: it was made for another key, or it isn't known for which."
    return HttpError(404, text, code="not_found", reason=CloseReason.NOT_FOUND)
