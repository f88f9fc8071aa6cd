"""Api: everything that streamd knows of an API. Each module beside this one holds an API, and an instance of it.

The defaults are those of a server that behaves like OpenAI's. An API says six things:

    requests    which paths are its own, and which of them ask for a stream
    keys        where its clients put a key, and where its servers look for it
    progress    when an answer is complete, which text and how many tokens it holds
    words       the shape of an error, a gap and a farewell that its SDKs understand
    wholes      the events of a stream that say the same as an answer given whole
    texts       which events are pure text, and where the text is: the replay log's templates (wire/template.py)

The log isn't told the API, because published events may be of any API. So every API is asked for an event's texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import ClassVar, Final, NamedTuple

from streamd.wire.dialects.excerpt import excerpt
from streamd.wire.dialects.failure import Failure
from streamd.wire.dialects.members import (
    TOKENS_MAX,
    Json,
    Usage,
    clean,
    count_of,
    object_of,
    says_yes,
    updated,
    whole_in,
)
from streamd.wire.dialects.merging import Merging
from streamd.wire.json_scan import Watched
from streamd.wire.sse import HEARTBEAT
from streamd.wire.strays import Strays, StraysState

# A choice's index becomes a bit. OpenAI's bound of `n` is 128; a higher index is an upstream's fault, and ignored.
CHOICE_INDEX_MAX: Final = 1023

# An event of an API: its type, if it has one, and its data.
NamedEvent = tuple[str | None, Json]

# The `type` of an upstream's error that states none.
UPSTREAM_ERROR: Final = "upstream_error"

_UNSTATED: Final[Usage] = (-1, -1)

# A member with a count, whose end is seen: a piece of an answer may cut it.
_STATED: Final = re.compile(
    rb'"(completion_tokens|output_tokens|candidatesTokenCount|thoughtsTokenCount'
    rb'|prompt_tokens|input_tokens|promptTokenCount)"'
    rb"[ \t\r\n]{0,16}:[ \t\r\n]{0,16}([0-9][0-9.eE+-]{0,31})(?=[ \t\r\n,}\]])"
).findall


def tokens_stated(data: bytes) -> list[tuple[bytes, int]]:
    """The tokens that these bytes of a whole answer state, each count with the name it has there.

    For every API alike: a path that isn't known (Vertex AI's, Google's `/v1beta/openai/`) may lead to a server of any.
    """
    counts = ((name, whole_in(digits, TOKENS_MAX)) for name, digits in _STATED(data))
    return [(name, count) for name, count in counts if count is not None]


def tokens_made(stated: Mapping[bytes, int]) -> int:
    """The output tokens of a whole answer. Some servers state them under two names; Google counts thoughts apart."""
    google = stated.get(b"candidatesTokenCount", 0) + stated.get(b"thoughtsTokenCount", 0)
    return max(google, *(stated.get(name, 0) for name in (b"completion_tokens", b"output_tokens")))


def tokens_read(stated: Mapping[bytes, int]) -> int:
    """The input tokens of a whole answer."""
    return max(stated.get(name, 0) for name in (b"prompt_tokens", b"input_tokens", b"promptTokenCount"))


class Part:
    """A choice's text in a parsed event: its places, each an object and a name in it, and the choice around (or {}).

    `merges`: no member beside the text prevents a merge (wire/dialects/merging.py).
    """

    __slots__ = ("index", "merges", "places", "whole")

    def __init__(self, whole: Json, index: int, places: list[tuple[Json, str]], *, merges: bool = True) -> None:
        self.whole = whole
        self.index = index
        self.places = places
        self.merges = merges

    def texts(self) -> list[str]:
        """The text in each place; twice the same if a server sends it under two names."""
        return [holder[name] for holder, name in self.places]


class Api:
    """The description of an API; the defaults are OpenAI's."""

    # requests
    paths: ClassVar[tuple[str, ...]] = ()  # whole paths of the API,
    below: ClassVar[tuple[str, ...]] = ()  # and the prefixes of all its other paths
    streams: ClassVar[bool] = True  # whether a request can ask for a stream
    # keys
    key_field: ClassVar[bytes] = b""  # the header field in which clients send a key, beside Authorization,
    key_parameter: ClassVar[str] = ""  # and the query parameter
    # progress
    done_ends: ClassVar[bool] = False  # whether `[DONE]` is the end
    framing_ends: ClassVar[bool] = False  # whether an answer is complete wherever its framing ends
    numbered: ClassVar[bool] = False  # whether events have a sequence_number, which errors continue
    # words
    data_only: ClassVar[bool] = False  # whether an answer may hold no other lines than an event's data
    error_name: ClassVar[str | None] = None  # the event type of an error,
    reconnect_name: ClassVar[str | None] = "reconnect"  # and of a farewell
    # Written to a reader in silence, without an id. Clients that count events, not bytes, need an event that their SDK
    # ignores; where the API has no such event it is a comment line.
    heartbeat: ClassVar[bytes] = HEARTBEAT
    # texts
    text_keys: ClassVar[tuple[str, ...]] = ()  # members that may hold the text
    listed: ClassVar[str] = ""  # the member that holds a list of choices, each with its own text
    spaces_end: ClassVar[bool] = False  # whether servers pad events with spaces in front of the last brace
    merging: ClassVar[Merging] = Merging({})  # how the members of a text's event merge
    # Matches the text in front of those numbers in a counted member that change from event to event.
    counts: ClassVar[re.Pattern[bytes] | None] = None

    # The members of a request that streamd acts on, in each place where the API's servers look for them.
    watched: ClassVar[Watched] = Watched({"model": None, "stream": None})

    # -- requests

    def serves(self, path: str) -> bool:
        """Whether a request's path, without its query, belongs to this API."""
        return path.rstrip("/") in self.paths or path.startswith(self.below)

    def claims(self, path: str, query: str, field: Callable[[bytes], bytes | None]) -> bool:
        """Whether a request is this API's although other APIs have its path too; `field` gives a header field."""
        return False

    def wants_stream(self, path: str, query: str, fields: Json) -> bool:
        """Whether a request asks for a stream. `fields` are those members of its body that are watched."""
        return self.streams and says_yes(fields.get("stream"))

    def models(self, path: str, fields: Json) -> list[str]:
        """Every model that a request names; the first is the request's target."""
        model = fields.get("model")
        return [model] if isinstance(model, str) else []

    def renamed(self, path: str, model: str, alias: str) -> tuple[str, dict[str, str]]:
        """The path with the upstream's own name of a model, `alias`; and the names in the body to replace, by which."""
        return path, {model: alias}

    # -- lists of models

    list_query: ClassVar[str] = ""  # the query that asks for all models on one page,
    list_fields: ClassVar[tuple[tuple[bytes, bytes], ...]] = ()  # and the fields that ask for the list in this shape

    list_member: ClassVar[str] = "data"  # the member that holds the list,
    entry_name: ClassVar[str] = "id"  # and that of an entry that holds the model's name,
    entry_prefix: ClassVar[str] = ""  # behind this

    def alias_listed(self, alias: str, entry: Json | None, owner: str) -> Json:
        """A list's entry for an alias: made from the model's own `entry`, or from nothing if that isn't listed."""
        return {**(entry or {"object": "model", "owned_by": owner}), "id": alias}

    def model_list(self, entries: list[Json]) -> Json:
        """The list that has these entries."""
        return {"object": "list", "data": entries}

    # -- keys

    def credentials(self, key: bytes) -> list[tuple[bytes, bytes]]:
        """The header fields that carry an upstream's own key to it."""
        return [(b"authorization", b"Bearer " + key)]

    # -- progress

    def see(self, progress: Progress, body: Json, name: str | None) -> None:
        """Note the signs of the answer's end in an event's body; `name` is the event's type."""

    def see_usual(self, progress: Progress, body: Json) -> bool:
        """Take note of an event without a type as servers usually send it, in a single pass, with the result of
        texts(), usage(), see() and is_error(). False: it isn't usual, and nothing was noted.
        """
        return False

    def texts(self, body: Json) -> list[str | None]:
        """Every piece of generated text in an event."""
        return []

    def usage(self, body: Json, before: Usage | None) -> Usage | None:
        """The usage after an event; unchanged if the event doesn't state it."""
        return tokens_of(object_of(body, "usage"), before)

    def is_error(self, body: Json, name: str | None) -> bool:
        """Whether an event is the upstream's report of a failure, which ends its answer."""
        return is_error(body)

    # -- words

    def error(self, status: int, message: str, type: str, code: str, param: str | None) -> Json:
        """The body of an HTTP error. `type` and `code` are the OpenAI error object's."""
        return {"error": openai_error(message, type, code, param)}

    def error_event(self, message: str, type: str, code: str, param: str | None) -> Json:
        """The data of an error event; its `error` is an object."""
        return {"error": openai_error(message, type, code, param)}

    def failure_event(self, failure: Failure) -> Json:
        """The data of an error event that tells an upstream's own error: its type, code and text, as it gave them, and
        its Retry-After as `retry_after` in seconds: the SDKs hand out the object, and read no header here any more.
        """
        own = {"message": failure.message, "type": failure.type or UPSTREAM_ERROR, "code": failure.code}
        status = {"status": failure.status} if failure.status >= 400 else {}
        return {"error": {"param": failure.param, **status, **waits(failure), **failure.given, **own}}

    def gap_event(self, progress: Progress, gap: bytes) -> tuple[str | None, bytes]:
        """Type and data of an event that the SDKs take for an event without content; `gap` is a member of it."""
        return "gap", b"{%b}" % gap

    # -- wholes

    def as_events(self, body: Json) -> list[NamedEvent] | None:
        """The events of a stream that says the same as a whole answer, but for `[DONE]`; None if this is no answer.

        Everything in the answer stands in some event. The object may be used up.
        """
        return None

    # -- texts

    def parts(self, parsed: Json) -> list[Part] | None:
        """The texts of an event of this API, a part for each choice; [] if it adds more than texts, or may not repeat.

        None for an event of another API. The members of the top level are judged by wire/template.py.
        """
        return None


class ProgressState(NamedTuple):
    """A Progress between two events; the members are Progress's own."""

    complete: bool
    terminal: bool
    failed: bool
    begun: int
    finished: int
    strays: StraysState | None
    usage: Usage | None
    usage_at: int
    text_events: int
    text_bytes: int
    response_id: str | None
    sequence_number: int | None
    chunk_head: bytes


class Progress:
    """How far a stream has come, from the events that were shown to it. Tolerates anything.

    It has to see all events except pure text of a shape seen before: at least the first of each choice.
    """

    __slots__ = (
        "_begun",
        "_finished",
        "api",
        "chunk_head",
        "complete",
        "failed",
        "response_id",
        "sequence_number",
        "strays",
        "terminal",
        "text_bytes",
        "text_events",
        "usage",
        "usage_at",
    )

    def __init__(self, api: Api) -> None:
        self.api = api
        self.complete = api.framing_ends  # a proper end of the framing from here on is no truncation
        self.terminal = False  # nothing can follow: the reader may close and has completed. terminal implies complete
        self.failed = False  # the upstream told an error; in all known dialects this is terminal
        self._begun = 0  # bit i: choice i was mentioned
        self._finished = 0  # bit i: choice i has its finish_reason
        self.strays: Strays | None = None  # lines of the upstream's that were dropped, once there are any
        self.usage: Usage | None = None  # by the upstream's own count
        self.usage_at = -1  # the stream's text events when the upstream last stated its output; -1: it never did
        self.text_events = 0  # the number of seen events with text
        self.text_bytes = 0  # UTF-8 bytes of that text
        self.response_id: str | None = None  # of the first response.created; it doesn't change any more
        self.sequence_number: int | None = None  # the last one seen (Responses)
        # The members of the first chunk that a gap event repeats: id, object, created, model, as JSON.
        self.chunk_head = b""

    def state(self) -> ProgressState:
        """What go_on_from() takes."""
        return ProgressState(
            self.complete,
            self.terminal,
            self.failed,
            self._begun,
            self._finished,
            self.strays.state() if self.strays is not None else None,
            self.usage,
            self.usage_at,
            self.text_events,
            self.text_bytes,
            self.response_id,
            self.sequence_number,
            self.chunk_head,
        )

    def go_on_from(self, state: ProgressState) -> None:
        """Take the state of another Progress of the same API. Raises ValueError for a state that none has."""
        if (state.terminal and not state.complete) or state.finished & ~state.begun:
            raise ValueError(
                "an answer that has ended and isn't complete, or with an end of a choice that hasn't begun"
            )
        if state.begun >> CHOICE_INDEX_MAX + 1 or state.usage_at < -1 or min(state.text_events, state.text_bytes) < 0:
            raise ValueError("an answer with counts that can't be")
        self.strays = Strays() if state.strays is not None else None
        if self.strays is not None and state.strays is not None:
            self.strays.go_on_from(state.strays)
        self.complete, self.terminal, self.failed = state.complete, state.terminal, state.failed
        self._begun, self._finished = state.begun, state.finished
        self.usage, self.usage_at = state.usage, state.usage_at
        self.text_events, self.text_bytes = state.text_events, state.text_bytes
        self.response_id, self.sequence_number = state.response_id, state.sequence_number
        self.chunk_head = state.chunk_head

    def see(self, event: bytes, unseen_texts: int = 0) -> None:
        """Take note of a whole event. `unseen_texts` is the number of text events that weren't shown until now."""
        name, opening, body = excerpt(event)
        if opening.startswith(b"[DONE]"):  # the OpenAI SDK's own rule
            if self.api.done_ends:
                self.end()
            return
        if body is not None:
            if name is None and self.api.see_usual(self, body):
                return
            self._count(body, unseen_texts)
            self.api.see(self, body, name)
        if self.api.is_error(body or {}, name):  # an event named `error` may hold plain text
            self.failed = True
            self.end()

    def count_text(self, text_bytes: int) -> None:
        """Note an event with so many bytes of text."""
        if text_bytes:
            self.text_events += 1
            self.text_bytes += text_bytes

    def _count(self, body: Json, unseen_texts: int) -> None:
        self.count_text(sum(len(text.encode()) for text in self.api.texts(body) if text))
        read, made = self.api.usage(body, _UNSTATED) or _UNSTATED
        if made >= 0:
            self.usage_at = unseen_texts + self.text_events
        self.usage = updated(self.usage, read if read >= 0 else None, made if made >= 0 else None)

    def tokens(self, text_events: int) -> int:
        """The tokens of the stream, which has had `text_events`.

        The upstream's count if no text came after it, else the larger of that count and the text events: Anthropic
        states a 1 at the start, and a reader may leave before the true count at the end.
        """
        stated = self.usage[1] if self.usage is not None and self.usage_at >= 0 else 0
        return stated if self.usage_at == text_events else max(stated, text_events)

    def end(self) -> None:
        """The answer is complete, and nothing can follow."""
        self.complete = self.terminal = True

    def see_choice(self, index: object, finished: bool) -> None:
        """Note that a choice was mentioned, and whether it has its end."""
        if type(index) is int and 0 <= index <= CHOICE_INDEX_MAX:
            self._begun |= 1 << index
            if finished:
                self._finished |= 1 << index

    def weigh_choices(self) -> None:
        """The answer is complete when every choice that was mentioned has its end."""
        if not self.terminal:
            self.complete = self._begun != 0 and self._begun == self._finished


def tokens_of(usage: Json, before: Usage | None) -> Usage | None:
    """OpenAI's usage object, or Anthropic's: servers of either write both."""
    read = count_of(usage, "prompt_tokens", "input_tokens")
    made = count_of(usage, "completion_tokens", "output_tokens")
    return updated(before, read, made)


def is_error(body: Json) -> bool:
    """Whether an object is an error in a shape of OpenAI's, Google's and their like, FastAPI's, or SGLang's.

    A member `error` that is null, false or empty is none: some servers send it with each chunk.
    """
    if body.get("object") == "error" or body.keys() == {"detail"}:
        return True
    error = body.get("error")
    return isinstance(error, (dict, str)) and bool(error)


def google_tokens_of(body: Json, before: Usage | None) -> Usage | None:
    """Google's usage, in an event of its API."""
    usage = object_of(body, "usageMetadata")
    made = [count_of(usage, name) for name in ("candidatesTokenCount", "thoughtsTokenCount")]
    counted = [count for count in made if count is not None]
    return updated(before, count_of(usage, "promptTokenCount"), sum(counted) if counted else None)


def waits(failure: Failure) -> Json:
    """The member of an error object that says when to ask again; none if the upstream didn't say it."""
    return {} if failure.wait_s is None else {"retry_after": failure.wait_s}


def openai_error(message: str, type: str, code: str, param: str | None) -> Json:
    """OpenAI's error object."""
    return {
        "message": clean(message),
        "type": type,
        "param": None if param is None else clean(param),
        "code": code,
    }
