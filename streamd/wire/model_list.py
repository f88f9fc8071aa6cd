"""ModelList: a server's list of models, taken apart so that parts of it can be shown, and put together again.

The shape of a list stays where a single server answers: an object with its further members, or an array alone. Pages
(`has_more`, `first_id`, `last_id`, `nextPageToken`) are the server's own then. A list that streamd makes, of several
servers or for a key with fewer models, is a single page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import orjson

from streamd.wire.dialects.api import Api
from streamd.wire.dialects.members import Json

# A part beside its bytes: a tuple with its head for the collector, a str, a bytes object, and its place.
PART_BYTES: Final = 72 + 49 + 33 + 8
# Members beside the list that a key with fewer models may see, and their bytes: each is searched for the names of all
# other models. OpenAI's list has one such member, Anthropic's three.
AROUND_MEMBERS_MAX: Final = 32
AROUND_BYTES_MAX: Final = 4096

# The members that hold a list: llama.cpp and Ollama have both. The second is left out of a list that is changed.
_LISTS: Final = ("data", "models")
# The members of an entry that hold its name.
_NAMES: Final = ("id", "name", "model")
_NEXT_PAGE: Final = frozenset(("nextPageToken", "next_page_token", "next_page", "next"))
# Parameters that ask for another page than the first.
CURSORS: Final = frozenset(("after_id", "before_id", "after", "before", "cursor", "page", "pageToken", "page_token"))

Entry = tuple[str, bytes]


class ModelList(NamedTuple):
    """A list of models."""

    entries: tuple[Entry, ...]  # names, and the entries as JSON
    # The members of the list's object as JSON, in their order, `member` with no value; None: the list is an array
    # alone; (): the answer wasn't understood.
    around: tuple[Entry, ...] | None = ()
    member: str = ""  # the name of the list in its object
    whole: bytes = b""  # the server's answer, for a list that is shown as it is

    @property
    def is_list(self) -> bool:
        """Whether the answer was understood; one that wasn't can only be shown as it is."""
        return self.around != ()

    @property
    def size_bytes(self) -> int:
        """The memory that it takes."""
        parts = (*self.entries, *(self.around or ()))
        return len(self.whole) + sum(len(name) + len(value) + PART_BYTES for name, value in parts)

    def joined(self) -> bytes:
        """The list as JSON, in the shape in which the server has it."""
        return _joined(self.entries, self.around, self.member)


def list_in(body: bytes, api: Api, owner: str) -> tuple[list[tuple[str, Json]], ModelList] | None:
    """A server's list: its models as (name, entry), and the list around them, without entries; None for any other body.

    An entry that is a name alone becomes an object of the API's; entries without a name are left out.
    """
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if isinstance(found, list):
        return _models_of(found, api, owner), ModelList((), None)
    if not isinstance(found, dict):
        return None
    member = next((each for each in (api.list_member, *_LISTS) if isinstance(found.get(each), list)), None)
    if member is None:
        return None
    around = []
    for name, value in found.items():
        if name == member or name not in _LISTS:
            around.append((name, b"" if name == member else _written(value)))
    return _models_of(found[member], api, owner), ModelList((), tuple(around), member)


def on_one_page(api: Api, lists: Iterable[ModelList], shows: Callable[[str], bool], *, keeps_shape: bool) -> bytes:
    """The models of these lists that may be shown, as JSON; of two with a name the first.

    The members around are the first list's, or with `keeps_shape` its whole shape, less those that name a model which
    may not be shown.
    """
    lists = tuple(lists)
    merged: dict[str, bytes] = {}
    hidden = set()
    for each in lists:
        for name, entry in each.entries:
            if shows(name):
                merged.setdefault(name, entry)
            else:
                hidden |= {_written(name), b"/" + _written(name)[1:]}
    entries = tuple(merged.items())
    first = next((each for each in lists if each.around is not None or keeps_shape), None)
    if first is not None and first.around is None:
        return _joined(entries, None, "")
    member = api.list_member
    if first is None or first.around is None:
        around: tuple[Entry, ...] = tuple((name, _written(value)) for name, value in api.model_list([]).items())
    else:
        member = first.member if keeps_shape else member
        around = tuple((member if name == first.member else name, value) for name, value in first.around)
    names = {"first_id": next(iter(merged), None), "last_id": next(reversed(merged), None), "has_more": False}
    paged = [
        (name, _written(names[name]) if name in names else value) for name, value in around if name not in _NEXT_PAGE
    ]
    if hidden:
        paged = [each for each in paged[:AROUND_MEMBERS_MAX] if each[0] in names or not _tells(each, hidden)]
        if all(name != member for name, _ in paged):
            paged.append((member, b""))
    return _joined(entries, tuple(paged), member)


def _tells(member: Entry, hidden: set[bytes]) -> bool:
    name, value = member
    if len(name) + len(value) > AROUND_BYTES_MAX:
        return True
    text = _written(name) + value
    return any(each in text for each in hidden)


def _joined(entries: Iterable[Entry], around: tuple[Entry, ...] | None, member: str) -> bytes:
    listed = [orjson.Fragment(entry) for _, entry in entries]
    if around is None:
        return orjson.dumps(listed)
    return orjson.dumps({name: listed if name == member else orjson.Fragment(value) for name, value in around})


def _models_of(entries: list[Any], api: Api, owner: str) -> list[tuple[str, Json]]:
    models = []
    for entry in entries:
        if isinstance(entry, str) and entry:
            name = entry.removeprefix(api.entry_prefix)
            models.append((name, api.alias_listed(name, None, owner)))
        elif isinstance(entry, dict):
            names = (entry.get(member) for member in (api.entry_name, *_NAMES))
            found = next((name for name in names if isinstance(name, str)), None)
            if found is not None:
                own = isinstance(entry.get(api.entry_name), str)
                name = found.removeprefix(api.entry_prefix)
                models.append((name, entry if own else api.alias_listed(name, entry, owner)))
    return models


def _written(value: object) -> bytes:
    """A value as JSON; null for one that is deeper than orjson writes."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return b"null"
