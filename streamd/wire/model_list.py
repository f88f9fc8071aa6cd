"""ModelList: a server's list of models, taken apart so that parts of it can be shown, and put together again.

The shape of a list stays where a single server answers: an object with its further members, or an array alone. Pages
(`has_more`, `first_id`, `last_id`, `nextPageToken`) are the server's own then. A list that streamd makes, of several
servers or for a key with fewer models, is a single page. It is put together in steps, a turn of the loop each: a key
may have many patterns, and each model that it may not see is searched for in the members around the list.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any, Final, NamedTuple

import orjson

from streamd.wire.dialects.api import Api
from streamd.wire.dialects.members import Json
from streamd.wire.model_names import MODELS_MAX, ListTooLarge

# A part beside its bytes: a tuple with its head for the collector, a str, a bytes object, and its place.
PART_BYTES: Final = 72 + 49 + 33 + 8
# Members beside the list that are kept where it is taken apart, and their bytes where a key sees fewer models: each is
# searched for the names of all others. OpenAI's list has one such member, Anthropic's three.
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
    fault: str = ""  # why a list that would have to be taken apart was not

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


def list_in(found: Any, api: Api, owner: str) -> tuple[list[tuple[str, Json]], ModelList] | None:
    """A server's parsed list: its models as (name, entry), and the list around them, without entries; None for any
    other value. Raises ListTooLarge.

    An entry that is a name alone becomes an object of the API's; entries without a name are left out.
    """
    if isinstance(found, list):
        return _models_of(found, api, owner), ModelList((), None)
    if not isinstance(found, dict):
        return None
    member = next((each for each in (api.list_member, *_LISTS) if isinstance(found.get(each), list)), None)
    if member is None:
        return None
    around: list[Entry] = []
    for name, value in found.items():
        if name == member or (name not in _LISTS and len(around) < AROUND_MEMBERS_MAX):
            around.append((name, b"" if name == member else _written(value)))
    return _models_of(found[member], api, owner), ModelList((), tuple(around), member)


def on_one_page(
    api: Api, lists: Iterable[ModelList], shows: Callable[[str], bool], *, keeps_shape: bool
) -> Generator[None, None, bytes]:
    """The models of these lists that may be shown, as JSON; of two with a name the first. Yields after each model.

    The members around are the first list's, or with `keeps_shape` its whole shape, less those that name a model which
    may not be shown.
    """
    lists = tuple(lists)
    first = next((each for each in lists if each.around is not None or keeps_shape), None)
    around = _around(api, first, keeps_shape=keeps_shape) if first is None or first.around is not None else None
    seen = tuple(around or ())[:AROUND_MEMBERS_MAX]
    texts = {name: _written(name) + value for name, value in seen if len(name) + len(value) <= AROUND_BYTES_MAX}
    merged: dict[str, bytes] = {}
    hides = False
    for each in lists:
        for name, entry in each.entries:
            if shows(name):
                merged.setdefault(name, entry)
            else:
                hides, written = True, _written(name)
                texts = {own: text for own, text in texts.items() if not _tells(text, written)}
            yield
    entries = tuple(merged.items())
    if around is None:
        return _joined(entries, None, "")
    member = first.member if first is not None and keeps_shape else api.list_member
    names = {"first_id": next(iter(merged), None), "last_id": next(reversed(merged), None), "has_more": False}
    if hides:
        around = tuple(part for part in seen if part[0] in names or part[0] in texts)
        if all(name != member for name, _ in around):
            around = (*around, (member, b""))
    paged = (
        (name, _written(names[name]) if name in names else value) for name, value in around if name not in _NEXT_PAGE
    )
    return _joined(entries, tuple(paged), member)


def _around(api: Api, first: ModelList | None, *, keeps_shape: bool) -> tuple[Entry, ...]:
    """The members around a page: those of its first list, or else the API's own."""
    if first is None or first.around is None:
        return tuple((name, _written(value)) for name, value in api.model_list([]).items())
    member = first.member if keeps_shape else api.list_member
    return tuple((member if name == first.member else name, value) for name, value in first.around)


def _tells(text: bytes, name: bytes) -> bool:
    """Whether a member names a model: its name as JSON, alone or at the end of a path."""
    return name in text or b"/" + name[1:] in text


def _joined(entries: Iterable[Entry], around: tuple[Entry, ...] | None, member: str) -> bytes:
    listed = [orjson.Fragment(entry) for _, entry in entries]
    if around is None:
        return orjson.dumps(listed)
    return orjson.dumps({name: listed if name == member else orjson.Fragment(value) for name, value in around})


def _models_of(entries: list[Any], api: Api, owner: str) -> list[tuple[str, Json]]:
    if len(entries) > MODELS_MAX:
        raise ListTooLarge(f"it names more than {MODELS_MAX} models")
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
