"""Objects that an upstream keeps (OpenAI's responses, conversations, stored chat completions), as requests name them.

A path names an object behind its collection, in each path under which servers have the API and in any case, because a
server may be less strict than its documents. A body names one in `previous_response_id` or `conversation`. The answer
to the request that makes an object begins with its `id`.
"""

from __future__ import annotations

import functools
import re
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

from streamd.wire.json_scan import JsonError, JsonScan, Watched
from streamd.wire.path_models import PATHS_KNOWN_MAX

_COLLECTION: Final = re.compile(
    r"/v1(?:beta)?/(?:[^/]+/)*?(responses|conversations|chat/completions)(?:/+(.*))?", re.IGNORECASE | re.DOTALL
)
# Operations on no object: POST /v1/responses/compact.
_OPERATIONS: Final = ("input_tokens", "compact")
# Each POST makes one of these. Chat completions are kept only where the body's `store` asks for it.
_LEARNED: Final = ("responses", "conversations")
# A path that is decoded twice on its way names another object at each time.
_DECODED_MAX: Final = 3

# The members of a request for a response that are acted on.
WATCHED: Final = Watched(
    {"model": None, "stream": None, "previous_response_id": None, "conversation": Watched({"id": None})}
)

# The member of a request for a chat completion that asks the server to keep it.
STORE: Final = "store"

# An answer without its id in front of that may be long: its output, 16,000 tokens.
READ_BYTES_MAX: Final = 64 * 1024


class InPath(NamedTuple):
    """What a path says of kept objects."""

    ids: tuple[str, ...] = ()  # of the object that it names, once for each way in which it may be decoded
    makes: bool = False  # the answer's id is that of a new object,
    stores: bool = False  # or is if the body asks for it
    lists: bool = False  # the answer tells of all objects


@functools.lru_cache(PATHS_KNOWN_MAX)
def in_path(method: str, path: str) -> InPath:
    """What a request's method and path say."""
    found = _COLLECTION.fullmatch(path)
    if found is None:
        return InPath()
    first, _, rest = (found[2] or "").partition("/")
    if not first:
        is_post = method == "POST"
        is_made = found[1].lower() in _LEARNED
        return InPath(makes=is_post and is_made, stores=is_post and not is_made, lists=not is_post)
    if method == "POST" and not rest.strip("/") and first.lower() in _OPERATIONS:
        return InPath()
    ids: dict[str, None] = {}
    for _ in range(_DECODED_MAX):
        ids[first] = None
        first = unquote(first)
    return InPath(tuple(ids))


def ids_in(fields: dict[str, Any]) -> list[str | None]:
    """The objects that a body names; None for a value that is no id."""
    named = []
    for value in (fields.get("previous_response_id"), fields.get("conversation")):
        if isinstance(value, dict):
            value = value.get("id")
        if value:
            named.append(value if isinstance(value, str) else None)
    return named


class IdReader:
    """Finds the `id` at the top of a JSON answer that comes piece by piece."""

    __slots__ = ("_data", "_scan")

    def __init__(self) -> None:
        self._scan: JsonScan | None = JsonScan(Watched({"id": None}))  # None: it is found, or won't be
        self._data = bytearray()

    @property
    def read(self) -> bytes | None:
        """What go_on_from() takes; None: the id was found, or won't be."""
        return bytes(self._data) if self._scan is not None else None

    def go_on_from(self, read: bytes | None) -> None:
        """Take the bytes that another reader has read without finding an id."""
        if read is None:
            self._end()
        elif read:
            self.feed(read)

    def feed(self, piece: bytes) -> str | None:
        """The next bytes; the id once, when it has come."""
        scan = self._scan
        if scan is None:
            return None
        self._data += piece[: READ_BYTES_MAX - len(self._data)]
        try:
            scan.feed(self._data)
            found = scan.fields(self._data).get("id") if scan.found else None
        except JsonError:
            self._end()
            return None
        if scan.found or len(self._data) >= READ_BYTES_MAX:
            self._end()
        return found if isinstance(found, str) else None

    def _end(self) -> None:
        self._scan = None
        self._data = bytearray()
