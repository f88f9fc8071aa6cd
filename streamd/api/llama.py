"""llama.cpp's resumable streams, over the same log: the protocol of its web UI and other clients.

    POST with X-Conversation-Id      a stream that belongs to a conversation; a second POST starts it anew, and the old
                                     generation is cancelled (api/relay.py)
    GET /v1/stream?conv_id=…&from=N  the stream from its byte N on, live if it still runs
    GET /v1/stream?conv_id=…         the same from its start, or 204 if it is over: the way in which the AI SDK's
                                     useChat looks for a running answer
    DELETE /v1/stream?conv_id=…      stop it and forget it; 204 also if there is none
    POST /v1/streams/lookup          {"conversation_ids": […]}: the state of these and of their variants `<id>::…`, each
                                     told once, however many of the names find it

Clients count the bytes of the body, so these streams go out raw: the events as they are in the log, without ids and
without bytes of streamd's own in between. Two rules differ from llama.cpp on purpose. A conversation belongs to its
principal. And a generation without readers ends after detach_grace_max: no abandoned stream burns a GPU. For the same
reason the header doesn't go upstream: a llama.cpp there would go on generating after streamd has left.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable

import orjson

from streamd.api.gather import Gathered, gather
from streamd.api.rights import Rights
from streamd.api.streams import JSON, Streams, query_of
from streamd.core.stream import CountedStream
from streamd.net.answer import Answer
from streamd.net.application import Plan
from streamd.net.http_error import HttpError, bad_json
from streamd.net.peers import Peers
from streamd.net.request import Request
from streamd.net.runtime import WORKER_BUSY, Runtime
from streamd.reasons import CloseReason
from streamd.wire.json_scan import JsonError, loaded

HEADER = b"x-conversation-id"
STREAM = "/v1/stream"
LOOKUP = "/v1/streams/lookup"

# A UUID and a model's path behind `::`; Linux's PATH_MAX is 4,096, but names of models are shorter.
CONVERSATION_BYTES_MAX = 512
# The web UI asks for all conversations that it keeps: 1,000 of them, 200 B each.
LOOKUP_BYTES_MAX = 256 * 1024

# Most names in a question, and conversations in its answer: the web UI's, twice. An entry takes up to 650 bytes, so a
# worker's part fits a note.
LOOKUP_MAX = 2_000

_offset = re.compile(r"[0-9]{1,15}").fullmatch


class Llama:
    """Routes of conversations. Their POST is an ordinary relayed request."""

    def __init__(self, runtime: Runtime, streams: Streams, rights: Rights) -> None:
        self._runtime = runtime
        self._streams = streams
        self._rights = rights
        self._stream_plans = {"GET": Plan(answer=self.read), "DELETE": Plan(answer=self.stop)}
        lookup = Plan(
            answer=self.lookup, keeps_body=True, check=rights.check_conversations, body_bytes_max=LOOKUP_BYTES_MAX
        )
        self._lookup = {"POST": lookup}

    def routes(self, request: Request) -> dict[str, Plan] | None:
        if request.path == STREAM:
            return self._stream_plans
        return self._lookup if request.path == LOOKUP else None

    def read(self, answer: Answer) -> None:
        """Send the stream from a byte on. Raises HttpError: 404, or 400 for a byte that is gone or was never sent."""
        request = answer.request
        conversation = _conversation_asked(request)
        stream = self._runtime.hub.by_conversation(request.principal.id, conversation)
        if "from" not in query_of(request) and (stream is None or stream.reason is not None):
            answer.send(204)
            return
        if stream is None:
            text = "There is no stream of this conversation, or it ended too long ago."
            raise HttpError(404, text, code="stream_not_found", reason=CloseReason.NOT_FOUND)
        self._rights.check_read(request, stream.id, stream)
        offset = _from(request)
        if offset > stream.event_bytes:
            text = f"The stream has not got as far as byte {offset}: there are {stream.event_bytes}."
            raise HttpError(400, text, code="position_not_reached", param="from")
        place = stream.place(offset)
        if place is None:
            raise HttpError(400, f"Byte {offset} is no longer held; start again.", code="position_lost", param="from")
        request.conversation = conversation
        request.model, request.upstream = stream.terms.model, stream.upstream
        self._runtime.resumed(stream)
        answer.stream(stream, seq=place.seq, rest=place.rest, policy=stream.terms.policy)

    def stop(self, answer: Answer) -> None:
        """The user's Stop: cancel and forget. A second DELETE is no error."""
        hub, request = self._runtime.hub, answer.request
        conversation = _conversation_asked(request)
        stream = hub.by_conversation(request.principal.id, conversation)
        if stream is not None:
            self._rights.check_write(request, stream.id, stream)
            hub.forget_conversation(request.principal.id, conversation)
            self._streams.stop_stream(stream)
        answer.send(204)

    def lookup(self, answer: Answer) -> None:
        """The state of the conversations that the client names, and of no others. Raises HttpError 400, 503."""
        request = answer.request
        self._rights.check_still(request)
        asked = tuple(dict.fromkeys(_ids_asked(request.body)))
        if len(asked) > LOOKUP_MAX:
            raise _too_many("names are in this lookup")
        principal_id, peers = request.principal.id, self._runtime.peers
        questions: dict[int, bytes] = {}
        own = asked
        if peers is not None:
            by_slot: dict[int, list[str]] = {}
            for conversation in asked:
                by_slot.setdefault(owner_of(peers, principal_id, conversation), []).append(conversation)
            own = tuple(by_slot.pop(peers.slot, ()))
            questions = {slot: orjson.dumps([principal_id, names]) for slot, names in by_slot.items()}

        def finish(others: Gathered) -> None:
            if others.missing:
                raise self._runtime.refused(WORKER_BUSY)
            found = self._found(principal_id, own)
            for each in others.answers:
                found.update(orjson.loads(each))
            states = [state for conversation in asked for state in found.get(conversation, ())]
            if len(states) > LOOKUP_MAX:
                raise _too_many("conversations have these names")
            answer.send(200, orjson.dumps(states), [JSON])

        gather(self._runtime, answer, LOOKUP, questions, finish)

    def answer_lookup(self, question: bytes) -> bytes:
        """Answer another worker's question: the conversations that live here."""
        principal_id, asked = orjson.loads(question)
        return orjson.dumps(self._found(principal_id, asked))

    def _found(self, principal_id: str, asked: Iterable[str]) -> dict[str, list[dict[str, object]]]:
        """The conversations by the name that finds them, each once. At most LOOKUP_MAX, and one more if there are."""
        streams = self._runtime.hub.conversations(principal_id)
        by_key = {_key_of(conversation): conversation for conversation in streams}
        keys = sorted(by_key)
        found: dict[str, list[dict[str, object]]] = {}
        left = LOOKUP_MAX + 1
        for name in _broadest(asked):
            key = _key_of(name)
            start = bisect_left(keys, key)
            below = keys[start : min(bisect_left(keys, key + _AFTER_PARTS, start), start + left)]
            found[name] = [self._state_of(by_key[each], streams[by_key[each]]) for each in below]
            left -= len(below)
        return found

    def _state_of(self, conversation: str, stream: CountedStream) -> dict[str, object]:
        began_unix = self._runtime.unix_time() - self._runtime.time()
        return {
            "conversation_id": conversation,
            "is_done": stream.reason is not None,
            "total_bytes": stream.event_bytes,
            "started_at": int(began_unix + stream.opened_at),
            "completed_at": int(began_unix + stream.sealed_at) if stream.reason is not None else 0,
        }


def owner_of(peers: Peers, principal_id: str, conversation: str) -> int:
    """The slot of a conversation's worker, the same for all its variants, which are looked up together."""
    return peers.owner_of_name(principal_id, conversation.partition("::")[0])


def owner_asked(peers: Peers, request: Request) -> int | None:
    """The slot of the conversation that a request names; None: it names none."""
    if request.path == STREAM:
        return owner_of(peers, request.principal.id, query_of(request).get("conv_id", ""))
    given = request.get(HEADER) if request.method == "POST" else None
    return owner_of(peers, request.principal.id, given.decode("utf-8", "surrogateescape")) if given else None


def conversation_of(request: Request) -> str:
    """The conversation of a POST, "" for none. Raises HttpError 400."""
    given = request.get(HEADER)
    return _valid(given, "x-conversation-id") if given else ""


def _conversation_asked(request: Request) -> str:
    given = query_of(request).get("conv_id", "")
    if not given:
        raise HttpError(400, "Name the conversation in the query: ?conv_id=…", code="no_conversation", param="conv_id")
    return _valid(given.encode("utf-8", "surrogateescape"), "conv_id")


def _valid(given: bytes, param: str) -> str:
    try:
        conversation = given.decode()
    except UnicodeDecodeError:
        conversation = ""
    if not conversation or len(given) > CONVERSATION_BYTES_MAX:
        text = f"A conversation's id has to be UTF-8 of at most {CONVERSATION_BYTES_MAX} bytes."
        raise HttpError(400, text, code="bad_conversation", param=param)
    return conversation


def _from(request: Request) -> int:
    given = query_of(request).get("from") or "0"
    if not _offset(given):
        text = "from has to be the number of bytes of the stream that you have, 0 or more."
        raise HttpError(400, text, code="bad_from", param="from")
    return int(given)


def _ids_asked(body: bytes) -> list[str]:
    try:
        asked = loaded(body)
    except JsonError as error:
        raise bad_json(error) from None
    ids = asked.get("conversation_ids") if isinstance(asked, dict) else None
    return [each for each in ids if isinstance(each, str)] if isinstance(ids, list) else []


# Names as keys that sort: between the parts a NUL, which no header holds and which comes before all other characters.
# So `a` is directly followed by all `a::…`, whatever other names begin with an `a`.
_PARTS, _AFTER_PARTS = "\0", "\1"


def _key_of(name: str) -> str:
    return name.replace("::", _PARTS)


def _broadest(names: Iterable[str]) -> list[str]:
    """The names that no other of them finds: a lookup of `a` finds `a::some-model`, and whatever is below that."""
    broadest: list[str] = []
    for name in sorted((name for name in names if _PARTS not in name), key=_key_of):
        if not broadest or not _key_of(name).startswith(_key_of(broadest[-1]) + _PARTS):
            broadest.append(name)
    return broadest


def _too_many(found: str) -> HttpError:
    text = f"More than {LOOKUP_MAX} {found}; ask for fewer at a time."
    return HttpError(413, text, code="too_many_found", param="conversation_ids", reason=CloseReason.BODY_TOO_LARGE)
