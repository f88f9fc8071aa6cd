"""Every attribute of a live connection has a fate: the table names each once, and lacks no class of a connection."""

from __future__ import annotations

import collections
import dataclasses
import enum
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import CHAT, SSE_HEAD, Rig, chunk, event, get, post, rig

from streamd.handover.slots import FATES, SHARED

VALUES = (str, bytes, bytearray, memoryview, int, float, bool, type(None), enum.Enum)


def class_of(name: str) -> type[Any]:
    module, _, own = name.rpartition(".")
    found: type[Any] = getattr(importlib.import_module(f"streamd.{module}"), own)
    return found


def name_of(kind: type[Any]) -> str:
    return f"{kind.__module__.removeprefix('streamd.')}.{kind.__qualname__}"


def slots_of(kind: type[Any]) -> list[str]:
    found: list[str] = []
    for base in kind.__mro__:
        own = base.__dict__.get("__slots__", ())
        found += [own] if isinstance(own, str) else own
    return found


@pytest.mark.parametrize("name", FATES)
def test_every_attribute_has_one_fate(name: str) -> None:
    named = [slot for slots in FATES[name].values() for slot in slots.split()]
    assert sorted(named) == sorted(slots_of(class_of(name)))
    assert not getattr(class_of(name), "__dictoffset__", 0), "an attribute outside of the slots would have no fate"


def test_shared_objects_exist_and_have_no_fate() -> None:
    assert not SHARED & FATES.keys()
    for name in SHARED:
        class_of(name)


def is_value(thing: Any) -> bool:
    """Whether the thing is a fact by itself: its class doesn't change, or is a row of facts."""
    kind = type(thing)
    is_row = isinstance(thing, tuple) and hasattr(kind, "_fields")
    return isinstance(thing, VALUES) or is_row or (dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen)


def parts_of(thing: Any) -> Iterator[Any]:
    """All that an object of streamd's, or a container, refers to."""
    if isinstance(thing, dict):
        yield from thing.keys()
        yield from thing.values()
    elif isinstance(thing, list | tuple | set | frozenset | collections.deque):
        yield from thing
    elif dataclasses.is_dataclass(thing):
        yield from (getattr(thing, field.name) for field in dataclasses.fields(thing))
    else:
        yield from (getattr(thing, slot, None) for slot in slots_of(type(thing)) if slot != "__weakref__")


def classes_in(*things: Any) -> set[str]:
    """The classes of streamd that live connections consist of, from these connections on."""
    shared = tuple(map(class_of, sorted(SHARED)))
    seen: dict[int, Any] = {}
    waiting = list(things)
    while waiting:
        thing = waiting.pop()
        kind = type(thing)
        if id(thing) in seen or isinstance(thing, (*VALUES, *shared)):
            continue
        if kind.__module__.startswith("streamd.") or isinstance(thing, dict | list | tuple | set | collections.deque):
            seen[id(thing)] = thing
            waiting += parts_of(thing)
    own = (thing for thing in seen.values() if type(thing).__module__.startswith("streamd.") and not is_value(thing))
    return {name_of(type(thing)) for thing in own}


def busy(r: Rig) -> None:
    """Connections in many states: idle, half a head, half a body, waiting, reading, paused, proxied, publishing."""
    r.client()
    r.client(b"GET /v1/x HTTP/1.1\r\nhost")
    r.client(post(CHAT)[:-5])
    r.client(get("/v1/streams/a", "Content-Length: 0", method="PUT"))
    for content_type in ("text/plain", "application/x-ndjson", "text/event-stream"):
        head = f"POST /v1/streams/a/events HTTP/1.1\r\nhost: a\r\ncontent-type: {content_type}\r\n"
        r.client(head.encode() + b'transfer-encoding: chunked\r\n\r\n3\r\n{"a\r\n')
    r.client(get("/v1/streams/a"))
    r.client(get("/v1/streams/later?wait=9"))
    r.client(post(CHAT))
    r.client(post(CHAT), capacity=600)
    r.reply(SSE_HEAD + chunk(event("one ")))
    r.reply(chunk(event("two "), b"data: half"))
    r.client(post(b'{"model":"m"}', path="/v1/responses"))
    r.reply(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"id":')
    r.client(post(b'{"model":"m"}', path="/v1/chat/completions"))
    r.reply(b"HTTP/1.1 200 OK\r\ncontent-ty")


def test_every_class_of_a_live_connection_has_its_fates() -> None:
    with rig() as r:
        busy(r)
        links = [link.protocol for link in r.links]
        found = classes_in(*r.runtime.clients, *links, *r.runtime.hub)
        assert found - FATES.keys() == set(), "decide on the attributes of these classes, in handover/slots.py"
        expected = ("net.intake.Intake", "net.exchange.Exchange", "api.publish.Publishing", "wire.sse.EventSplitter")
        assert found >= set(expected), "the walk has met connections in every state"
