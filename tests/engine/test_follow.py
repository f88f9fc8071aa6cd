"""A stream that lives elsewhere: its readers here get each event once and in order, or are told to come back."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from fakes import event
from model_engine import ModelChannels, ModelLink
from sinks import Loop, Reader, new_hub
from test_owner import KEYS, Rig, declared, new_log

from streamd.core.replay import ReplayLog
from streamd.core.stream import Stream
from streamd.engine import follow
from streamd.engine.entry import End, Position, told
from streamd.engine.facts import StreamFacts
from streamd.engine.follow import CopyPlace, Follow, FollowCounts, FollowOwner, FollowState
from streamd.engine.owner import CopyState
from streamd.reasons import CloseReason


class Member:
    """A member that follows a stream of the owner's, with a reader from the first event on."""

    def __init__(self, own: Rig, stream: Stream) -> None:
        self.own = own
        self.loop = Loop()
        self.hub = new_hub(self.loop)
        self.link = ModelLink(own.engine, lambda: None)
        self.link.is_up = True
        self.channels = ModelChannels(own.engine)
        self.heard: list[str | End] = []
        self.stream: Stream | None = None
        self.reader: Reader | None = None
        self.counts = FollowCounts()
        channels: Any = self.channels
        self.follow = Follow(
            CopyPlace(KEYS.log(stream.id), KEYS.channel(stream.id), self.link, channels),
            FollowOwner(
                self.built, lambda: self.heard.append("absent"), lambda: self.heard.append("stale"), self.heard.append
            ),
            self.counts,
            new_log=new_log,
            time=lambda: own.now,
        )
        self.follow.start()

    def built(self, facts: StreamFacts, log: ReplayLog) -> Stream:
        stream = self.hub.restore(
            facts.id, log, facts.dialect, self.own.now, kind=Stream, terms=facts.terms(16384), epoch=facts.epoch
        )
        assert stream is not None
        stream.source = self.follow
        stream.look_into_log(self.own.now)
        self.stream = stream
        self.reader = Reader(stream, self.loop)
        return stream

    def turn(self) -> None:
        """Everything that waits is carried out."""
        self.channels.turn()
        self.link.turn()
        self.loop.rest()

    @property
    def read(self) -> Reader:
        assert self.reader is not None
        return self.reader


def settle(own: Rig, *members: Member, seconds: float = 14.0) -> None:
    """Until nothing is left to do."""
    for _ in range(round(seconds * 4)):
        own.tick()
        own.owner.push()
        own.link.turn()
        for member in members:
            member.follow.tick(own.now)
            member.turn()
    assert own.bugs == []


@pytest.fixture
def own() -> Rig:
    made = Rig()
    made.link.up()
    return made


def following(own: Rig, *texts: str) -> tuple[Stream, Member]:
    """A stream with these texts in its copy, and a member that follows it."""
    stream = own.open()
    own.grow(stream, *texts)
    own.link.turn()
    member = Member(own, stream)
    member.turn()
    assert member.follow.state is FollowState.FOLLOWING
    return stream, member


def same_log(member: Member, stream: Stream) -> bool:
    assert member.stream is not None
    held, copied = stream.log.parts(), member.stream.log.parts()
    return (held.segments, held.templates) == (copied.segments, copied.templates)


def write(own: Rig, stream: Stream, member: Member, *texts: str) -> None:
    """A write of the owner's, which hears at its next tick that a member listens, and tells it."""
    own.grow(stream, *texts)
    own.link.turn()
    own.tick()
    own.link.turn()
    member.turn()
    assert own.server.followed


def test_a_follower_reads_what_there_is_and_what_comes(own: Rig) -> None:
    stream, member = following(own, " a", " b")
    assert member.read.text == " a b"
    write(own, stream, member, " c")
    assert member.read.text == " a b c" and member.read.seqs == [2, 3], "what was there came in a single event"
    assert same_log(member, stream) and member.counts.rebuilds == 0


def test_a_followed_stream_is_pushed_between_two_writes(own: Rig) -> None:
    stream, member = following(own, " a")
    write(own, stream, member, " b")
    assert member.read.text == " a b"
    reads = member.counts.reads
    for text in (" c", " d", " e"):
        stream.append(event(text), own.now)
        own.owner.push()
        own.link.turn()
        assert member.read.text.endswith(text)
    assert member.counts.reads == reads and member.counts.pushes == 3
    own.grow(stream)
    own.link.turn()
    member.turn()
    assert member.counts.reads == reads, "the entry has nothing that the pushes had not"
    assert same_log(member, stream)


def test_pushes_begin_where_the_copy_ends(own: Rig) -> None:
    stream, member = following(own, " a")
    own.grow(stream, " b")
    own.link.turn()
    stream.append(event(" c"), own.now)
    own.tick()
    own.link.turn()
    own.owner.push()
    own.link.turn()
    member.turn()
    assert member.read.text == " a b c" and member.counts.holes == 0


def test_a_push_of_another_fence_is_not_taken_though_it_continues_the_stream(own: Rig) -> None:
    """The log under that fence may have other templates, by whose numbers the push goes."""
    stream, member = following(own, " a")
    text = told(Position(2, 2), record=b"\0\1 wrong\n")
    own.engine.execute((b"PUBLISH", KEYS.channel(stream.id), text))
    settle(own, member, seconds=2)
    assert member.read.text == " a"


def test_a_stream_that_nobody_follows_is_not_pushed(own: Rig) -> None:
    stream, member = following(own, " a")
    write(own, stream, member, " b")
    member.follow.cancel(CloseReason.ABANDONED)
    own.grow(stream, " c")
    own.link.turn()
    assert not own.server.followed and member.follow.state is FollowState.OVER
    before = len(own.link.commands)
    stream.append(event(" d"), own.now)
    own.owner.push()
    assert len(own.link.commands) == before


def test_the_end_reaches_readers_elsewhere(own: Rig) -> None:
    stream, member = following(own, " a")
    write(own, stream, member, " b")
    stream.append(event(" c"), own.now)
    own.seal(stream)
    own.link.turn()
    member.turn()
    assert member.read.text == " a b c" and member.read.ended is True
    assert member.follow.state is FollowState.ENDED and same_log(member, stream)
    assert member.stream is not None and member.stream.reason is CloseReason.COMPLETE


def test_a_finished_stream_is_read_to_its_end(own: Rig) -> None:
    stream = own.open()
    own.grow(stream, *[" token"] * 3000)
    own.seal(stream)
    own.settle()
    member = Member(own, stream)
    member.turn()
    assert member.read.text == " token" * 3000 and member.read.ended is True


def test_a_stream_that_is_not_there_is_absent(own: Rig) -> None:
    member = Member(own, own.open())
    member.turn()
    assert member.heard == ["absent"] and member.follow.state is FollowState.ABSENT
    member.follow.tick(own.now + 60)
    assert member.link.commands[1:] == []


@pytest.mark.parametrize(("version", "heard"), [(2, "stale"), (0, "absent")])
def test_a_copy_of_another_version_is_not_read(own: Rig, version: int, heard: str) -> None:
    stream = own.open()
    own.grow(stream, " a")
    own.link.turn()
    fields = own.entries(stream)[0][1]
    place = fields.index(b"f") + 1
    fields[place] = fields[place].replace(b'"version":1', b'"version":%d' % version).replace(b'"id"', b'"name"')
    own.engine.keys[KEYS.log(stream.id)].entries[0] = ((1, 0), fields)
    member = Member(own, stream)
    member.turn()
    assert member.heard == [heard], "a newer streamd can read what it wrote, so the stream is there"


def test_nothing_is_read_before_the_channel_is_confirmed(own: Rig) -> None:
    stream = own.open()
    own.grow(stream, " a")
    own.link.turn()
    member = Member(own, stream)
    member.link.turn()
    assert member.link.commands == []
    member.turn()
    assert member.read.text == " a"


def test_a_push_that_comes_before_the_read_is_done_is_kept(own: Rig) -> None:
    stream = own.open()
    own.grow(stream, " a")
    own.link.turn()
    member = Member(own, stream)
    member.channels.turn()
    member.link.engine.execute(member.link.asked[0][0])
    held = list(member.link.asked)
    (command, on_reply), reply = held[0], own.engine.execute(held[0][0])
    member.link.asked.clear()
    own.grow(stream, " b")
    own.link.turn()
    own.tick()
    own.link.turn()  # told while the read is on its way
    on_reply(reply)
    member.turn()
    assert command[0] == b"XRANGE" and member.read.text == " a b"


def test_a_lost_message_is_found_by_the_next(own: Rig) -> None:
    stream, member = following(own, " a")
    write(own, stream, member, " b")
    own.engine.loses_messages = True
    stream.append(event(" c"), own.now)
    own.owner.push()
    own.link.turn()
    own.engine.loses_messages = False
    own.grow(stream, " d")
    own.owner.push()
    own.link.turn()
    settle(own, member, seconds=2)
    assert member.read.seqs == [1, 2, 3, 4] and same_log(member, stream)


def test_silence_is_looked_into(own: Rig) -> None:
    stream, member = following(own, " a")
    own.engine.loses_messages = True
    own.grow(stream, " b")
    own.seal(stream)
    settle(own, member, seconds=follow.SILENT_S + 2)
    assert member.read.text == " a b" and member.read.ended is True


@pytest.mark.parametrize("entries", [1, follow.READ_ENTRIES - 1, follow.READ_ENTRIES, follow.READ_ENTRIES + 1])
def test_an_end_that_is_the_last_entry_of_a_full_reply_is_the_end(own: Rig, entries: int) -> None:
    stream, member = following(own, " a")
    own.engine.loses_messages = True
    for _ in range(entries - 1):
        own.grow(stream, " b")
        own.link.turn()
    stream.append(event(" c"), own.now)
    own.seal(stream)
    settle(own, member, seconds=follow.SILENT_S + 2)
    assert member.read.ended is True and not own.server.followed


def test_a_copy_that_started_over_is_read_anew_and_no_event_comes_twice(own: Rig) -> None:
    stream, member = following(own, " a")
    write(own, stream, member, " b")
    stream.log.trim_to(0)
    own.grow(stream, " c")
    settle(own, member, seconds=2)
    assert member.counts.rebuilds == 1
    own.copy(stream).written_units = 1 << 20
    own.grow(stream, " d")
    settle(own, member, seconds=3)
    assert member.read.seqs == [1, 2, 3, 4] and member.read.gaps == []
    assert member.stream is not None and member.stream.log.seq_next == 5


def test_a_reader_that_is_behind_reads_on_after_the_log_was_replaced(own: Rig) -> None:
    stream, member = following(own, *[" token"] * 300)
    member.read.stall()
    write(own, stream, member, *[" late"] * 300)
    own.copy(stream).written_units = 1 << 20
    own.grow(stream, " end")
    settle(own, member, seconds=5)
    member.read.take()
    member.loop.rest()
    assert member.counts.rebuilds == 1
    assert member.read.text == " token" * 300 + " late" * 300 + " end" and member.read.gaps == []


def test_a_failover_to_a_shorter_copy_takes_nothing_back(own: Rig) -> None:
    stream, member = following(own, " a")
    for text in (" b", " c", " d"):
        write(own, stream, member, text)
    own.link.cut()
    own.engine.fail_over(2)
    member.channels.cut()
    member.channels.is_up = True
    member.turn()
    settle(own, member, seconds=2)
    assert member.read.text == " a b c d"
    own.link.up()
    own.grow(stream, " e")
    settle(own, member)
    assert member.read.seqs == [1, 2, 3, 4, 5] and same_log(member, stream)


def test_events_that_are_gone_send_the_readers_away(own: Rig) -> None:
    stream, member = following(own, " a")
    member.channels.cut()
    member.link.room = False
    own.grow(stream, *[" b"] * 50)
    own.link.turn()
    stream.log.trim_to(0)
    own.grow(stream, " c")
    own.settle()
    own.engine.keys[KEYS.log(stream.id)].entries = own.engine.keys[KEYS.log(stream.id)].entries[-1:]
    own.copy(stream).written_units = 1 << 20
    own.grow(stream, " d")
    own.settle()
    member.channels.is_up = member.link.room = True
    settle(own, member, seconds=3)
    assert "stale" in member.heard and member.read.text == " a"


def test_an_engine_that_cannot_be_asked_makes_readers_come_back(own: Rig) -> None:
    stream, member = following(own, " a")
    member.link.room = False
    member.follow.tick(own.now + 19)
    assert member.heard == []
    member.follow.tick(own.now + 21)
    member.follow.tick(own.now + 22)
    assert member.heard == ["stale"] and member.follow.state is FollowState.STALE
    member.link.room = True
    own.grow(stream, " b")
    settle(own, member, seconds=3)
    assert member.read.text == " a b" and member.follow.state is FollowState.FOLLOWING


def test_a_moment_without_the_engine_sends_no_reader_of_a_silent_stream_away(own: Rig) -> None:
    _, member = following(own, " a")
    settle(own, member, seconds=30)
    member.link.room = False
    member.follow.tick(own.now + 1)
    assert member.heard == [], "the stream was silent, the engine wasn't"
    member.follow.tick(own.now + 21)
    assert member.heard == ["stale"]


@pytest.mark.parametrize("word", ["node_lost", "a_reason_of_a_later_version"])
def test_a_declared_or_unknown_end_is_told_and_not_taken_for_the_streams_own(own: Rig, word: str) -> None:
    stream, member = following(own, " a")
    declared(own, stream, b"e", b'{"reason":"%b","clean":false}' % word.encode())
    member.follow.tick(own.now + 3.1)
    own.now += 4.2
    member.follow.tick(own.now)
    member.turn()
    assert member.heard == [End(word, False)] and member.follow.state is FollowState.ENDED
    assert member.stream is not None and member.stream.reason is None


@pytest.mark.parametrize("text", [b"", b"x", b"1", b"1-", b"1-2!x", b"1-2 ", b"1-2 \0\1 x", b"1-2 \xff\xff", b"9" * 99])
def test_a_strangers_message_changes_nothing(own: Rig, text: bytes) -> None:
    stream, member = following(own, " a")
    own.engine.execute((b"PUBLISH", KEYS.channel(stream.id), text))
    settle(own, member, seconds=2)
    assert member.read.text == " a"
    own.grow(stream, " b")
    settle(own, member, seconds=3)
    assert member.read.text == " a b" and same_log(member, stream)


def test_messages_that_wait_are_bounded(own: Rig) -> None:
    stream, member = following(own, " a")
    own.grow(stream)
    for seq in range(5, 5 + 3 * follow.STASH_MESSAGES_MAX):
        own.engine.execute((b"PUBLISH", KEYS.channel(stream.id), told(Position(1, seq), record=b"\0\1 x\n")))
        assert len(member.follow._stash) <= follow.STASH_MESSAGES_MAX
    own.engine.execute((b"PUBLISH", KEYS.channel(stream.id), told(Position(1, 99), record=b"x" * 100_000)))
    assert member.follow._stash_bytes <= follow.STASH_BYTES_MAX
    own.grow(stream, " b")
    settle(own, member, seconds=4)
    assert member.read.text == " a b"


def test_a_copy_that_cannot_be_read_is_looked_at_again_by_the_clock(own: Rig) -> None:
    stream, member = following(own, " a")
    own.engine.execute((b"XADD", KEYS.log(stream.id), b"1-2", b"x", b"y"))
    reads = member.counts.reads
    for _ in range(40):
        own.engine.execute((b"PUBLISH", KEYS.channel(stream.id), told(Position(1, 2))))
        own.now += 0.1
        member.follow.tick(own.now)
        member.turn()
    assert member.counts.broken > 0 and member.counts.reads - reads <= 6


OPS = st.sampled_from(
    [
        *["append"] * 10,
        *["grow"] * 6,
        *["push"] * 8,
        *["turn"] * 8,
        *["member"] * 8,
        *("tick", "tick", "wait", "cut", "up", "up", "flush", "failover"),
        *("lose", "hear", "deaf", "listen", "slow", "quick", "stall", "take", "restart"),
    ]
)


class Storm:
    """An owner, a stream and a follower under random faults of the engine between them."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.own = Rig()
        self.own.link.up()
        self.stream = self.own.open()
        self.member: Member | None = None
        self.said = 0

    def step(self, op: str) -> None:
        own, rng, member = self.own, self.rng, self.member
        match op:
            case "append":
                for _ in range(rng.choice([1, 1, 3, 40])):
                    self.said += 1
                    self.stream.append(event(f"{self.said} "), own.now)
            case "grow":
                own.owner.grown(self.stream)
            case "push":
                own.owner.push()
            case "turn" if own.link.is_up:
                own.link.turn(rng.choice([1, 3, 100]))
            case "member":
                if member is None and own.entries(self.stream):
                    self.member = Member(own, self.stream)
                elif member is not None:
                    member.turn()
            case "tick" | "wait":
                own.tick(0.25 if op == "tick" else 11.0)
                if member is not None:
                    member.follow.tick(own.now)
            case "cut" if own.link.is_up:
                own.link.cut(rng.randint(0, len(own.link.asked)))
            case "up" if not own.link.is_up:
                own.link.up()
            case "flush":
                own.engine.flush()
            case "failover":
                if own.link.is_up:
                    own.link.cut(rng.randint(0, len(own.link.asked)))
                own.engine.fail_over(rng.randint(0, min(5, len(own.engine.written))))
            case "lose" | "hear":
                own.engine.loses_messages = op == "lose"
            case "restart":
                if self.stream.id in own.server.copies:
                    own.copy(self.stream).written_units = 1 << 20
            case _ if member is not None:
                self.disturb(op, member)

    def disturb(self, op: str, member: Member) -> None:
        match op:
            case "deaf":
                member.channels.cut()
            case "listen":
                member.channels.is_up = True
            case "slow" | "quick":
                member.link.room = op == "quick"
            case "stall" if member.reader is not None:
                member.read.stall()
            case "take" if member.reader is not None:
                member.read.take()

    def check(self) -> None:
        """The reader has a part of the stream from its start, without a hole and without an event twice."""
        if self.member is None or self.member.reader is None:
            return
        got = self.member.read.text
        whole = "".join(f"{number} " for number in range(1, self.said + 1))
        assert whole.startswith(got) and self.member.read.gaps == []


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False), st.lists(OPS, min_size=10, max_size=90))
def test_after_any_storm_a_follower_has_the_whole_stream(rng: random.Random, ops: list[str]) -> None:
    storm = Storm(rng)
    own = storm.own
    storm.step("append")
    for op in ops:
        storm.step(op)
        storm.check()
    own.engine.loses_messages = False
    if own.link.is_up:
        own.link.cut()
    own.link.up()
    own.owner.grown(storm.stream)
    own.settle()
    member = storm.member = storm.member or Member(own, storm.stream)
    member.channels.is_up = member.link.room = True
    if member.reader is not None:
        member.read.take()
    storm.step("append")
    own.seal(storm.stream)
    settle(own, member, seconds=30)
    if member.follow.state is FollowState.ABSENT:
        return  # it looked while the engine was empty
    storm.check()
    assert own.state(storm.stream) is CopyState.DONE
    assert len(member.read.text.split()) == storm.said and member.read.ended is True
