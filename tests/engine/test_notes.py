"""Notes: each is read once, in order, by its member alone, and nothing waits for one that is lost."""

from __future__ import annotations

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from model_engine import ModelEngine, ModelShard

from streamd.core.guard import Guard
from streamd.engine import notes
from streamd.engine.notes import ANSWER_S, NOTE_BYTES_MAX, READ_EVERY_S, ClusterNote, NoteKind, Notes, parse
from streamd.engine.shards import CopyKeys

KEYS = CopyKeys()


class Member:
    """A member's notes, over its own link to the engine that all share."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.shard = ModelShard(world.engine)
        self.read: list[tuple[str, bytes]] = []
        guard = Guard(lambda where, error: world.bugs.append((where, error)))
        self.notes = Notes([self.shard], KEYS, name, guard=guard, time=lambda: world.now)
        self.notes.on(NoteKind.SYNC, self.take)
        self.notes.start()
        self.answers_with: bytes | None = None

    def take(self, note: ClusterNote) -> None:
        if note.body == b"bad":
            raise ValueError("not a body of this kind")
        if note.body == b"bug":
            raise RuntimeError("a mistake")
        self.read.append((note.sender, note.body))
        if self.answers_with is not None:
            assert self.notes.answer(note, self.answers_with)


class World:
    """An engine, and members a and b."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.bugs: list[tuple[str, Exception]] = []
        self.engine_is_slow_s = 0.0
        self.engine = ModelEngine(lambda: self.now - self.engine_is_slow_s)
        self.a, self.b = Member(self, "aaaaa"), Member(self, "bbbbb")
        self.turn()

    def turn(self, seconds: float = 0.0) -> None:
        self.now += seconds
        for member in (self.a, self.b):
            if seconds:
                member.notes.tick(self.now)
        for _ in range(4):
            for member in (self.a, self.b):
                member.shard.turn()

    def tell(self, *bodies: bytes) -> None:
        for body in bodies:
            assert self.a.notes.tell(self.a.shard, "bbbbb", NoteKind.SYNC, body)

    def inbox(self) -> list[object]:
        return self.engine.execute((b"XRANGE", KEYS.inbox("bbbbb"), b"-", b"+"))  # type: ignore[no-any-return]


@pytest.fixture
def world() -> World:
    return World()


def test_a_note_is_read_at_once_once_and_in_order(world: World) -> None:
    world.tell(b"1", b"2", b"3")
    world.turn()
    assert world.b.read == [("aaaaa", b"1"), ("aaaaa", b"2"), ("aaaaa", b"3")] and world.inbox() == []
    world.turn(READ_EVERY_S)
    assert len(world.b.read) == 3 and world.a.read == []


def test_a_note_that_woke_nobody_is_read_within_a_second(world: World) -> None:
    world.engine.loses_messages = True
    world.tell(b"1")
    world.turn()
    assert world.b.read == []
    world.turn(READ_EVERY_S)
    assert world.b.read == [("aaaaa", b"1")]


def test_more_notes_than_a_reply_has_are_all_read(world: World) -> None:
    world.tell(*(b"%d" % number for number in range(100)))
    for _ in range(10):
        world.turn()
    assert [body for _, body in world.b.read] == [b"%d" % number for number in range(100)]


def test_an_engine_with_a_slower_clock_is_read_all_the_same(world: World) -> None:
    world.tell(b"1")
    world.turn()
    world.engine.flush()
    world.engine_is_slow_s = 100.0
    world.tell(b"2")
    world.turn()
    assert [body for _, body in world.b.read] == [b"1", b"2"]


def test_notes_that_a_failover_brings_back_are_passed_over(world: World) -> None:
    world.tell(b"1", b"2")
    world.turn()
    world.engine.fail_over(1)  # without the XDEL
    assert len(world.inbox()) == 2
    world.tell(b"3")
    world.turn()
    assert [body for _, body in world.b.read] == [b"1", b"2", b"3"] and world.b.notes.counts.repeated == 2


def test_a_question_has_one_answer(world: World) -> None:
    world.b.answers_with = b"yes"
    heard: list[bytes | None] = []
    assert world.a.notes.ask(world.a.shard, "bbbbb", NoteKind.SYNC, b"well?", heard.append)
    world.turn()
    assert heard == [b"yes"]
    world.turn(2 * ANSWER_S)
    assert heard == [b"yes"]


def test_a_question_to_a_dead_member_is_given_up(world: World) -> None:
    heard: list[bytes | None] = []
    assert world.a.notes.ask(world.a.shard, "ccccc", NoteKind.SYNC, b"well?", heard.append)
    world.turn(ANSWER_S / 2)
    assert heard == []
    world.turn(ANSWER_S)
    assert heard == [None] and world.a.notes.counts.unanswered == 1


def test_an_answer_of_another_member_is_none(world: World) -> None:
    heard: list[bytes | None] = []
    assert world.a.notes.ask(world.a.shard, "ccccc", NoteKind.SYNC, b"well?", heard.append)
    forged = ClusterNote(NoteKind.SYNC, "aaaaa", 1, 0, b"", world.b.shard)
    assert world.b.notes.answer(forged, b"no")
    world.turn()
    assert heard == []


def test_a_full_engine_ends_a_question_at_once(world: World) -> None:
    world.engine.is_full = True
    heard: list[bytes | None] = []
    assert world.a.notes.ask(world.a.shard, "bbbbb", NoteKind.SYNC, b"well?", heard.append)
    world.turn()
    assert heard == [None] and world.a.notes.counts.refused == 1


def test_without_an_engine_nothing_is_sent_and_nothing_waits(world: World) -> None:
    world.a.shard.link.cut()
    assert not world.a.notes.tell(world.a.shard, "bbbbb", NoteKind.SYNC, b"1")
    assert not world.a.notes.ask(world.a.shard, "bbbbb", NoteKind.SYNC, b"1", lambda answer: None)
    world.turn(READ_EVERY_S)
    world.a.shard.link.up()
    world.tell(b"2")
    world.turn(READ_EVERY_S)
    assert world.b.read == [("aaaaa", b"2")]


def test_a_read_whose_reply_is_lost_is_made_again(world: World) -> None:
    world.tell(b"1")
    world.a.shard.turn()
    world.b.shard.link.cut()
    world.b.shard.link.up()
    world.turn(READ_EVERY_S)
    assert world.b.read == [("aaaaa", b"1")]


def test_at_an_end_all_questions_are_answered(world: World) -> None:
    heard: list[bytes | None] = []
    assert world.a.notes.ask(world.a.shard, "bbbbb", NoteKind.SYNC, b"well?", heard.append)
    world.a.notes.stop()
    assert heard == [None]


def test_the_number_of_questions_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "QUESTIONS_MAX", 2)
    asked = [world.a.notes.ask(world.a.shard, "ccccc", NoteKind.SYNC, b"", lambda answer: None) for _ in range(3)]
    assert asked == [True, True, False]


def test_an_inbox_is_bounded_in_notes_and_bytes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "SMALL_MAX", 8)
    monkeypatch.setattr(notes, "LARGE_MAX", 2)
    world.b.shard.link.cut()
    world.tell(*[b"small"] * 20)
    world.turn()
    assert len(world.inbox()) == 8
    world.tell(*[b"x" * NOTE_BYTES_MAX] * 3)
    world.turn()
    assert len(world.inbox()) == 2
    assert world.engine.expiries[KEYS.inbox("bbbbb")] > 0, "the inbox of a dead member goes"


def test_the_senders_that_are_known_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "SENDERS_MAX", 2)
    for number in range(5):
        put(world, w=b"other%d" % number)
    world.turn(READ_EVERY_S)
    assert len(world.b.read) == 5 and len(world.b.notes._inboxes[0].last_numbers) == 2


def put(world: World, **changes: bytes) -> None:
    """A note that somebody with the engine's password writes."""
    fields = {"k": b"sync", "w": b"ccccc", "n": b"1", "a": b"0", "b": b""} | changes
    flat = [part for name, value in fields.items() for part in (name.encode(), value)]
    world.engine.execute((b"XADD", KEYS.inbox("bbbbb"), b"*", *flat))


BROKEN = [
    {"k": b"newer"},
    {"w": b"a b"},
    {"w": b""},
    {"w": b"x" * 65},
    {"n": b"-1"},
    {"n": b"1e3"},
    {"a": b""},
    {"b": b"x" * (NOTE_BYTES_MAX + 1)},
    {"more": b"x"},
    {"b": b"bad"},
]


@pytest.mark.parametrize("changes", BROKEN, ids=str)
def test_what_is_no_note_is_counted_and_deleted(world: World, changes: dict[str, bytes]) -> None:
    put(world, **changes)
    world.tell(b"good")
    world.turn()
    assert world.b.read == [("aaaaa", b"good")] and world.b.notes.counts.broken == 1
    assert world.inbox() == [] and world.bugs == []


def test_a_mistake_in_the_work_for_a_note_costs_no_other(world: World) -> None:
    world.tell(b"bug", b"2")
    world.turn()
    assert [body for _, body in world.b.read] == [b"2"] and len(world.bugs) == 1


@pytest.mark.parametrize("entry", [None, [], [b"1-1"], [b"1-1", b""], [b"1-1", [b"k"]], [b"1-1", [b"k", 1] * 5]])
def test_replies_that_are_no_entries_are_refused(world: World, entry: object) -> None:
    with pytest.raises(ValueError, match="note"):
        parse(entry, world.b.shard)
