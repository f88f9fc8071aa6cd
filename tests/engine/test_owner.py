"""The owner's copies: after any fault the engine has the log, byte for byte, and no copy is read as another log."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from fakes import event
from model_engine import ModelEngine, ModelLink, id_of
from sinks import new_hub

from streamd.core.guard import Guard
from streamd.core.replay import ReplayLog, check_parts
from streamd.core.stream import Stream
from streamd.engine import owner
from streamd.engine.connection import EngineError
from streamd.engine.entry import parse
from streamd.engine.facts import facts_of, pack_facts
from streamd.engine.owner import CopyFound, CopyOwner, CopyState, EngineServer, OwnedCopy
from streamd.engine.reading import CopyReader
from streamd.engine.shards import CopyKeys
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect

KEYS = CopyKeys()
LIVE_TTL_S = 1800


def new_log() -> ReplayLog:
    return ReplayLog(bytes_max=1 << 20, events_max=1 << 20)


class Rig:
    """An owner, a model of the engine behind a link, and streams."""

    def __init__(self, *, log_bytes_max: int = 1 << 20) -> None:
        self.now = 1000.0
        self.bugs: list[tuple[str, Exception]] = []
        self.turns: list[Callable[[], None]] = []
        self.gone: list[EngineServer] = []
        self.hub = new_hub(stream_log_bytes_max=log_bytes_max)
        self.engine = ModelEngine()
        self.link = ModelLink(self.engine, lambda: self.owner.server_up(self.server))
        self.server = EngineServer(self.link)
        self.owner = CopyOwner(
            [self.server],
            lambda stream_id: self.server,
            member="m1",
            keys=KEYS,
            guard=Guard(lambda where, error: self.bugs.append((where, error))),
            time=lambda: self.now,
            soon=self.turns.append,
            facts=lambda stream: pack_facts(facts_of(stream, self.now, 1e9)),
            live_ttl_s=LIVE_TTL_S,
            on_gone=self.gone.append,
        )

    def open(self) -> Stream:
        return self.hub.open(Dialect.CHAT, self.now)

    def copy(self, stream: Stream) -> OwnedCopy:
        return self.server.copies[stream.id]

    def state(self, stream: Stream) -> CopyState:
        return self.copy(stream).state

    def grow(self, stream: Stream, *texts: str) -> None:
        for text in texts:
            stream.append(event(text), self.now)
        self.owner.grown(stream)

    def seal(self, stream: Stream) -> None:
        stream.seal(CloseReason.COMPLETE, self.now, clean=True)
        self.owner.grown(stream)

    def tick(self, later_s: float = 0.25) -> None:
        self.now += later_s
        self.owner.tick(self.now)
        while self.turns:
            self.turns.pop(0)()

    def settle(self) -> None:
        """Until nothing is left to do. Twelve seconds: an evicted copy is renewed once in ten."""
        for _ in range(48):
            self.tick()
            self.link.turn()
        assert self.bugs == []

    def entries(self, stream: Stream) -> list[Any]:
        return self.engine.execute((b"XRANGE", KEYS.log(stream.id), b"-", b"+"))  # type: ignore[no-any-return]

    def read(self, stream: Stream) -> CopyReader:
        """The copy, read from its newest start on."""
        entries = [parse(entry) for entry in self.entries(stream)]
        starts = [number for number, entry in enumerate(entries) if entry.starts_over]
        reader = CopyReader(new_log)
        for entry in entries[starts[-1] :] if starts else []:
            reader.take(entry)
        return reader

    def check(self, stream: Stream) -> CopyReader:
        """The copy has the log, and the end if there is one."""
        reader, log = self.read(stream), stream.log
        assert reader.log is not None and reader.log.seq_next == log.seq_next
        held, copied = log.parts(), reader.log.parts()
        check_parts(copied)
        assert copied.templates == held.templates and copied.segments[-len(held.segments) :] == held.segments
        assert (reader.end is not None) == (stream.reason is not None)
        return reader


@pytest.fixture
def rig() -> Rig:
    made = Rig()
    made.link.up()
    return made


def commands(rig: Rig) -> list[bytes]:
    """The names of the commands, without those that tell members on a stream's channel."""
    return [command[0] for command in rig.link.commands if command[0] not in (b"PUBLISH", b"PUBSUB")]


def test_ten_tokens_are_a_command(rig: Rig) -> None:
    stream = rig.open()
    for _ in range(5):
        rig.grow(stream, *[" token"] * 10)
        rig.link.turn()
    assert commands(rig) == [b"XADD", b"PEXPIRE", *[b"XADD"] * 4]
    rig.check(stream)


def test_entries_are_few_bytes_beside_raw_events(rig: Rig) -> None:
    stream = rig.open()
    for _ in range(50):
        rig.grow(stream, *[" token"] * 10)
        rig.link.turn()
    held = sum(len(field) for _, fields in rig.entries(stream) for field in fields)
    raw = stream.frame_bytes
    assert raw / held > 20


def test_the_first_entry_has_the_facts_and_raises_the_fence(rig: Rig) -> None:
    stream = rig.open()
    rig.grow(stream, " a")
    rig.link.turn()
    entry = parse(rig.entries(stream)[0])
    assert (entry.position, entry.raised_by, entry.last_seq, entry.starts_over) == ((1, 0), "m1", 1, True)
    facts = rig.check(stream).facts
    assert facts is not None and (facts.id, facts.dialect) == (stream.id, Dialect.CHAT)
    assert rig.engine.expiries[KEYS.log(stream.id)] == LIVE_TTL_S * 1000


def test_the_end_comes_with_the_last_events_and_keeps_the_copy_for_the_retention(rig: Rig) -> None:
    stream = rig.open()
    rig.grow(stream, " a")
    rig.link.turn()
    stream.append(event(" b"), rig.now)
    rig.seal(stream)
    rig.link.turn()
    assert len(rig.entries(stream)) == 2 and rig.state(stream) is CopyState.DONE
    end = rig.check(stream).end
    assert end is not None and (end.reason, end.clean) == ("complete", True)
    assert rig.engine.expiries[KEYS.log(stream.id)] == owner.ENDED_TTL_S_MIN * 1000


def test_an_end_alone_raises_the_fence(rig: Rig) -> None:
    stream = rig.open()
    rig.grow(stream, " a")
    rig.link.turn()
    rig.seal(stream)
    rig.link.turn()
    assert [entry[0] for entry in rig.entries(stream)] == [b"1-0", b"2-0"]
    assert rig.state(stream) is CopyState.DONE
    rig.check(stream)


def test_without_a_link_nothing_is_written_and_nothing_is_kept() -> None:
    rig = Rig()
    stream = rig.open()
    for _ in range(100):
        rig.grow(stream, " a")
        rig.tick()
    assert rig.link.commands == [] and not rig.copy(stream).has_mark
    rig.link.up()
    rig.settle()
    assert commands(rig) == [b"XADD", b"PEXPIRE"]
    rig.check(stream)


def test_a_stream_has_one_write_on_its_way(rig: Rig) -> None:
    stream = rig.open()
    for _ in range(10):
        rig.grow(stream, " a")
        rig.tick()
    assert commands(rig) == [b"XADD"]
    rig.link.turn()
    rig.tick()  # without another event
    rig.link.turn()
    assert commands(rig) == [b"XADD", b"PEXPIRE", b"XADD"]
    rig.check(stream)


def test_a_link_without_room_gets_nothing_until_it_has_room(rig: Rig) -> None:
    stream = rig.open()
    rig.link.room = False
    rig.grow(stream, " a")
    rig.tick()
    assert rig.link.commands == []
    rig.link.room = True
    rig.settle()
    rig.check(stream)


def test_events_that_come_while_a_write_is_on_its_way_wait_for_the_next_second(rig: Rig) -> None:
    stream = rig.open()
    rig.grow(stream, " a")
    for _ in range(3):
        stream.append(event(" b"), rig.now)
        rig.link.turn()
        rig.tick()
    assert commands(rig) == [b"XADD", b"PEXPIRE"] and not rig.server.unsettled
    rig.owner.grown(stream)
    rig.link.turn()
    rig.check(stream)


def test_the_end_of_a_stream_that_is_sealed_while_a_write_is_on_its_way_follows_at_once(rig: Rig) -> None:
    stream = rig.open()
    rig.grow(stream, " a")
    stream.append(event(" b"), rig.now)
    rig.seal(stream)
    rig.link.turn()
    assert rig.state(stream) is CopyState.DONE
    rig.check(stream)


def test_a_large_log_is_written_in_entries_of_a_bounded_size(rig: Rig) -> None:
    stream = rig.open()
    rig.grow(stream, *[" token" * 100] * 1000)
    rig.link.turn()
    sizes = [len(parse(entry).record) for entry in rig.entries(stream)]
    assert len(sizes) > 5 and max(sizes) < owner.ENTRY_BYTES_MAX + 2000
    rig.check(stream)


def test_a_copy_that_was_evicted_is_written_anew_at_once_but_not_time_and_again(rig: Rig) -> None:
    stream = rig.open()
    rig.grow(stream, " a")
    rig.link.turn()
    for number, writes in ((1, 2), (2, 2)):
        rig.engine.flush()
        rig.grow(stream, " b")
        rig.link.turn()
        rig.tick()
        rig.link.turn()
        assert rig.owner.counts.writes_start == writes and rig.owner.counts.refused_gone == number
        assert len(rig.gone) == number
    assert rig.entries(stream) == [] and rig.state(stream) is CopyState.NEW
    rig.settle()
    assert rig.check(stream).position == (3, 0), "a fence is never used twice"


def test_a_copy_of_a_failover_goes_on_where_the_new_primary_ends(rig: Rig) -> None:
    stream = rig.open()
    for text in (" a", " b", " c", " d"):
        rig.grow(stream, text)
        rig.link.turn()
    rig.link.cut()
    rig.engine.fail_over(2)
    rig.link.up()
    rig.settle()
    assert [entry[0] for entry in rig.entries(stream)] == [b"1-0", b"1-2", b"1-4"]
    assert rig.owner.counts.found[CopyFound.BEHIND] == 1
    rig.check(stream)


def test_a_failover_in_front_of_our_fence_raises_it_again(rig: Rig) -> None:
    stream = rig.open()
    rig.grow(stream, " a")
    rig.link.turn()
    rig.seal(stream)
    rig.link.turn()
    rig.link.cut()
    rig.engine.fail_over(1)
    rig.link.up()
    rig.settle()
    assert rig.check(stream).position == (3, 0) and rig.owner.counts.found[CopyFound.OLDER] == 1


def test_a_write_whose_reply_was_lost_is_found_to_be_there(rig: Rig) -> None:
    stream = rig.open()
    rig.grow(stream, " a")
    rig.link.cut(carried_out=1)
    rig.link.up()
    rig.settle()
    assert [entry[0] for entry in rig.entries(stream)] == [b"1-0"]
    assert rig.owner.counts.found[CopyFound.CURRENT] == 1
    rig.check(stream)


def declared(rig: Rig, stream: Stream, *fields: bytes, fence: int = 2, member: bytes = b"m2") -> Any:
    """Another member raises the fence."""
    last = b"%d" % (stream.log.seq_next - 1)
    return rig.engine.execute((b"XADD", KEYS.log(stream.id), b"%d-0" % fence, b"w", member, b"n", last, *fields))


DEAD = (b"e", b'{"reason":"node_lost","clean":false}')


def test_an_owner_that_was_declared_dead_takes_its_stream_back(rig: Rig) -> None:
    stream = rig.open()
    rig.grow(stream, " a")
    rig.link.turn()
    declared(rig, stream, *DEAD)
    rig.grow(stream, " b")
    rig.settle()
    reader = rig.check(stream)
    assert reader.position == (3, 0) and rig.owner.counts.revived == 1


def test_a_stream_that_another_member_took_over_is_left_alone(rig: Rig) -> None:
    stream = rig.open()
    rig.grow(stream, " a")
    rig.link.turn()
    declared(rig, stream, b"t", b"m2")
    rig.grow(stream, " b")
    rig.settle()
    assert rig.state(stream) is CopyState.YIELDED
    written = len(rig.entries(stream))
    rig.grow(stream, " c")
    rig.seal(stream)
    rig.link.cut()
    rig.link.up()
    rig.settle()
    assert rig.state(stream) is CopyState.YIELDED and len(rig.entries(stream)) == written


def test_of_two_that_raise_the_fence_one_wins_whatever_it_knows(rig: Rig) -> None:
    """The owner's start over and a declaration, of different seqs, come at the same fence."""
    stream = rig.open()
    rig.grow(stream, " a")
    rig.link.turn()
    stream.append(event(" b"), rig.now)
    declared(rig, stream, *DEAD)
    rig.seal(stream)
    rig.settle()
    ids = [id_of(entry[0]) for entry in rig.entries(stream)]
    assert [fence for fence, _ in ids] == sorted({fence for fence, _ in ids})
    rig.check(stream)


def test_a_trim_beside_a_declaration_destroys_nothing(rig: Rig) -> None:
    stream = rig.open()
    rig.grow(stream, " a", " b")
    rig.link.turn()
    rig.copy(stream).written_units = 1 << 20  # the copy has become too large: the next write starts over and trims
    stream.append(event(" c"), rig.now)
    declared(rig, stream, *DEAD)
    rig.owner.grown(stream)
    rig.link.turn(1)
    assert len(rig.entries(stream)) == 2, "the refused write trims nothing"
    rig.settle()
    rig.check(stream)


def test_a_large_log_that_is_written_anew_replaces_the_former_entries_when_it_is_whole(rig: Rig) -> None:
    stream = rig.open()
    rig.grow(stream, *[" token" * 100] * 400)
    rig.link.turn()
    before = rig.entries(stream)
    rig.copy(stream).written_units = 1 << 20  # the copy has become too large: the next write starts over
    rig.grow(stream, " end")
    writes = 0
    while (entries := rig.entries(stream))[: len(before)] == before:
        reader = CopyReader(new_log)
        for entry in entries:
            reader.take(parse(entry))
        assert reader.log is not None and reader.log.seq_next >= 401, "an owner that dies here loses nothing"
        rig.link.turn(1)
        writes += 1
    assert writes > 3
    rig.link.turn()
    assert parse(rig.entries(stream)[0]).position == (2, 0)
    rig.check(stream)


def test_a_copy_is_bounded_when_its_log_is(rig: Rig) -> None:
    small = Rig(log_bytes_max=8192)
    small.link.up()
    stream = small.open()
    most = 0
    for _ in range(400):
        small.grow(stream, *[" token" * 5] * 10)
        small.link.turn()
        most = max(most, sum(len(field) for _, fields in small.entries(stream) for field in fields))
    assert most < 3 * 8192
    assert small.read(stream).log is not None and small.owner.counts.writes_start > 3
    small.check(stream)


def test_a_start_over_that_a_full_engine_refuses_leaves_no_entry_under_its_fence(rig: Rig) -> None:
    stream = rig.open()
    rig.grow(stream, " a")
    rig.link.turn()
    rig.copy(stream).written_units = 1 << 20  # the copy has become too large: the next write starts over
    rig.engine.is_full = True
    rig.grow(stream, " b")
    rig.link.turn()
    rig.engine.is_full = False
    rig.settle()
    rig.grow(stream, " c")
    rig.link.turn()
    assert rig.check(stream).position.seq > 0 and rig.entries(stream)[0][0].endswith(b"-0")


def test_a_full_engine_is_probed_by_a_single_write_a_second(rig: Rig) -> None:
    streams = [rig.open() for _ in range(50)]
    for stream in streams:
        rig.grow(stream, " a")
    rig.link.turn()
    rig.engine.is_full = True
    before = len(rig.link.commands)
    for _ in range(20):
        for stream in streams:
            rig.grow(stream, " b")
        rig.tick()
        rig.link.turn()
    assert len(rig.link.commands) - before <= 50 + 6
    rig.engine.is_full = False
    rig.settle()
    for stream in streams:
        rig.check(stream)
    assert not rig.server.unsettled


def test_thousands_of_copies_in_a_full_engine_are_looked_at_in_slices(rig: Rig) -> None:
    streams = [rig.open() for _ in range(4 * owner.SLICE_MAX)]
    for stream in streams:
        rig.grow(stream, " a")
    rig.link.turn()
    rig.link.cut()
    rig.link.up()  # none of them can be written before it was looked at
    rig.server.is_full = rig.engine.is_full = True
    for stream in streams:
        stream.append(event(" b"), rig.now)
    for _ in range(12):
        before = len(rig.link.commands)
        rig.tick()
        assert len(rig.link.commands) - before <= owner.SLICE_MAX
        rig.link.turn()
    rig.engine.is_full = False
    rig.settle()
    for stream in streams:
        rig.owner.grown(stream)
    rig.settle()
    for stream in streams:
        rig.check(stream)


def test_a_refusal_of_another_kind_pauses_the_copy(rig: Rig) -> None:
    stream = rig.open()
    key = KEYS.log(stream.id)
    refuse = rig.engine._xadd
    rig.engine._xadd = lambda *rest: EngineError("WRONGTYPE Operation against a key")  # type: ignore[method-assign]
    rig.grow(stream, " a")
    rig.link.turn()
    for _ in range(20):
        rig.tick()
        rig.link.turn()
    assert rig.state(stream) is CopyState.HELD and commands(rig) == [b"XADD"]
    rig.engine._xadd = refuse  # type: ignore[method-assign]
    rig.settle()
    assert key in rig.engine.keys
    rig.check(stream)


@pytest.mark.parametrize("fields", [(b"x", b"y"), (b"d", b"z")])
def test_a_strangers_entry_stops_the_copy_and_nothing_else(rig: Rig, fields: tuple[bytes, ...]) -> None:
    stream = rig.open()
    rig.grow(stream, " a")
    rig.link.turn()
    rig.engine.execute((b"XADD", KEYS.log(stream.id), b"9-0", *fields))
    rig.grow(stream, " b")
    rig.link.turn()
    for _ in range(8):
        rig.tick()
        rig.link.turn()
    assert rig.state(stream) is CopyState.HELD and rig.bugs == []
    assert rig.owner.counts.found[CopyFound.BROKEN] == 1


def test_a_healing_owner_writes_no_more_than_its_bytes_a_second(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [rig.open() for _ in range(300)]
    for stream in streams:
        rig.grow(stream, *[" token" * 20] * 40)
    rig.link.turn()
    monkeypatch.setattr(owner, "HEAL_BYTES_S_MAX", 100_000)
    rig.server.heal_bytes = 0.0
    rig.link.cut()
    rig.engine.flush()
    rig.link.up()
    written = []
    while rig.server.unsettled:
        before = rig.owner.counts.written_bytes
        rig.tick()
        rig.link.turn()
        written.append(rig.owner.counts.written_bytes - before)
    assert len(written) > 40 and sum(written) / len(written) < 30_000
    for stream in streams:
        rig.check(stream)


def test_thousands_of_copies_are_verified_in_slices_live_streams_first(rig: Rig) -> None:
    streams = [rig.open() for _ in range(500)]
    for stream in streams:
        rig.grow(stream, " a")
    rig.link.turn()
    for stream in streams[:250]:
        rig.seal(stream)
    rig.link.turn()
    rig.link.cut()
    rig.link.up()
    rig.link.commands.clear()
    rig.now += 0.25
    rig.owner.tick(rig.now)
    assert len(rig.link.commands) == owner.SLICE_MAX
    asked = [command[1] for command in rig.link.commands]
    assert asked == [KEYS.log(stream.id) for stream in streams[250 : 250 + owner.SLICE_MAX]]
    rig.settle()
    assert not rig.server.unsettled and rig.owner.counts.found[CopyFound.CURRENT] == 500


def test_a_live_copy_is_kept_alive_though_nothing_comes(rig: Rig) -> None:
    stream = rig.open()
    rig.grow(stream, " a")
    rig.link.turn()
    rig.link.commands.clear()
    for _ in range(8):
        rig.tick(LIVE_TTL_S / 8)
        rig.link.turn()
    renewals = commands(rig).count(b"PEXPIRE")
    assert 3 <= renewals <= 5 and set(commands(rig)) == {b"PEXPIRE"}


def test_a_removed_stream_is_forgotten(rig: Rig) -> None:
    stream = rig.open()
    rig.grow(stream, " a")
    rig.owner.removed(stream)
    rig.link.turn()
    assert not rig.server.copies and not rig.server.unsettled and rig.bugs == []
    assert len(rig.entries(stream)) == 1, "its copy ends by its time to live"


def test_streams_of_a_name_have_copies_of_their_own(rig: Rig) -> None:
    first = rig.hub.open(Dialect.UNKNOWN, rig.now, name="news", epoch="aaaaaa")
    rig.grow(first, " a")
    rig.seal(first)
    rig.link.turn()
    rig.hub.remove(first)
    rig.owner.removed(first)
    second = rig.hub.open(Dialect.UNKNOWN, rig.now, name="news", epoch="bbbbbb")
    rig.grow(second, " b")
    rig.link.turn()
    assert sorted(rig.engine.keys) == [KEYS.log("news", "aaaaaa"), KEYS.log("news", "bbbbbb")]


def test_a_mistake_in_one_copy_stops_no_other(rig: Rig) -> None:
    broken, stream = rig.open(), rig.open()
    rig.grow(broken, " a")
    rig.grow(stream, " a")
    rig.link.turn()
    rig.link.cut()
    rig.link.up()
    rig.copy(broken).stream = None  # type: ignore[assignment]
    rig.tick()
    rig.link.turn()
    assert rig.bugs
    rig.check(stream)


OPS = st.sampled_from(
    [
        *["append"] * 8,
        *["grow"] * 6,
        *["turn"] * 6,
        *("tick", "tick", "wait", "cut", "cut", "up", "up", "flush", "evict", "full", "free"),
        *("failover", "declare", "seal", "trim"),
    ]
)


class Storm:
    """Random faults; after each step every copy reads as a part of its stream."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.rig = Rig(log_bytes_max=rng.choice([4000, 1 << 20]))
        self.streams = [self.rig.open() for _ in range(3)]
        self.events: dict[str, list[bytes]] = {stream.id: [] for stream in self.streams}

    def step(self, op: str) -> None:
        rig, rng = self.rig, self.rng
        stream = rng.choice(self.streams)
        match op:
            case "append" if stream.reason is None:
                for _ in range(rng.choice([1, 1, 5, 60])):
                    made = event(rng.choice([" a", " token", "é", '"', "\n", "x" * 300, ""]), rng.choice([0, 0, 0, 1]))
                    self.events[stream.id].append(made)
                    stream.append(made, rig.now)
            case "grow":
                rig.owner.grown(stream)
            case "turn" if rig.link.is_up:
                rig.link.turn(rng.choice([1, 2, 100]))
            case "tick" | "wait":
                rig.tick(0.25 if op == "tick" else 11.0)
            case "cut" if rig.link.is_up:
                rig.link.cut(rng.randint(0, len(rig.link.asked)))
            case "up" if not rig.link.is_up:
                rig.link.up()
            case "flush":
                rig.engine.flush()
            case "evict":
                rig.engine.evict(KEYS.log(stream.id))
            case "full" | "free":
                rig.engine.is_full = op == "full"
            case "failover":
                # An engine that fails over cuts its connections.
                if rig.link.is_up:
                    rig.link.cut(rng.randint(0, len(rig.link.asked)))
                rig.engine.fail_over(rng.randint(0, min(6, len(rig.engine.written))))
            case "declare":
                entries = rig.entries(stream)
                if entries:
                    newest = parse(entries[-1])
                    declared(rig, stream, *DEAD, fence=newest.position.fence + 1)
            case "seal" if stream.reason is None and rng.random() < 0.3:
                stream.seal(CloseReason.COMPLETE, rig.now, clean=True)
                rig.owner.grown(stream)
            case "trim":
                stream.log.trim_to(rng.choice([0, 500, 3000]))

    def check_copies(self) -> None:
        """Whatever a reader of a copy gets is the stream's, byte for byte."""
        for stream in self.streams:
            copied = prefix_of(self.rig, stream)
            if copied is not None:
                read = copied.read(copied.seek(copied.seq_first), bytes_max=1 << 30)
                assert read == list(enumerate(self.events[stream.id], 1))[copied.seq_first - 1 : copied.seq_next - 1]


def prefix_of(rig: Rig, stream: Stream) -> ReplayLog | None:
    """The log that a follower makes of the copy as it is now: up to a declaration at another place."""
    entries = [parse(entry) for entry in rig.entries(stream)]
    starts = [number for number, entry in enumerate(entries) if entry.starts_over]
    reader = CopyReader(new_log)
    for entry in entries[starts[-1] :] if starts else []:
        if entry.raised_by == "m2":
            break
        reader.take(entry)
    return reader.log


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.lists(OPS, min_size=10, max_size=80))
def test_after_any_storm_the_engine_has_every_log(rng: random.Random, ops: list[str]) -> None:
    storm = Storm(rng)
    rig = storm.rig
    rig.link.up()
    for op in ops:
        storm.step(op)
        storm.check_copies()
    rig.engine.is_full = False
    # A copy that is evicted after its last write is missed when the link is up anew, or the stream grows.
    if rig.link.is_up:
        rig.link.cut()
    rig.link.up()
    for stream in storm.streams:
        rig.owner.grown(stream)
    rig.settle()
    storm.check_copies()
    for stream in storm.streams:
        if stream.log.seq_first < stream.log.seq_next:
            rig.check(stream)
        if stream.reason is not None:
            assert rig.state(stream) is CopyState.DONE
    assert rig.bugs == []


def test_a_wanted_stream_is_written_at_once_and_pushed_to_whoever_listens(rig: Rig) -> None:
    heard: list[bytes] = []
    stream = rig.open()
    stream.append(event(" a"), rig.now)
    rig.engine.listeners[KEYS.channel(stream.id)] = [heard.append]
    rig.owner.wanted(stream)
    rig.link.turn()
    rig.check(stream)
    rig.tick()
    rig.link.turn()
    stream.append(event(" b"), rig.now)
    rig.owner.push()
    rig.link.turn()
    assert stream.id in rig.server.followed and heard, "not only after its next write, a second later"


def test_a_wanted_stream_whose_copy_was_evicted_is_written_anew_though_it_is_finished(rig: Rig) -> None:
    stream = rig.open()
    rig.grow(stream, " a", " b")
    rig.seal(stream)
    rig.link.turn()
    for state in (CopyState.DONE, CopyState.DONE):
        assert rig.state(stream) is state
        rig.engine.evict(KEYS.log(stream.id))
        rig.owner.wanted(stream)
        rig.owner.wanted(stream)
        rig.link.turn()
        rig.check(stream)
    writes = commands(rig).count(b"XADD")
    rig.owner.wanted(stream)
    rig.link.turn()
    assert commands(rig).count(b"XADD") == writes and rig.bugs == [], "a copy that is there is looked at, no more"
