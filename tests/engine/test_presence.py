"""Presence: the owner of a followed stream knows of readers here, and why the last of them left."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from sinks import Loop, Reader, new_hub

from streamd.core.stream import Stream
from streamd.engine import presence
from streamd.engine.notes import NoteKind
from streamd.engine.presence import RENEW_S, Presence, Readership
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect

OWNER = "aaaaa"


class Told:
    """Takes notes, while it can."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, NoteKind, Any]] = []
        self.can_send = True

    def tell(self, shard: object, member: str, kind: NoteKind, body: bytes) -> bool:
        if self.can_send:
            self.notes.append((member, kind, orjson.loads(body)))
        return self.can_send


class Node:
    """A member that follows streams of an owner."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.loop = Loop()
        self.hub = new_hub(self.loop)
        self.told = Told()
        notes: Any = self.told
        self.presence = Presence(notes, lambda: self.now)
        self.followed: dict[Stream, Readership] = {}
        self.owner = OWNER

    def open(self) -> Stream:
        stream = self.hub.open(Dialect.CHAT, self.now)
        self.followed[stream] = Readership()
        return stream

    def tick(self, seconds: float = 0.25) -> list[tuple[str, NoteKind, Any]]:
        """The notes of a tick."""
        self.now += seconds
        shard: Any = None
        for stream, readership in self.followed.items():
            self.presence.look(readership, shard, self.owner, stream)
        self.presence.tell()
        notes, self.told.notes = self.told.notes, []
        return notes


@pytest.fixture
def node() -> Node:
    return Node()


def test_readers_of_a_tick_are_told_in_a_single_note_and_again_in_time(node: Node) -> None:
    streams = [node.open() for _ in range(3)]
    for stream in streams[:2]:
        Reader(stream, node.loop)
    ids = [stream.id for stream in streams[:2]]
    assert node.tick() == [(OWNER, NoteKind.FOLLOW, ids)]
    assert node.tick() == []
    assert node.tick(RENEW_S) == [(OWNER, NoteKind.FOLLOW, ids)]


def test_the_last_readers_leaving_is_told_once_with_its_reason(node: Node) -> None:
    stream = node.open()
    reader = Reader(stream, node.loop)
    node.tick()
    node.followed[stream].left_for = CloseReason.READER_GONE
    reader.subscriber.end()
    stream.leave(reader.subscriber)
    assert node.tick() == [(OWNER, NoteKind.LEFT, [[stream.id, "reader_gone"]])]
    assert node.tick() == [] and node.tick(RENEW_S) == []


def test_what_cannot_be_sent_is_told_later(node: Node) -> None:
    stream = node.open()
    reader = Reader(stream, node.loop)
    node.told.can_send = False
    assert node.tick() == []
    node.told.can_send = True
    assert node.tick() == [(OWNER, NoteKind.FOLLOW, [stream.id])]
    reader.subscriber.end()
    stream.leave(reader.subscriber)
    node.told.can_send = False
    assert node.tick() == []
    node.told.can_send = True
    assert node.tick() == [(OWNER, NoteKind.LEFT, [[stream.id, "network_lost"]])]


def test_a_new_owner_is_told_at_once(node: Node) -> None:
    stream = node.open()
    Reader(stream, node.loop)
    node.tick()
    node.owner = "ccccc"
    assert node.tick() == [("ccccc", NoteKind.FOLLOW, [stream.id])]


def test_an_owner_knows_of_an_end_by_itself(node: Node) -> None:
    stream = node.open()
    reader = Reader(stream, node.loop)
    node.tick()
    stream.seal(CloseReason.COMPLETE, node.now, clean=True)
    reader.subscriber.end()
    assert node.tick(RENEW_S) == []


def test_a_note_has_a_bound(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "NOTE_STREAMS_MAX", 2)
    readers = [Reader(node.open(), node.loop) for _ in range(5)]
    assert [len(ids) for _, _, ids in node.tick()] == [2, 2, 1]
    for reader in readers:
        reader.subscriber.end()
        reader.stream.leave(reader.subscriber)
    assert [(kind, len(rows)) for _, kind, rows in node.tick()] == [
        (NoteKind.LEFT, 2),
        (NoteKind.LEFT, 2),
        (NoteKind.LEFT, 1),
    ]
