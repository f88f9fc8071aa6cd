"""Records: the state of an object as facts by name, and bytes, for another process, perhaps of another version.

    record     version of the format (1 byte), length of the JSON (4 bytes, the highest first), JSON, then each of the
               bytes that the JSON numbers: length (4 bytes), bytes
    JSON       an object: `kind`, and a member for each fact

Versions. A release reads and writes the newest version and the version before, so that a roll-back moves objects as an
upgrade does. The giver writes the newest version that both sides know (agreed_version). A fact that a version adds says
so (`since`) and has a default, the value of objects that know nothing of it: in the version before it is left out, and
an object with another value can't be written there. A name that the reader doesn't know is never ignored, because it
would mean behaviour: the record is refused, and with it the unit that it belongs to, and nothing else.

A record is untrusted input: unpack() checks each fact by its kind of value, the restored object its own rules. Both
raise ValueError (RecordError is one), after work bounded by the record's bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Final, Generic, NamedTuple, TypeVar

import orjson

from streamd.handover.values import Blobs, RecordError, Value, told

# The newest version. The next one needs a copy of the records of this one among the tests' fixtures.
VERSION: Final = 1

State = TypeVar("State")


class _Required:
    """The default of a fact that has none."""


REQUIRED: Final = _Required()


class Fact(NamedTuple):
    """A fact of a record: its kind of value, the first version that has it, its value where it is missing."""

    value: Value
    since: int = 1
    default: Any = REQUIRED


class RecordKind(Generic[State]):
    """A kind of record: the facts of a state, which is a named tuple or a dataclass. It is a Value in other records."""

    def __init__(self, name: str, state: type[State], facts: Mapping[str, Value | Fact]) -> None:
        self.name = name
        self.state = state
        self.facts = {each: fact if isinstance(fact, Fact) else Fact(fact) for each, fact in facts.items()}
        fields = _fields_of(state)
        assert set(fields) == set(self.facts), f"{name}: {set(fields) ^ set(self.facts)} on one side only"
        assert "kind" not in fields
        assert all(fact.since == 1 or fact.default is not REQUIRED for fact in self.facts.values()), name

    def put(self, value: Any, blobs: list[bytes], version: int) -> dict[str, Any]:
        """As in Value."""
        if type(value) is not self.state:
            raise RecordError(f"{type(value).__name__} where {self.state.__name__} should be")
        out: dict[str, Any] = {"kind": self.name}
        for name, fact in self.facts.items():
            own = getattr(value, name)
            if fact.since <= version:
                try:
                    out[name] = fact.value.put(own, blobs, version)
                except RecordError as error:
                    raise RecordError(f"{self.name}.{name}: {error}") from None
            elif own != fact.default:
                raise RecordError(f"{self.name}.{name} can't be told in version {version} of the format")
        return out

    def get(self, given: Any, blobs: Blobs, version: int) -> State:
        """As in Value."""
        if type(given) is not dict or given.get("kind") != self.name:
            raise RecordError(f"{told(given)} where a record of the kind {self.name} should be")
        facts: dict[str, Any] = {}
        for name, fact in self.facts.items():
            if name in given and fact.since <= version:
                try:
                    facts[name] = fact.value.get(given[name], blobs, version)
                except RecordError as error:
                    raise RecordError(f"{self.name}.{name}: {error}") from None
            elif fact.default is REQUIRED:
                raise RecordError(f"{self.name}.{name} is missing")
            elif name not in given:
                facts[name] = fact.default
        unknown = given.keys() - facts.keys() - {"kind"}
        if unknown:
            raise RecordError(f"{self.name} has facts that this version doesn't know: {', '.join(sorted(unknown))}")
        return self.state(**facts)


class AnyOf:
    """A record of one of these kinds, inside another record. The kinds have different states."""

    def __init__(self, *kinds: RecordKind[Any]) -> None:
        self._by_name = {kind.name: kind for kind in kinds}
        self._by_state = {kind.state: kind for kind in kinds}

    def put(self, value: Any, blobs: list[bytes], version: int) -> dict[str, Any]:
        """As in Value."""
        kind = self._by_state.get(type(value))
        if kind is None:
            raise RecordError(f"{type(value).__name__} can't be told")
        return kind.put(value, blobs, version)

    def get(self, given: Any, blobs: Blobs, version: int) -> Any:
        """As in Value."""
        name = given.get("kind") if type(given) is dict else None
        kind = self._by_name.get(name) if type(name) is str else None
        if kind is None:
            raise RecordError(f"a record of none of the kinds {', '.join(self._by_name)}")
        return kind.get(given, blobs, version)


def readable_versions(newest: int = VERSION) -> tuple[int, ...]:
    """The versions that a release with this newest version reads and writes."""
    return (newest,) if newest == 1 else (newest, newest - 1)


def agreed_version(others: Collection[int], newest: int = VERSION) -> int | None:
    """The newest version that both sides know; None if there is none, so that nothing can be handed over."""
    return max(set(others) & set(readable_versions(newest)), default=None)


def pack(kind: Value, state: Any, version: int = VERSION) -> bytes:
    """The record of a state. Raises RecordError for a state that can't be told in this version."""
    blobs: list[bytes] = []
    facts = orjson.dumps(kind.put(state, blobs, version))
    out = [bytes((version,)), len(facts).to_bytes(4, "big"), facts]
    for blob in blobs:
        out += (len(blob).to_bytes(4, "big"), blob)
    return b"".join(out)


def unpack(kind: Value, data: bytes, newest: int = VERSION) -> Any:
    """The state in a record. Raises RecordError for any other bytes."""
    if not data or data[0] not in readable_versions(newest):
        raise RecordError(f"a record of version {data[:1].hex() or 'none'}, which this streamd doesn't read")
    facts, *blobs = _cut(data)
    try:
        given = orjson.loads(facts)
    except orjson.JSONDecodeError:
        raise RecordError("facts that are not JSON") from None
    reading = Blobs(blobs)
    state = kind.get(given, reading, data[0])
    if not reading.are_used:
        raise RecordError("a record with bytes that no fact has")
    return state


def _cut(data: bytes) -> list[bytes]:
    """The pieces behind the version."""
    pieces: list[bytes] = []
    at = 1
    while at < len(data) or not pieces:
        start = at + 4
        at = start + int.from_bytes(data[at:start], "big")
        if start > len(data) or at > len(data):
            raise RecordError("a record shorter than the lengths in it say")
        pieces.append(data[start:at])
    return pieces


def _fields_of(state: type[Any]) -> tuple[str, ...]:
    if dataclasses.is_dataclass(state):
        return tuple([field.name for field in dataclasses.fields(state)])
    fields: tuple[str, ...] = state._fields
    return fields
