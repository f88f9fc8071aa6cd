"""Followed streams: sought once for all who ask, and gone when no reader, no engine or no owner is left."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from model_engine import ModelShard
from sinks import Loop, Reader, new_hub
from test_owner import KEYS, Rig

from streamd.config import Settings
from streamd.core.guard import Guard
from streamd.core.stream import Stream
from streamd.engine.entry import parse
from streamd.engine.followed import GONE_S, IDLE_S, LOOKS_MAX, LOOKS_MIN, TOLD_TURN_MAX, FollowedStreams
from streamd.engine.members import Sign
from streamd.engine.notes import NoteKind, Notes
from streamd.net.http_error import HttpError
from streamd.reasons import CloseReason


class Heard:
    """A seeker, and its outcome."""

    def __init__(self) -> None:
        self.outcomes: list[Stream | str] = []

    def found(self, stream: Stream) -> None:
        self.outcomes.append(stream)

    def absent(self) -> None:
        self.outcomes.append("absent")

    def unreachable(self) -> None:
        self.outcomes.append("unreachable")

    def no_room(self, refused: HttpError) -> None:
        self.outcomes.append("no room")


class Node:
    """Another member's followed streams, on the engine of an owner's Rig."""

    def __init__(self, own: Rig) -> None:
        self.own = own
        self.loop = Loop()
        self.hub = new_hub(self.loop)
        self.shard = ModelShard(own.engine)
        self.link, self.channels = self.shard.link, self.shard.channels
        self.sign = Sign.LIVES  # of every owner
        self.lost = False
        self.is_unsure = False
        self.places, self.places_max = 0, 1000
        runtime: Any = SimpleNamespace(
            hub=self.hub,
            time=lambda: own.now,
            unix_time=lambda: 1e9,
            guard=Guard(lambda where, error: own.bugs.append((where, error))),
            loop=SimpleNamespace(
                call_soon=lambda call, *given: self.loop.soon(lambda: call(*given)),
                call_later=self.loop.later,
            ),
            settings=Settings(),
            admit_stream=self.admit,
            admission=SimpleNamespace(release_stream=self.release),
        )
        members: Any = SimpleNamespace(
            ask_for_sign=lambda server, member, answer: answer(self.sign),
            is_lost=lambda server, member: self.lost and member == "m1",
            may_lack_copies=lambda server: self.is_unsure,
        )
        servers: Any = SimpleNamespace(shard_of=lambda stream_id: self.shard)
        self.notes = Notes([self.shard], KEYS, self.hub.member, guard=runtime.guard, time=runtime.time)
        self.followed = FollowedStreams(runtime, Settings(engine_patience_s=4.0), servers, KEYS, members, self.notes)
        self.hub.on_removed = self.followed.removed

    def admit(self) -> None:
        if self.places == self.places_max:
            raise HttpError(503, "full", code="over_capacity")
        self.places += 1

    def release(self) -> None:
        self.places -= 1

    def turn(self) -> None:
        self.channels.turn()
        if self.link.is_up:
            self.link.turn()
        self.loop.rest()

    def seek(self, stream: Stream) -> Heard:
        heard = Heard()
        assert self.followed.seek(stream.id, heard)
        return heard

    def found(self, stream: Stream) -> Stream:
        """The stream, as it is here."""
        heard = self.seek(stream)
        for _ in range(4):
            self.turn()
        (here,) = heard.outcomes
        assert isinstance(here, Stream)
        return here

    def pass_time(self, seconds: float) -> None:
        for _ in range(round(seconds * 4)):
            self.own.tick()
            if self.own.link.is_up:
                self.own.link.turn()
            self.followed.tick(self.own.now)
            self.hub.sweep(tuple(self.hub), self.own.now)
            self.turn()
        assert self.own.bugs == []


@pytest.fixture
def own() -> Rig:
    made = Rig()
    made.link.up()
    return made


def written(own: Rig, *texts: str) -> Stream:
    """A stream with a copy of these texts."""
    stream = own.open()
    own.grow(stream, *texts)
    own.link.turn()
    return stream


def test_a_stream_is_followed_once_for_all_who_seek_it(own: Rig) -> None:
    node, stream = Node(own), written(own, " a", " b")
    heard = [node.seek(stream) for _ in range(3)]
    for _ in range(4):
        node.turn()
    here = node.hub.get(stream.id)
    assert [each.outcomes for each in heard] == [[here]] * 3 and len(node.followed) == node.places == 1
    assert here is not None and here.events == 2 and here.terms.is_copy and here.source is not None


def test_a_stream_without_a_reader_is_followed_a_while_longer_and_then_dropped(own: Rig) -> None:
    node, stream = Node(own), written(own, " a")
    here = node.found(stream)
    reader = Reader(here, node.loop, leave=lambda each: node.hub.leave(each, CloseReason.READER_GONE, own.now))
    node.pass_time(3 * IDLE_S)
    assert len(node.followed) == 1 and here.reason is None
    reader.subscriber.end()
    here.leave(reader.subscriber)
    node.pass_time(IDLE_S - 1)
    assert len(node.followed) == 1
    node.pass_time(2)
    assert len(node.followed) == node.places == len(node.hub) == 0
    assert not any(own.engine.listeners.values()), "and nothing is listened to"


def test_a_stream_that_nobody_has_is_absent(own: Rig) -> None:
    node, stream = Node(own), own.open()
    node.sign = Sign.UNKNOWN
    heard = node.seek(stream)
    node.turn()
    assert heard.outcomes == ["absent"] and len(node.followed) == node.places == 0


def test_a_stream_is_not_called_absent_while_copies_may_be_missing(own: Rig) -> None:
    node, stream = Node(own), own.open()
    node.sign, node.is_unsure = Sign.UNKNOWN, True
    heard = node.seek(stream)
    node.turn()
    assert heard.outcomes == ["unreachable"] and len(node.followed) == node.places == 0


def test_a_stream_that_was_this_workers_own_is_looked_for_once(own: Rig) -> None:
    node = Node(own)
    heard = Heard()
    assert node.followed.seek(node.hub.new_id(), heard)
    node.turn()
    assert heard.outcomes == ["absent"] and not node.loop.timers


def test_thousands_of_seekers_of_a_stream_are_answered_in_slices(own: Rig) -> None:
    node, stream = Node(own), written(own, " a")
    heard = [node.seek(stream) for _ in range(2 * TOLD_TURN_MAX + 1)]
    node.channels.turn()
    node.link.turn()
    node.loop.turn()
    assert sum(len(each.outcomes) for each in heard) == TOLD_TURN_MAX
    node.followed.give_up(stream.id, heard[-1])
    node.loop.turn()
    here = node.hub.get(stream.id)
    assert here is not None
    node.hub.remove(here)
    node.loop.rest()
    assert [len(each.outcomes) for each in heard] == [1] * (2 * TOLD_TURN_MAX) + [0]
    assert own.bugs == [] and node.places == 0


def test_a_seeker_of_a_stream_that_went_before_its_turn_may_come_again(own: Rig) -> None:
    node, stream = Node(own), written(own, " a")
    heard = [node.seek(stream) for _ in range(TOLD_TURN_MAX + 1)]
    node.channels.turn()
    node.link.turn()
    node.loop.turn()
    here = node.hub.get(stream.id)
    assert here is not None
    node.hub.remove(here)
    node.loop.rest()
    assert heard[-1].outcomes == ["unreachable"] and own.bugs == []


def test_a_stream_that_was_just_opened_is_looked_for_again(own: Rig) -> None:
    node, stream = Node(own), own.open()
    heard = node.seek(stream)
    node.turn()
    assert heard.outcomes == []
    own.grow(stream, " a")
    own.link.turn()
    node.loop.ring()
    for _ in range(4):
        node.turn()
    assert isinstance(heard.outcomes[0], Stream)


LOOKS = {Sign.LIVES: LOOKS_MIN, Sign.SILENT: LOOKS_MAX, Sign.UNSURE: LOOKS_MAX, Sign.LOST: 1, Sign.UNKNOWN: 1}


@pytest.mark.parametrize("sign", LOOKS)
def test_a_stream_is_absent_only_if_its_owner_would_have_written_it(own: Rig, sign: Sign) -> None:
    node, stream = Node(own), own.open()
    node.sign = sign
    heard = node.seek(stream)
    looks = 0
    while not heard.outcomes:
        node.turn()
        looks += 1
        if not heard.outcomes:
            node.loop.ring()
    is_known = sign in (Sign.LIVES, Sign.LOST, Sign.UNKNOWN)
    assert heard.outcomes == ["absent" if is_known else "unreachable"]
    assert looks == LOOKS[sign] and len(node.followed) == 0 and not node.loop.timers


def test_an_id_without_a_copy_takes_no_place_from_others(own: Rig) -> None:
    node, stream = Node(own), own.open()
    heard = node.seek(stream)
    node.turn()
    assert heard.outcomes == [] and node.places == 0


def test_a_stream_without_room_for_it_is_told_so(own: Rig) -> None:
    node, stream = Node(own), written(own, " a")
    node.places_max = 0
    heard = [node.seek(stream) for _ in range(2)]
    for _ in range(4):
        node.turn()
    assert [each.outcomes for each in heard] == [["no room"]] * 2
    assert len(node.followed) == len(node.hub) == node.places == 0 and not any(own.engine.listeners.values())
    node.places_max = 1
    assert node.found(stream).events == 1


def test_a_stream_that_requests_wait_for_is_followed_until_its_owner_is_lost(own: Rig) -> None:
    """They are ahead of the copy, and no readers yet."""
    node, stream = Node(own), written(own, " a")
    here = node.found(stream)
    own.link.is_up = False
    for _ in range(3):
        node.pass_time(IDLE_S - 1)
        node.followed.awaited(here, own.now)
    node.lost = True
    node.pass_time(2)
    assert here.reason is CloseReason.NODE_LOST


def test_while_the_engine_is_away_nothing_is_sought_and_readers_are_sent_away(own: Rig) -> None:
    node, stream = Node(own), written(own, " a")
    here = node.found(stream)
    node.link.cut()
    node.pass_time(6)
    assert not node.followed.seek("s_" + "x" * 27, Heard())
    assert len(node.followed) == node.places == 0 and here.reason is None
    node.link.up()
    assert node.found(stream).events == 1


def test_a_seeker_that_gave_up_hears_nothing_and_leaves_nothing(own: Rig) -> None:
    node, stream = Node(own), written(own, " a")
    first, second = node.seek(stream), node.seek(stream)
    node.followed.give_up(stream.id, first)
    assert len(node.followed) == 1
    node.followed.give_up(stream.id, second)
    assert len(node.followed) == node.places == 0
    node.turn()
    assert first.outcomes == second.outcomes == [] and own.bugs == []


def test_a_copy_with_the_facts_of_another_stream_is_absent(own: Rig) -> None:
    node, stream, other = Node(own), written(own, " a"), own.open()
    own.engine.keys[KEYS.log(other.id)] = own.engine.keys[KEYS.log(stream.id)]
    node.sign = Sign.UNKNOWN
    heard = node.seek(other)
    node.turn()
    assert heard.outcomes == ["absent"] and len(node.hub) == 0


def test_a_finished_stream_is_kept_for_a_moment(own: Rig) -> None:
    node, stream = Node(own), written(own, " a")
    own.seal(stream)
    own.link.turn()
    here = node.found(stream)
    assert here.reason is CloseReason.COMPLETE and here.ended_clean
    node.pass_time(12)
    assert len(node.followed) == node.places == len(node.hub) == 0


def test_a_lost_owners_stream_ends_at_its_last_event_for_all(own: Rig) -> None:
    one, two, stream = Node(own), Node(own), written(own, " a", " b")
    here = [node.found(stream) for node in (one, two)]
    readers = [Reader(each, node.loop) for each, node in zip(here, (one, two), strict=True)]
    own.link.is_up = False
    for node in (one, two):
        node.lost = True
    for _ in range(10):
        one.pass_time(1)
        two.pass_time(1)
    assert [each.reason for each in here] == [CloseReason.NODE_LOST] * 2 and [each.events for each in here] == [2, 2]
    for reader in readers:
        assert reader.ended is False and f"id: {stream.id}:2!".encode() in reader.sent and b"node_lost" in reader.sent
    entries = [parse(entry) for entry in own.entries(stream)]
    assert [entry.end is not None for entry in entries] == [False, True], "one of them declared it"
    assert one.followed.lost + two.followed.lost == 2
    late = Node(own)
    assert late.found(stream).reason is CloseReason.NODE_LOST


def test_the_declaration_has_the_events_that_only_pushes_brought(own: Rig) -> None:
    node, stream = Node(own), written(own, " a")
    here = node.found(stream)
    own.grow(stream, " b")
    own.link.turn()
    own.tick()
    own.link.turn()
    node.turn()
    stream.append(b'data: {"choices":[{"delta":{"content":" c"}}]}\n\n', own.now)
    own.owner.push()
    own.link.turn()
    node.turn()
    assert here.events == 3, "the copy has two"
    own.link.is_up = False
    node.lost = True
    node.pass_time(6)
    assert here.reason is CloseReason.NODE_LOST
    assert Node(own).found(stream).events == 3
    own.link.up()
    own.settle()
    own.check(stream)  # the owner lives after all, and takes its stream back
    assert own.owner.counts.revived == 1


def test_a_copy_that_is_gone_with_its_owner_is_written_from_what_is_here(own: Rig) -> None:
    node, stream = Node(own), written(own, " a", " b")
    here = node.found(stream)
    own.engine.flush()
    own.link.is_up = False
    node.lost = True
    node.pass_time(8)
    assert here.reason is CloseReason.NODE_LOST
    assert Node(own).found(stream).events == 2


def lose_owner(own: Rig, node: Node, here: Stream) -> None:
    """The owner's node dies: its readers here are told."""
    own.link.is_up = False
    node.lost = True
    node.pass_time(8)
    assert here.reason is CloseReason.NODE_LOST


def test_a_stream_that_this_process_has_no_more_ends_where_its_copy_does(own: Rig) -> None:
    node, stream = Node(own), written(own, " a")
    node.followed._member = "m1"  # the writer of the copy
    here = node.found(stream)
    own.link.is_up = False
    node.pass_time(8)
    assert here.reason is CloseReason.NODE_LOST


def test_a_reader_that_is_ahead_keeps_the_stream_until_its_owner_is_known_to_be_lost(own: Rig) -> None:
    node, stream = Node(own), written(own, " a")
    here = node.found(stream)
    node.followed.awaited(here, own.now)
    own.link.is_up = False
    node.pass_time(IDLE_S + 2)
    node.lost = True
    node.pass_time(2)
    assert here.reason is CloseReason.NODE_LOST


def test_an_owner_is_told_of_a_copy_that_is_gone_and_has_time_to_write_it(own: Rig) -> None:
    node, stream = Node(own), written(own, " a")
    here = node.found(stream)
    reader = Reader(here, node.loop)
    own.engine.evict(KEYS.log(stream.id))
    node.pass_time(GONE_S)
    notes = [fields for _, fields in own.engine.keys[KEYS.inbox("m1")].entries]
    assert any(b"sync" in fields for fields in notes) and here.reason is None
    node.pass_time(15)
    assert here.reason is CloseReason.NODE_LOST and reader.ended is False, "its owner has it no more"


def late(own: Rig, stream: Stream) -> tuple[int, CloseReason | None]:
    """The events and the end that a node finds which asks for the stream only now."""
    found = Node(own).found(stream)
    return found.events, found.reason


def test_a_copy_that_a_failover_shortened_is_written_from_what_is_here(own: Rig) -> None:
    node, stream = Node(own), written(own, " a")
    own.grow(stream, " b")
    own.link.turn()
    here = node.found(stream)
    own.engine.fail_over(1)
    lose_owner(own, node, here)
    assert late(own, stream) == (2, CloseReason.NODE_LOST)


def test_an_owner_that_is_lost_while_it_starts_over_leaves_no_reader_waiting(own: Rig) -> None:
    node, stream = Node(own), written(own, " a")
    own.grow(stream, " b")
    own.link.turn()
    here = node.found(stream)
    own.engine.execute((b"XADD", KEYS.log(stream.id), b"2-0", *own.entries(stream)[0][1]))
    lose_owner(own, node, here)
    assert late(own, stream) == (2, CloseReason.NODE_LOST)


@pytest.mark.parametrize("is_early", [False, True])
def test_an_owner_that_is_lost_in_the_middle_of_a_start_over_takes_no_text_along(own: Rig, is_early: bool) -> None:
    node, stream = Node(own), written(own, *[" token" * 100] * 400)
    early = node.found(stream) if is_early else None
    own.copy(stream).written_units = 1 << 20  # the next write starts over
    own.grow(stream, " end")
    own.link.turn(1)
    assert parse(own.entries(stream)[-1]).position == (2, 0)
    here = early or node.found(stream)
    assert here.events == 400, "the former entries are read"
    lose_owner(own, node, here)
    assert late(own, stream) == (400, CloseReason.NODE_LOST)


def test_a_stream_that_ends_without_an_event_is_there_for_others(own: Rig) -> None:
    stream = own.open()
    own.seal(stream)
    own.link.turn()
    assert late(own, stream) == (0, CloseReason.COMPLETE)


def test_a_declared_log_is_whole_though_it_has_an_event_larger_than_its_bound() -> None:
    own = Rig(log_bytes_max=4096)
    own.link.up()
    node, stream = Node(own), written(own, " a", "x" * 8192, " b", " c")
    node.hub.stream_log_bytes_max = 4096
    here = node.found(stream)
    own.engine.flush()
    lose_owner(own, node, here)
    assert late(own, stream) == (4, CloseReason.NODE_LOST)


def test_an_operator_may_end_it_here_without_a_word_in_the_owners_name(own: Rig) -> None:
    node, stream = Node(own), written(own, " a")
    here = node.found(stream)
    here.cancel(CloseReason.CANCELLED, own.now, message="stopped")
    assert here.events == 1 and here.reason is CloseReason.CANCELLED
    node.pass_time(1)
    assert len(node.followed) == node.places == 0
    assert node.found(stream).reason is None, "at its own node it goes on"


def notes_of(own: Rig, member: str) -> list[tuple[bytes, bytes]]:
    """The notes that a member has got: kind and body of each."""
    entries = own.engine.execute((b"XRANGE", KEYS.inbox(member), b"-", b"+"))
    return [(fields[1], fields[9]) for _, fields in entries]


def test_the_owner_of_a_stream_without_a_copy_is_asked_for_it(own: Rig) -> None:
    node, stream = Node(own), own.open()
    node.seek(stream)
    for _ in range(2):
        node.turn()
    assert notes_of(own, own.hub.member) == [(b"sync", stream.id.encode())]


def test_the_owner_hears_of_readers_here_and_why_the_last_has_left(own: Rig) -> None:
    node, stream = Node(own), written(own, " a")
    here = node.found(stream)
    node.hub.copies = SimpleNamespace(  # type: ignore[assignment]
        grown=lambda stream: None,
        left=node.followed.left,
        is_read_elsewhere=lambda stream: False,
        need=lambda stream: False,
    )
    node.pass_time(1)
    assert notes_of(own, "m1") == []
    reader = Reader(here, node.loop)
    node.pass_time(1)
    assert notes_of(own, "m1") == [(b"follow", f'["{stream.id}"]'.encode())]
    reader.subscriber.end()
    node.hub.leave(reader.subscriber, CloseReason.READER_GONE, own.now)
    node.pass_time(1)
    assert notes_of(own, "m1")[1:] == [(b"left", f'[["{stream.id}","reader_gone"]]'.encode())]


def test_the_owner_of_a_followed_stream_is_asked_and_a_finished_one_forgotten_with_its_copy(own: Rig) -> None:
    node, stream = Node(own), written(own, " a")
    here = node.found(stream)
    heard: list[bytes | None] = []
    assert node.followed.ask_owner(here, NoteKind.CANCEL, heard.append)
    node.turn()
    assert notes_of(own, "m1") == [(b"cancel", stream.id.encode())]
    own.grow(stream, " b")
    own.link.turn()
    own.tick()
    own.link.turn()
    own.seal(stream)
    own.link.turn()
    node.turn()
    assert here.reason is CloseReason.COMPLETE and heard == []
    node.followed.forget(here)
    node.turn()
    assert own.entries(stream) == [] and len(node.followed) == node.places == len(node.hub) == 0
    assert not node.followed.ask_owner(here, NoteKind.CANCEL, heard.append)
