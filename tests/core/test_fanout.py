"""Very many readers of a stream: slices, passes, and joins, leaves and seals in the middle of a pass."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
from fakes import event
from hypothesis import given
from hypothesis import strategies as st
from sinks import RING_BYTES_MAX, RING_SLOTS, Loop, Reader, Source, agree, feed, new_hub, new_stream, said

from streamd.core import fanout as core_fanout
from streamd.core import stream as core_stream
from streamd.core.fanout import FRAMES_BYTES_MAX, FRAMES_MAX, SLICE_MAX, SlicedFanout
from streamd.core.stream import DIRECT_READERS_MAX, Form, Policy, Stream, SubscriberState
from streamd.reasons import CloseReason

MANY = 2 * SLICE_MAX + 88  # three slices


def crowd(count: int = MANY, *, policy: Policy = Policy.COALESCE, **bounds: int) -> tuple[Stream, Loop, list[Reader]]:
    loop = Loop()
    stream = new_stream(loop, **bounds)
    readers = [Reader(stream, loop, policy=policy) for _ in range(count)]
    return stream, loop, readers


def fanout_of(stream: Stream) -> SlicedFanout:
    assert isinstance(stream.fanout, SlicedFanout)
    return stream.fanout


def alike(readers: list[Reader]) -> Reader:
    """Check that all readers got the same bytes, and return the first to stand for all."""
    assert len({bytes(reader.sent) for reader in readers}) == 1
    return readers[0]


def written(readers: list[Reader]) -> int:
    return sum(len(reader.frames) for reader in readers)


# -- slices


def test_an_event_goes_at_once_to_up_to_direct_readers_max_readers() -> None:
    stream, loop, readers = crowd(DIRECT_READERS_MAX)
    feed(stream, 1)
    assert written(readers) == DIRECT_READERS_MAX
    assert not loop.turns


def test_a_turn_serves_one_slice() -> None:
    stream, loop, readers = crowd()
    feed(stream, 1)
    assert written(readers) == 0
    for turn in range(1, 4):
        assert len(loop.turns) == 1
        loop.turn()
        assert written(readers) == min(turn * SLICE_MAX, MANY)
    assert not loop.turns
    assert all(reader.seqs == [1] for reader in readers)


def test_an_event_is_encoded_once() -> None:
    stream, loop, readers = crowd()
    feed(stream, 1)
    loop.rest()
    assert len({id(reader.frames[0]) for reader in readers}) == 1


def test_events_during_a_pass_go_out_with_it() -> None:
    stream, loop, readers = crowd()
    feed(stream, 1)
    loop.turn()
    feed(stream, 2)
    loop.rest()
    assert all(reader.text == said(stream) for reader in readers)
    early, late = readers[0], readers[-1]
    assert [len(early.frames), len(late.frames)] == [2, 1]
    assert len({id(reader.frames[0]) for reader in readers[SLICE_MAX : 2 * SLICE_MAX]}) == 1
    assert not fanout_of(stream)._frames


def test_the_events_of_a_large_read_are_one_write_per_reader() -> None:
    stream, loop, readers = crowd(100)
    stream.append_all([event(str(k)) for k in range(20)], 1.0)
    loop.rest()
    assert {len(reader.frames) for reader in readers} == {1}
    assert readers[0].seqs == list(range(1, 21))


# -- readers that join and leave in the middle of a pass


def test_a_reader_that_joins_in_the_middle_of_a_pass_misses_nothing() -> None:
    stream, loop, readers = crowd()
    feed(stream, 3)
    loop.turn()
    late = Reader(stream, loop)
    assert late.state is SubscriberState.LIVE
    feed(stream, 2)
    loop.rest()
    assert late.text == said(stream)
    assert all(reader.text == said(stream) for reader in readers)


def test_readers_that_leave_in_the_middle_of_a_pass_cost_the_others_nothing() -> None:
    stream, loop, readers = crowd()
    feed(stream, 1)
    loop.turn()
    gone = readers[10], readers[SLICE_MAX + 10], readers[-1]
    for reader in gone:
        reader.leave()
    feed(stream, 1)
    loop.rest()
    assert [reader.seqs for reader in gone] == [[1], [], []]
    assert all(reader.text == said(stream) for reader in readers if reader not in gone)
    assert len(stream.readers) == MANY - 3


def test_a_pass_ends_when_all_its_readers_have_left() -> None:
    stream, loop, readers = crowd()
    feed(stream, 1)
    loop.turn()
    for reader in readers:
        reader.leave()
    feed(stream, 1)
    loop.rest()
    assert stream.direct
    assert stream.fanout is None


# -- the end


def test_a_seal_before_a_pass_reaches_readers_after_the_events() -> None:
    stream, loop, readers = crowd()
    feed(stream, 1)
    stream.seal(CloseReason.COMPLETE, 2.0, clean=True)
    loop.rest()
    assert all(reader.ended is True and reader.seqs == [1] for reader in readers)
    assert not stream.readers


def test_a_seal_in_the_middle_of_a_pass_reaches_those_served_before() -> None:
    stream, loop, readers = crowd()
    feed(stream, 1)
    loop.turn()
    stream.seal(CloseReason.COMPLETE, 2.0, clean=True)
    loop.rest()
    assert all(reader.ended is True and reader.seqs == [1] for reader in readers)


def test_a_failure_in_the_middle_of_a_pass_reaches_every_reader() -> None:
    stream, loop, readers = crowd()
    stream.source = Source()
    feed(stream, 1)
    loop.turn()
    stream.cancel(CloseReason.CANCELLED, 2.0, message="stopped")
    loop.rest()
    assert all(reader.ended is False and reader.seqs == [1, 2] for reader in readers)


def test_a_seal_reaches_readers_when_no_event_is_pending() -> None:
    stream, loop, readers = crowd()
    stream.seal(CloseReason.COMPLETE, 2.0, clean=True)
    loop.rest()
    assert all(reader.ended is True for reader in readers)


def test_a_stalled_reader_ends_when_it_has_read_everything() -> None:
    stream, loop, readers = crowd()
    paused, behind = readers[0], readers[1]
    behind.stall()
    feed(stream, 50)
    loop.rest()
    feed(stream, 50)
    loop.rest()
    paused.stall()
    feed(stream, 1)
    loop.rest()
    stream.seal(CloseReason.COMPLETE, 2.0, clean=True)
    loop.rest()
    assert [paused.ended, behind.ended] == [None, None]
    paused.take()
    behind.take()
    loop.rest()
    assert [paused.ended, behind.ended] == [True, True]
    assert paused.text == behind.text == said(stream)


# -- policies in passes


def stall_one(policy: Policy, rounds: int) -> tuple[Stream, Loop, Reader, list[Reader]]:
    stream, loop, readers = crowd(100, policy=policy)
    stalled = readers[50]
    stalled.stall()
    for _ in range(rounds):
        feed(stream, 2)
        loop.rest()
    return stream, loop, stalled, [reader for reader in readers if reader is not stalled]


@pytest.mark.parametrize("policy", list(Policy))
def test_a_short_stall_is_bridged_by_the_ring(policy: Policy) -> None:
    stream, loop, stalled, others = stall_one(policy, RING_SLOTS // 2)
    assert stalled.state is SubscriberState.PAUSED
    stalled.take()
    feed(stream, 1)
    loop.rest()
    assert (stalled.text, stalled.state) == (said(stream), SubscriberState.LIVE)
    assert alike(others).text == said(stream)


@pytest.mark.parametrize("more", [0, RING_SLOTS // 2, RING_SLOTS + 20])
@pytest.mark.parametrize("slices", [0, 1])
@pytest.mark.parametrize("policy", list(Policy))
def test_a_reader_that_resumes_between_passes_and_is_full_at_once_loses_nothing_in_silence(
    policy: Policy, slices: int, more: int
) -> None:
    """The log is ahead of the ring then: the reader goes on where the ring ended, not at the log's end."""
    stream, loop, readers = crowd(policy=policy)
    agree(
        stream, catchup_bytes_max=1
    )  # so that one event is a piece, and the ring's events are no part of a larger one
    slow = readers[-1]
    slow.stall()
    for _ in range(3):
        feed(stream, 1)
        loop.rest()
    feed(stream, 2)
    for _ in range(slices):
        loop.turn()
    slow.take(len(slow.held))
    assert (slow.state, slow.subscriber.position, stream.log.seq_next) == (SubscriberState.PAUSED, 4, 6)
    for _ in range(more):
        feed(stream, 1)
        loop.rest()
    loop.rest()
    slow.take()
    loop.rest()
    lost = 2 + more - RING_SLOTS
    if lost <= 0 or policy is Policy.COALESCE:
        assert (slow.text, slow.gaps, slow.cut) == (said(stream), [], 0)
    elif policy is Policy.DROP_OLDEST:
        assert slow.gaps == [(4, 3 + lost)]
        assert slow.seqs == [1, 2, 3, *range(4 + lost, stream.log.seq_next)]
    else:
        assert (slow.cut, slow.seqs) == (1, [1, 2, 3])
    assert alike(readers[:-1][:SLICE_MAX]).text == said(stream)


def test_in_passes_coalesce_loses_no_token() -> None:
    stream, loop, stalled, others = stall_one(Policy.COALESCE, 100)
    assert (stalled.state, stalled.subscriber.ring.bytes_held) == (SubscriberState.BEHIND, 0)
    stalled.take()
    loop.rest()
    assert stalled.text == said(stream)
    assert len(stalled.events) == 3
    assert alike(others).text == said(stream)


def test_in_passes_drop_oldest_announces_its_gap() -> None:
    stream, loop, stalled, others = stall_one(Policy.DROP_OLDEST, 100)
    assert stalled.state is SubscriberState.PAUSED
    stalled.take()
    loop.rest()
    assert stalled.gaps == [(3, 200 - RING_SLOTS)]
    assert stalled.seqs == [1, 2, *range(201 - RING_SLOTS, 201)]
    assert alike(others).text == said(stream)


def test_in_passes_close_ends_only_the_stalled_reader() -> None:
    stream, _, stalled, others = stall_one(Policy.CLOSE, 100)
    assert (stalled.cut, stalled.state) == (1, SubscriberState.ENDED)
    assert alike(others).text == said(stream)
    assert len(stream.readers) == 99


# -- frames that are no longer at hand


def test_a_live_reader_that_a_slow_pass_has_not_reached_reads_the_log() -> None:
    stream, loop, readers = crowd()
    feed(stream, 1)
    loop.turn()
    feed(stream, FRAMES_MAX + 50)
    loop.rest()
    assert all(reader.text == said(stream) for reader in readers)
    assert all(reader.state is SubscriberState.LIVE for reader in readers)


@pytest.mark.parametrize("policy", list(Policy))
def test_a_paused_reader_that_a_slow_pass_has_not_reached_gets_its_policys_outcome(policy: Policy) -> None:
    stream, loop, readers = crowd(policy=policy)
    stalled = readers[-1]
    stalled.stall()
    feed(stream, 1)
    loop.rest()
    feed(stream, 1)
    loop.turn()
    feed(stream, FRAMES_MAX + 50)
    loop.rest()
    expected = {
        Policy.COALESCE: SubscriberState.BEHIND,
        Policy.DROP_OLDEST: SubscriberState.PAUSED,
        Policy.CLOSE: SubscriberState.ENDED,
    }[policy]
    assert stalled.state is expected
    stalled.take()
    loop.rest()
    if policy is Policy.COALESCE:
        assert stalled.text == said(stream)
    elif policy is Policy.DROP_OLDEST:
        last = stream.events
        assert stalled.gaps == [(2, last - RING_SLOTS)]
        assert stalled.seqs == [1, *range(last - RING_SLOTS + 1, last + 1)]
    else:
        assert (stalled.cut, stalled.seqs) == (1, [1])


def test_frames_at_hand_are_bounded() -> None:
    stream, loop, readers = crowd()
    fanout = fanout_of(stream)
    feed(stream, 1)
    loop.turn()
    feed(stream, 3 * FRAMES_MAX)
    assert len(fanout._frames) == FRAMES_MAX
    for _ in range(20):
        stream.append(event("x" * 10_000), 1.0)
        assert fanout._bytes == sum(map(len, fanout._frames)) <= FRAMES_BYTES_MAX
    stream.append(event("x" * 2 * FRAMES_BYTES_MAX), 1.0)
    assert len(fanout._frames) == 1
    loop.rest()
    assert not fanout._frames
    assert fanout._bytes == 0
    assert {reader.subscriber.position for reader in readers} == {stream.log.seq_next}


def test_frames_that_every_reader_has_are_dropped_while_events_go_on() -> None:
    stream, loop, _ = crowd()
    for _ in range(200):
        feed(stream, 1)
        loop.turn()
        assert len(fanout_of(stream)._frames) <= 6  # of this pass and the next, a few turns each


# -- other forms, comments


def test_http10_readers_are_served_in_passes() -> None:
    stream, loop, readers = crowd(100)
    old = Reader(stream, loop, form=Form.BARE)
    feed(stream, 3)
    assert old.text == ""
    loop.rest()
    assert old.text == said(stream)
    assert all(reader.text == said(stream) for reader in readers)


def test_comments_go_out_in_slices() -> None:
    stream, loop, readers = crowd()
    stream.loose(b": early\n", 1.0)
    stream.loose(b": one\n", 1.0)
    assert written(readers) == 0
    loop.turn()
    assert written(readers) == SLICE_MAX
    stream.loose(b": two\n", 1.0)
    feed(stream, 1)
    loop.rest()
    for reader in readers:
        assert reader.body.count(b": one\n") == reader.body.count(b": two\n") == 1
        assert b": early" not in reader.body
        assert reader.seqs == [1]


# -- a write interval


def test_events_wait_for_each_other_for_a_write_interval_after_the_pass_before() -> None:
    loop, stream, readers = waiting(3)
    feed(stream, 4)
    loop.now += 0.02
    feed(stream, 1)
    assert (written(readers), [timer.seconds for timer in loop.timers]) == (3, [0.05])
    loop.ring()
    assert (written(readers), loop.held_s) == (6, [0.0, 0.05])
    assert all(reader.text == said(stream) for reader in readers)
    readers[0].leave()
    assert not stream.direct  # in passes although the readers are few


def test_the_first_event_and_the_first_after_a_silence_longer_than_the_interval_go_at_once() -> None:
    loop, stream, readers = waiting(1)
    assert (written(readers), loop.held_s) == (1, [0.0])
    loop.now += 0.05
    feed(stream, 1)
    loop.rest()
    assert (written(readers), loop.held_s, loop.timers) == (2, [0.0, 0.0], [])
    loop.now += 0.03
    feed(stream, 1)
    loop.rest()
    assert (written(readers), [timer.seconds for timer in loop.timers]) == (2, [pytest.approx(0.02)])


@pytest.mark.parametrize("reason", [CloseReason.SEALED, CloseReason.UPSTREAM_TRUNCATED])
def test_a_seal_goes_out_at_once_with_all_that_is_held(reason: CloseReason) -> None:
    loop, stream, (reader,) = waiting(1)
    feed(stream, 2)
    if reason is CloseReason.SEALED:
        stream.seal(reason, 1.0, clean=True)
    else:
        stream.fail(reason, 1.0, message="cut")
    loop.rest()
    assert (reader.ended, reader.seqs) == (reason is CloseReason.SEALED, list(range(1, stream.events + 1)))
    assert (reader.frames[-1].count(b"id: "), loop.timers) == (stream.events - 1, [])


@pytest.mark.parametrize("last", [b"data: [DONE]\n\n", b'data: {"error":{"message":"no","code":"x"}}\n\n'])
def test_a_terminal_event_and_an_upstreams_error_go_out_at_once(last: bytes) -> None:
    loop, stream, (reader,) = waiting(1)
    feed(stream, 2)
    stream.append(last, 1.0)
    loop.rest()
    assert (len(reader.seqs), len(reader.frames), loop.timers) == (4, 2, [])


def test_an_end_in_the_middle_of_a_pass_makes_the_next_pass_follow_at_once() -> None:
    loop, stream, readers = waiting(SLICE_MAX + 1)
    loop.now += 0.05
    feed(stream, 1)
    loop.turn()  # the first slice
    feed(stream, 1)
    stream.seal(CloseReason.SEALED, 1.0, clean=True)
    loop.rest()
    assert loop.timers == [] and all(reader.ended for reader in readers)
    assert alike(readers).text == said(stream)


def test_frames_that_fill_half_of_their_room_do_not_wait() -> None:
    loop, stream, (reader,) = waiting(1)
    for _ in range(core_fanout.FRAMES_MAX // 2):
        feed(stream, 1)
    loop.rest()
    assert (len(reader.frames), len(loop.timers)) == (1, 1)
    feed(stream, 1)
    loop.rest()
    assert (len(reader.frames), loop.timers, reader.text) == (2, [], said(stream))


def waiting(count: int) -> tuple[Loop, Stream, list[Reader]]:
    """A stream with a write interval of 50 ms and so many readers, which just got its first event."""
    loop = Loop()
    stream = new_stream(loop)
    stream.use_fanout(loop.fanout(stream, 0.05))
    readers = [Reader(stream, loop) for _ in range(count)]
    feed(stream, 1)
    loop.rest()
    return loop, stream, readers


# -- at once and in passes


def test_more_readers_than_go_at_once_are_served_in_passes_and_few_at_once_again() -> None:
    stream, loop, readers = crowd(DIRECT_READERS_MAX)
    feed(stream, 2)
    stalled = readers[7]
    stalled.stall()
    feed(stream, 3)
    readers.append(Reader(stream, loop))
    assert not stream.direct
    feed(stream, 3)
    loop.rest()
    while len(readers) > DIRECT_READERS_MAX // 2:
        assert not stream.direct
        reader = next(reader for reader in readers if reader is not stalled)
        readers.remove(reader)
        reader.leave()
    assert stream.direct
    feed(stream, 2)
    assert not loop.turns
    stalled.take()
    for reader in readers:
        assert reader.text == said(stream)
        assert reader.subscriber.bytes_delivered == sum(map(len, reader.frames))
        assert reader.subscriber.position == stream.log.seq_next


def test_a_stream_with_few_readers_left_is_direct_after_the_pass() -> None:
    stream, loop, readers = crowd()
    feed(stream, 1)
    loop.turn()
    for reader in readers[5:]:
        reader.leave()
    assert not stream.direct
    loop.rest()
    assert stream.direct
    feed(stream, 1)
    assert all(reader.text == said(stream) for reader in readers[:5])


# -- a tenth stalls


@pytest.mark.parametrize("policy", list(Policy))
def test_a_stalled_tenth_of_the_readers_costs_the_others_nothing(policy: Policy) -> None:
    loop = Loop()
    hub = new_hub(loop)
    stream = hub.open(core_stream.Dialect.CHAT, 0.0)
    readers = [Reader(stream, loop, policy=policy) for _ in range(1000)]
    stalled, others = readers[::10], [reader for k, reader in enumerate(readers) if k % 10]
    feed(stream, 3)
    loop.rest()
    for reader in stalled:
        reader.stall()
    for _ in range(60):
        feed(stream, 4)
        loop.turn()
        feed(stream, 1)
        loop.rest()
        hub.charge(stream)
        rings = sum(reader.subscriber.ring.bytes_held for reader in stalled)
        assert rings <= len(stalled) * RING_BYTES_MAX
        assert sum(len(reader.held) for reader in stalled) <= len(stalled) * 3 * 300  # a write that the kernel refused
        assert len({len(reader.sent) for reader in others}) == 1  # the others are not behind, whichever reader stalls
    assert hub.log_bytes == stream.log.bytes_held < 16 * 1024
    assert len({bytes(reader.sent) for reader in others}) == 1
    assert others[0].text == said(stream)
    assert max(len(reader.frames) for reader in others) <= 1 + 2 * 60
    for reader in stalled:
        reader.take()
    loop.rest()
    last = stream.events
    for reader in stalled[::10]:
        if policy is Policy.COALESCE:
            assert reader.text == said(stream)
        elif policy is Policy.DROP_OLDEST:
            ((first, until),) = reader.gaps
            assert until == last - RING_SLOTS
            assert reader.seqs == [*range(1, first), *range(until + 1, last + 1)]
        else:
            assert (reader.cut, reader.left) == (1, True)
            assert reader.seqs == list(range(1, len(reader.seqs) + 1))


# -- all of this in any order


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["feed", "read", "turn", "join", "leave", "stall", "take", "loose", "old"]), st.integers(0, 7)
    ),
    max_size=80,
)


class Crowd:
    """A few readers under bounds so small that every case occurs."""

    def __init__(self, policy: Policy, interval_s: float) -> None:
        self.policy = policy
        self.loop = Loop()
        self.stream = new_stream(self.loop)
        agree(self.stream, catchup_bytes_max=600)
        if interval_s:
            self.stream.use_fanout(self.loop.fanout(self.stream, interval_s))
        self.readers: list[Reader] = []

    def do(self, step: str, number: int) -> None:
        chosen = self.readers[number % len(self.readers)] if self.readers else None
        acts: dict[str, Callable[[], object]] = {
            "feed": lambda: feed(self.stream, 1 + number),
            "read": lambda: self.stream.append_all(
                [event(f"{self.stream.log.seq_next + k} ") for k in range(number + 1)], 1.0
            ),
            "turn": self.turn,
            "join": lambda: self.readers.append(Reader(self.stream, self.loop, policy=self.policy)),
            "old": lambda: self.readers.append(Reader(self.stream, self.loop, form=Form.BARE)),
            "loose": lambda: self.stream.loose(b": c\n", 1.0),
        }
        if step in acts:
            acts[step]()
        elif chosen is not None:
            {"leave": chosen.leave, "stall": chosen.stall, "take": lambda: chosen.take(50 * number)}[step]()
        self.readers = [reader for reader in self.readers if not reader.left]

    def turn(self) -> None:
        self.loop.turn()
        timers, self.loop.timers = self.loop.timers, []
        for timer in timers:
            timer.turn()

    def finish(self) -> None:
        self.stream.seal(CloseReason.COMPLETE, 2.0, clean=True)
        for reader in self.readers:
            reader.take()
        for _ in range(5):
            self.loop.rest()
            self.loop.ring()


@given(STEPS, st.sampled_from(list(Policy)), st.sampled_from([0.0, 0.05]), st.integers(1, 3), st.integers(1, 5))
def test_in_any_order_of_steps_every_token_is_there_or_announced(
    steps: list[tuple[str, int]], policy: Policy, interval_s: float, slice_max: int, frames_max: int
) -> None:
    with (
        mock.patch.object(core_fanout, "SLICE_MAX", slice_max),
        mock.patch.object(core_fanout, "FRAMES_MAX", frames_max),
        mock.patch.object(core_stream, "DIRECT_READERS_MAX", 2),
    ):
        crowd = Crowd(policy, interval_s)
        for step, number in steps:
            crowd.do(step, number)
        crowd.finish()
    for reader in crowd.readers:
        assert (reader.ended is True) is not bool(reader.cut)
        words = [int(word) for word in reader.text.split()]
        covered = words + [seq for first, last in reader.gaps for seq in range(first, last + 1)]
        assert sorted(covered) == list(range(1, len(covered) + 1))
        assert words == sorted(words)
        assert reader.cut or len(covered) == crowd.stream.events
        assert reader.gaps == [] or policy is Policy.DROP_OLDEST
        assert reader.subscriber.bytes_delivered == sum(map(len, reader.frames))
    assert not crowd.stream.readers


@pytest.mark.parametrize("form", [Form.CHUNKED, Form.BARE])
@pytest.mark.parametrize("at", [0, SLICE_MAX - 1, SLICE_MAX, MANY - 1])
def test_a_pass_goes_on_after_a_reader_whose_write_raises(at: int, form: Form) -> None:
    loop = Loop()
    stream = new_stream(loop)
    readers = [Reader(stream, loop, form=form if k == at else Form.CHUNKED) for k in range(MANY)]
    readers[at].refuses = True
    for number in range(3):
        stream.append(event(f"{number} "), 1.0)
        loop.rest()
    stream.loose(b": hello\n", 1.0)
    loop.rest()
    stream.seal(CloseReason.COMPLETE, 2.0, clean=True)
    loop.rest()
    others = [reader for k, reader in enumerate(readers) if k != at]
    assert alike(others).text == "0 1 2 " and all(reader.ended for reader in others)
    assert [type(error) for error in readers[at].refusals] == [MemoryError] and readers[at].left
    assert not stream.readers
