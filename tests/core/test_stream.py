"""A stream and its readers: the promises of each state, each policy and each form."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
from fakes import DONE, PLENTY, event, events_in, text_of
from hypothesis import given
from hypothesis import strategies as st
from sinks import RING_SLOTS, Loop, Reader, Source, agree, feed, new_hub, new_stream, said

from streamd.config import ROWS
from streamd.core import stream as core_stream
from streamd.core.log_record import LogRecord
from streamd.core.replay import ReplayLog
from streamd.core.stream import (
    APPEND_BYTES_MAX,
    LOOSE_WRITES_MAX,
    MARK_EVENTS,
    CountedStream,
    Form,
    Policy,
    Stream,
    SubscriberEvent,
    SubscriberState,
)
from streamd.core.terms import Terms
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect
from streamd.wire.sse import HEARTBEAT


def check_counters(reader: Reader) -> None:
    """Check that the numbers for the log line are those of the frames that were written."""
    subscriber = reader.subscriber
    assert subscriber.bytes_delivered == sum(map(len, reader.frames))
    if reader.subscriber.form not in (Form.RAW_CHUNKED, Form.RAW_BARE):
        last = max([each.seq for each in reader.events], default=subscriber.seq_start - 1)
        assert subscriber.position == last + 1


def test_a_stream_has_its_terms_in_one_object() -> None:
    slots = [slot for kind in Stream.__mro__ for slot in getattr(kind, "__slots__", ())]
    assert len(slots) <= 25


# -- live


def test_a_live_reader_gets_each_event_in_one_write() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop)
    feed(stream, 5)
    assert len(reader.frames) == 5
    assert reader.seqs == [1, 2, 3, 4, 5]
    assert reader.text == said(stream)
    assert reader.events[0].id == f"{stream.id}:1"
    check_counters(reader)


def test_events_of_one_read_go_in_one_write() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop)
    stream.append_all([event("a"), event("b"), event("c")], 1.0)
    stream.append_all([event("d")], 1.0)
    assert len(reader.frames) == 2
    assert reader.seqs == [1, 2, 3, 4]


def test_loose_lines_stay_between_the_events_that_they_came_between() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop)
    stream.append_pieces([event("a"), event("b"), b": c\n", event("d"), event("e")], 1.0)
    assert [len(reader.frames), reader.seqs] == [3, [1, 2, 3, 4]]
    assert b": c\n" in reader.frames[1]


def test_many_comments_of_a_read_make_few_writes_and_none_is_lost() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop)
    pieces = [piece for k in range(50) for piece in (event(str(k)), b": %d\n" % k)]
    stream.append_pieces(pieces, 1.0)
    assert len(reader.frames) == 2 * LOOSE_WRITES_MAX + 2
    assert all(b": %d\n" % k in b"".join(reader.frames) for k in range(50))
    assert reader.seqs == list(range(1, 51)) and reader.text == "".join(map(str, range(50)))


def test_a_read_of_many_events_goes_in_writes_of_a_bounded_size() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop)
    large = event("x" * 40_000)
    stream.append_pieces([large, large, event("y"), large], 1.0)
    assert [len(frame) <= APPEND_BYTES_MAX + 1000 for frame in reader.frames] == [True] * 3
    assert reader.seqs == [1, 2, 3, 4]


def test_the_same_bytes_object_goes_to_all_readers() -> None:
    stream, loop = new_stream(), Loop()
    readers = [Reader(stream, loop) for _ in range(3)]
    feed(stream, 2)
    for k in range(2):
        assert len({id(reader.frames[k]) for reader in readers}) == 1


def test_a_templated_event_is_handled_like_any_event() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop)
    assert not stream.append_if_templated(event("a"), 1.0)
    feed(stream, 1)
    frame = stream.append_if_templated(event("2 "), 2.0)
    assert reader.seqs == [1]
    stream.hand_out(frame)
    assert reader.seqs == [1, 2]
    assert stream.touched_at == 2.0
    check_counters(reader)


# -- a pause, and the frames in the ring


def test_a_short_pause_is_bridged_by_the_ring_in_one_write() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop)
    feed(stream, 2)
    reader.stall()
    feed(stream, 10)
    assert reader.state is SubscriberState.PAUSED
    assert reader.subscriber.ring.held == 9  # the first of them stays with the transport
    reader.take()
    assert reader.state is SubscriberState.LIVE
    assert len(reader.frames) == 4
    assert reader.seqs == list(range(1, 13))
    feed(stream, 1)
    assert reader.seqs == list(range(1, 14))
    check_counters(reader)


def test_a_pause_without_events_writes_nothing() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop)
    reader.stall()
    feed(stream, 1)
    reader.take()
    assert (reader.state, len(reader.frames)) == (SubscriberState.LIVE, 1)


def test_events_of_one_read_enter_the_ring_one_by_one() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop, policy=Policy.DROP_OLDEST)
    reader.stall()
    feed(stream, 1)
    stream.append_all([event("x")] * (RING_SLOTS + 5), 1.0)
    reader.take()
    assert reader.gaps == [(2, 6)]
    assert reader.seqs == [1, *range(7, RING_SLOTS + 7)]


def test_a_pause_in_the_middle_of_a_read_misses_nothing() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop, capacity=100)
    stream.append_all([event("a"), event("b")], 1.0)
    assert reader.state is SubscriberState.PAUSED
    stream.append_all([event("c"), event("d")], 1.0)
    reader.take()
    assert reader.text == "abcd"
    assert reader.seqs == [1, 2, 3, 4]


# -- coalesce


def overflow(reader: Reader, stream: Stream, count: int = RING_SLOTS + 20) -> None:
    feed(stream, 3)
    reader.stall()
    feed(stream, count)


def test_coalesce_drops_the_ring_and_catches_up_from_the_log() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop)
    overflow(reader, stream)
    assert reader.state is SubscriberState.BEHIND
    assert reader.subscriber.ring.held == reader.subscriber.ring.bytes_held == 0
    reader.take()
    assert reader.state is SubscriberState.LIVE
    assert reader.text == said(stream)
    assert reader.gaps == []
    assert (
        len(reader.events) == 5
    )  # three live, the event that filled the transport, and a last event with all the rest
    assert reader.events[-1].seq == stream.events
    feed(stream, 1)
    assert reader.text == said(stream)
    check_counters(reader)


def test_a_catch_up_writes_one_piece_a_turn() -> None:
    stream, loop = new_stream(), Loop()
    agree(stream, catchup_bytes_max=2000)
    reader = Reader(stream, loop)
    overflow(reader, stream, 3000)
    writes = len(reader.frames)
    reader.take()
    assert (reader.state, len(reader.frames)) == (SubscriberState.CATCHING, writes + 1)
    while reader.state is SubscriberState.CATCHING:
        before = len(reader.frames)
        loop.turn()
        assert len(reader.frames) - before == 1
        assert len(reader.frames[-1]) < 2 * stream.terms.catchup_bytes_max + 500
    assert reader.text == said(stream)
    check_counters(reader)


def test_a_reader_that_stalls_again_in_its_catch_up_loses_nothing() -> None:
    stream, loop = new_stream(), Loop()
    agree(stream, catchup_bytes_max=1000)
    reader = Reader(stream, loop)
    overflow(reader, stream, 1000)
    seen = set()
    for _ in range(50):
        reader.take(300)
        loop.turn()
        feed(stream, 10)
        seen.add(reader.state)
    assert {SubscriberState.BEHIND, SubscriberState.PAUSED} <= seen
    reader.take()
    loop.rest()
    assert reader.state is SubscriberState.LIVE
    assert reader.text == said(stream)


def test_events_that_do_not_merge_come_unchanged() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop)
    overflow(reader, stream)
    finish = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    stream.append(finish, 1.0)
    stream.append(DONE, 1.0)
    reader.take()
    assert [each.data for each in reader.events[-2:]] == [finish[6:-2], b"[DONE]"]
    assert reader.text == said(stream).replace(f"{stream.events - 1} {stream.events} ", "")


def test_a_reader_behind_the_log_gets_a_gap() -> None:
    stream, loop = new_stream(stream_log_events_max=100), Loop()
    reader = Reader(stream, loop)
    overflow(reader, stream, 5000)
    first = stream.log.seq_first
    assert first > 5
    reader.take()
    loop.rest()
    assert reader.gaps == [(5, first - 1)]
    assert reader.subscriber.dropped == first - 5
    assert reader.text == "".join(f"{seq} " for seq in (1, 2, 3, 4, *range(first, stream.events + 1)))
    assert reader.subscriber.events_delivered == 4 + stream.events + 1 - first
    gap = next(each for each in reader.events if each.name == "gap")
    assert gap.seq == first - 1
    check_counters(reader)


def test_a_paused_reader_behind_the_log_gets_a_gap() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop)
    feed(stream, 3)
    reader.stall()
    feed(stream, 10)
    stream.log.trim_to(0)
    assert reader.state is SubscriberState.PAUSED
    reader.take()
    loop.rest()
    assert reader.gaps == [(5, 13)]
    feed(stream, 2)
    assert reader.seqs == [1, 2, 3, 4, 14, 15]
    check_counters(reader)


# -- each policy

FULL_RING = {
    Policy.COALESCE: SubscriberState.BEHIND,
    Policy.DROP_OLDEST: SubscriberState.PAUSED,
    Policy.CLOSE: SubscriberState.ENDED,
}


@pytest.mark.parametrize("policy", Policy)
def test_every_policy_has_its_own_outcome_when_the_ring_is_full(policy: Policy) -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop, policy=policy)
    overflow(reader, stream)
    assert reader.state is FULL_RING[policy]


def test_a_policy_without_a_branch_is_an_error_and_never_another_policy() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop)
    reader.stall()
    feed(stream, 1)
    reader.subscriber.policy = "unheard_of"  # type: ignore[assignment]
    with pytest.raises(AssertionError, match="unheard_of"):
        reader.subscriber.frames_gone(10)
    assert reader.state is SubscriberState.PAUSED


def test_settings_accept_exactly_the_policies_that_exist() -> None:
    (row,) = (row for row in ROWS if row.key == "policy")
    assert row.words == tuple(policy.value for policy in Policy)


# -- drop_oldest


def test_drop_oldest_keeps_the_newest_and_says_what_is_missing() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop, policy=Policy.DROP_OLDEST)
    overflow(reader, stream, 100)
    assert reader.state is SubscriberState.PAUSED
    reader.take()
    assert reader.state is SubscriberState.LIVE
    last = stream.events
    assert reader.gaps == [(5, last - RING_SLOTS)]
    assert reader.seqs == [1, 2, 3, 4, *range(last - RING_SLOTS + 1, last + 1)]
    assert [each.name for each in reader.events][4] == "gap"
    assert reader.subscriber.dropped == last - RING_SLOTS - 4
    check_counters(reader)


def test_a_second_stall_is_a_second_gap() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop, policy=Policy.DROP_OLDEST)
    for _ in range(2):
        reader.stall()
        feed(stream, RING_SLOTS + 3)
        reader.take()
    assert reader.gaps == [(2, 3), (RING_SLOTS + 5, RING_SLOTS + 6)]
    check_counters(reader)


def test_a_large_event_drops_as_many_frames_as_it_needs() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop, policy=Policy.DROP_OLDEST)
    reader.stall()
    feed(stream, 20)
    stream.append(event("x" * 40_000), 1.0)
    assert reader.subscriber.ring.held == 1
    reader.take()
    assert reader.gaps == [(2, 20)]
    assert reader.seqs == [1, 21]


# -- close


def test_close_ends_only_the_slow_reader() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop, policy=Policy.CLOSE)
    other = Reader(stream, loop)
    overflow(reader, stream)
    other_got = other.seqs
    assert (reader.state, reader.cut) == (SubscriberState.ENDED, 1)
    assert reader.subscriber in stream.readers  # it leaves from its own callback, not inside append()
    loop.rest()
    assert stream.readers == [other.subscriber]
    assert reader.seqs == [1, 2, 3, 4]
    assert other_got == list(range(1, stream.events + 1))


def test_close_bridges_a_pause_that_fits_the_ring() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop, policy=Policy.CLOSE)
    reader.stall()
    feed(stream, RING_SLOTS + 1)
    assert (reader.state, reader.cut) == (SubscriberState.PAUSED, 0)
    reader.take()
    assert reader.seqs == list(range(1, RING_SLOTS + 2))


# -- the first event of a reader


@pytest.mark.parametrize("seq", [1, 5, 50, 101])
def test_late_joiners_and_resumes_begin_at_the_seq_that_they_name(seq: int) -> None:
    stream, loop = new_stream(), Loop()
    feed(stream, 100)
    reader = Reader(stream, loop, seq=seq)
    loop.rest()
    assert reader.state is SubscriberState.LIVE
    assert reader.text == "".join(f"{k} " for k in range(seq, 101))
    assert len(reader.events) <= 1
    feed(stream, 2)
    assert reader.text == "".join(f"{k} " for k in range(seq, 103))
    assert reader.subscriber.events_delivered == 103 - seq
    check_counters(reader)


def test_a_resume_below_the_log_begins_with_a_gap() -> None:
    stream, loop = new_stream(stream_log_events_max=100), Loop()
    feed(stream, 3000)
    first = stream.log.seq_first
    reader = Reader(stream, loop, seq=2)
    loop.rest()
    assert reader.gaps == [(2, first - 1)]
    assert reader.events[0].name == "gap"
    assert reader.text == "".join(f"{k} " for k in range(first, 3001))


def test_a_reader_that_begins_with_a_full_transport_waits() -> None:
    stream, loop = new_stream(), Loop()
    feed(stream, 5)
    reader = Reader(stream, loop, capacity=0)
    assert reader.state is SubscriberState.BEHIND
    feed(stream, 5)
    reader.take()
    loop.rest()
    assert reader.text == said(stream)


def test_a_reset_is_announced_before_everything_else() -> None:
    stream, loop = new_hub().open(Dialect.UNKNOWN, 0.0, name="n", epoch="e00000"), Loop()
    feed(stream, 3)
    reader = Reader(stream, loop, seq=4)  # joins first, as a connection's subscriber does
    reader.subscriber.announce_reset()
    gap = reader.events[0]
    assert (gap.name, gap.json["gap"]) == ("gap", {"from": 0, "to": 0, "reset": True})
    assert gap.id == "n:e00000:0"


# -- forms


def test_http10_reads_the_log_with_its_own_framing() -> None:
    stream, loop = new_stream(), Loop()
    feed(stream, 3)
    reader = Reader(stream, loop, form=Form.BARE)
    assert reader.state is SubscriberState.FOLLOWING
    feed(stream, 3)
    assert reader.text == said(stream)
    assert reader.seqs == [3, 4, 5, 6]
    reader.stall()
    feed(stream, 500)
    assert reader.state is SubscriberState.BEHIND
    reader.take()
    loop.rest()
    assert reader.state is SubscriberState.FOLLOWING
    assert reader.text == said(stream)
    check_counters(reader)


@pytest.mark.parametrize("form", [Form.RAW_CHUNKED, Form.RAW_BARE])
def test_a_raw_reader_gets_only_the_bytes_of_the_events(form: Form) -> None:
    stream, loop = new_stream(), Loop()
    events = [event(f"{k}") for k in range(200)]
    for each in events[:100]:
        stream.append(each, 1.0)
    reader = Reader(stream, loop, form=form)
    stream.loose(b": upstream\n", 1.0)
    assert not reader.subscriber.heartbeat()
    reader.stall()
    for each in events[100:]:
        stream.append(each, 1.0)
    reader.take()
    loop.rest()
    reader.subscriber.farewell(message="go", retry_ms=1)
    assert reader.body == b"".join(events)
    assert reader.state is SubscriberState.ENDED


def test_a_raw_reader_that_lost_bytes_is_cut_off() -> None:
    stream, loop = new_stream(stream_log_events_max=100), Loop()
    feed(stream, 1)
    reader = Reader(stream, loop, form=Form.RAW_CHUNKED)
    got = reader.body
    reader.stall()
    feed(stream, 3000)
    reader.take()
    loop.rest()
    assert (reader.cut, reader.ended, reader.left) == (1, None, True)
    assert reader.body.startswith(got)
    assert b"gap" not in reader.body
    assert reader.subscriber.dropped > 0


# -- ends


def test_a_clean_end_reaches_each_reader_when_it_has_everything() -> None:
    stream, loop = new_stream(), Loop()
    live, paused, behind, http10 = (
        Reader(stream, loop, form=form) for form in (Form.CHUNKED, Form.CHUNKED, Form.CHUNKED, Form.BARE)
    )
    behind.stall()
    feed(stream, 60)
    paused.stall()
    feed(stream, 5)
    stream.seal(CloseReason.COMPLETE, 2.0, clean=True)
    assert [reader.ended for reader in (live, paused, behind, http10)] == [True, None, None, True]
    paused.take()
    behind.take()
    loop.rest()
    assert [reader.ended for reader in (paused, behind)] == [True, True]
    assert not stream.readers
    for reader in (live, paused, behind, http10):
        assert reader.text == said(stream)


def test_a_failure_is_the_logs_last_entry() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop)
    feed(stream, 2)
    stream.fail(CloseReason.UPSTREAM_TRUNCATED, 2.0, message="The upstream broke off.")
    assert reader.ended is False
    late = Reader(stream, loop, seq=2)
    for each in (reader, late):
        assert each.events[-1].seq == 3
        assert each.events[-1].json["error"]["code"] == "upstream_truncated"
    assert late.ended is False


def test_the_error_event_of_responses_has_the_next_number() -> None:
    stream = new_stream(dialect=Dialect.RESPONSES)
    stream.append(b'event: x\ndata: {"type":"x","sequence_number":41}\n\n', 1.0)
    stream.fail(CloseReason.UPSTREAM_RESET, 2.0, message="gone")
    last = stream.log.last_event()
    assert last is not None
    assert json.loads(last.partition(b"data: ")[2])["sequence_number"] == 42


@pytest.mark.parametrize("number", [2**63, 2**64 - 1, 2**64, -5])
def test_no_number_of_the_upstream_keeps_the_error_event_from_its_readers(number: int) -> None:
    stream = new_stream(dialect=Dialect.RESPONSES)
    stream.append(b'event: x\ndata: {"type":"x","sequence_number":%d}\n\n' % number, 1.0)
    stream.fail(CloseReason.UPSTREAM_TRUNCATED, 2.0, message="m")
    last = stream.log.last_event()
    assert last is not None
    assert json.loads(last.partition(b"data: ")[2])["sequence_number"] == 0


@pytest.mark.parametrize("number", [2**64 - 1, 2**53 - 1, -1])
def test_an_error_event_follows_a_number_that_can_not_be_counted_on(number: int) -> None:
    stream = new_stream(dialect=Dialect.RESPONSES)
    stream.append(b'event: x\ndata: {"type":"x","sequence_number":%d}\n\n' % number, 1.0)
    stream.fail(CloseReason.UPSTREAM_RESET, 2.0, message="gone")
    last = stream.log.last_event()
    assert last is not None and b"upstream_reset" in last and stream.reason is CloseReason.UPSTREAM_RESET


@pytest.mark.parametrize("act", ["append", "append_all", "loose", "seal", "fail", "cancel"])
@pytest.mark.parametrize("form", [Form.CHUNKED, Form.BARE])
def test_a_reader_whose_write_raises_ends_alone(act: str, form: Form) -> None:
    stream, loop = new_stream(), Loop()
    good, refusing, late = Reader(stream, loop), Reader(stream, loop, form=form), Reader(stream, loop)
    stream.append(event("one "), 1.0)
    refusing.refuses = True
    acts: dict[str, Callable[[], None]] = {
        "append": lambda: stream.append(event("two "), 2.0),
        "append_all": lambda: stream.append_all([event("two "), event("three ")], 2.0),
        "loose": lambda: stream.loose(b": hello\n", 2.0),
        "seal": lambda: (stream.append(event("two "), 2.0), stream.seal(CloseReason.COMPLETE, 2.0, clean=True))[1],
        "fail": lambda: stream.fail(CloseReason.FAILED, 2.0, message="failed"),
        "cancel": lambda: stream.cancel(CloseReason.CANCELLED, 2.0, message="cancelled"),
    }
    acts[act]()
    loop.rest()
    assert [type(error) for error in refusing.refusals] == [MemoryError] and refusing.left
    assert not good.refusals and not late.refusals and good.sent == late.sent
    assert good.seqs[-1] == stream.events and len(good.body) > len(refusing.body)
    assert (good.ended is not None) == (stream.reason is not None)


@pytest.mark.parametrize("broken", ["stream_sealed", "last_event", "append", "stream_ended", "cancel"])
def test_fail_and_seal_can_not_fail(broken: str) -> None:
    caught: list[Exception] = []
    stream, loop = new_stream(dialect=Dialect.RESPONSES), Loop()
    stream.keeper.guard.caught = lambda where, error: caught.append(error)
    source = stream.source = Source()
    reader, other = Reader(stream, loop), Reader(stream, loop)
    stream.append(event("one "), 1.0)
    owner, name = {
        "stream_sealed": (type(stream.keeper), "stream_sealed"),
        "last_event": (type(stream.log), "last_event"),
        "append": (type(stream.log), "keep_whole"),
        "stream_ended": (reader, "stream_ended"),
        "cancel": (source, "cancel"),
    }[broken]
    with mock.patch.object(owner, name, side_effect=MemoryError):
        stream.cancel(CloseReason.CANCELLED, 2.0, message="cancelled")
    loop.rest()
    assert stream.reason is CloseReason.CANCELLED and other.ended is False
    assert reader.ended is False or reader.refusals
    assert [type(error) for error in (*caught, *reader.refusals)] == [MemoryError]


def test_cancelling_ends_the_source_once() -> None:
    stream, loop = new_stream(), Loop()
    source = stream.source = Source()
    reader = Reader(stream, loop)
    stream.cancel(CloseReason.CANCELLED, 1.0, message="stopped")
    stream.cancel(CloseReason.CANCELLED, 2.0, message="stopped again")
    assert source.cancelled == [CloseReason.CANCELLED]
    assert (stream.source, stream.sealed_at, stream.events) == (None, 1.0, 1)
    assert reader.ended is False


def test_a_stream_is_sealed_once() -> None:
    stream = new_stream()
    stream.seal(CloseReason.COMPLETE, 1.0, clean=True)
    with pytest.raises(AssertionError, match="sealed as"):
        stream.seal(CloseReason.COMPLETE, 1.0, clean=True)


def test_an_ended_reader_gets_no_further_bytes() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop)
    feed(stream, 1)
    reader.subscriber.end()
    reader.subscriber.end()
    feed(stream, 3)
    stream.loose(b": c\n", 1.0)
    reader.subscriber.farewell(message="go", retry_ms=1)
    assert len(reader.frames) == 1
    reader.leave()
    assert not stream.readers


def test_the_place_of_a_leaving_reader_goes_to_the_last_reader() -> None:
    stream, loop = new_stream(), Loop()
    readers = [Reader(stream, loop) for _ in range(4)]
    readers[1].leave()
    readers[3].leave()
    assert [reader.index for reader in stream.readers] == [0, 1]
    assert {id(reader) for reader in stream.readers} == {id(readers[0].subscriber), id(readers[2].subscriber)}
    with pytest.raises(AssertionError):
        stream.leave(readers[0].subscriber)  # it has not ended


def test_an_event_that_the_state_does_not_allow_is_a_bug() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop)
    with pytest.raises(AssertionError, match="RESUME"):
        reader.subscriber._go(SubscriberEvent.RESUME)


# -- beside the events


def test_only_a_reader_at_the_live_end_gets_heartbeats_and_comments() -> None:
    stream, loop = new_stream(), Loop()
    live, paused = Reader(stream, loop), Reader(stream, loop)
    paused.stall()
    feed(stream, 2)
    stream.loose(b": processing\n", 3.0)
    assert stream.touched_at == 3.0
    assert live.subscriber.heartbeat()
    assert not paused.subscriber.heartbeat()
    assert live.body.endswith(b": processing\n" + HEARTBEAT)
    paused.take()
    assert b": " not in paused.body.replace(b"data: ", b"").replace(b"id: ", b"")
    assert live.subscriber.bytes_delivered == sum(map(len, live.frames))


def test_a_farewell_names_the_readers_position() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop)
    feed(stream, 7)
    reader.subscriber.farewell(message="Come back.", retry_ms=1500)
    last = reader.events[-1]
    assert last.json["last_id"] == f"{stream.id}:7"
    assert b"retry: 1500\n" in reader.body
    assert stream.events == 7
    assert reader.state is SubscriberState.ENDED


def test_the_upstreams_id_of_a_response_is_registered_once() -> None:
    hub = new_hub()
    stream = hub.open(Dialect.RESPONSES, 0.0)
    agree(stream, owner="p")
    for name in ("resp_1", "resp_2"):
        data = {"type": "response.created", "sequence_number": 0, "response": {"id": name}}
        stream.append(b"data: " + json.dumps(data).encode() + b"\n\n", 1.0)
    assert hub.by_response_id("p", "resp_1") is stream
    assert hub.by_response_id("p", "resp_2") is None


# -- all of this in any order

LOSSLESS = st.lists(
    st.one_of(
        st.integers(1, 50).map(lambda count: ("feed", count)),
        st.integers(1, 3000).map(lambda count: ("take", count)),
        st.sampled_from([("stall", 0), ("turn", 0), ("whole", 0), ("loose", 0)]),
    ),
    max_size=60,
)


def play(steps: list[tuple[str, int]], policy: Policy, form: Form = Form.CHUNKED, **bounds: int) -> Reader:
    """Play a reader's life with a stream up to its end, with everything read."""
    stream, loop = new_stream(**bounds), Loop()
    agree(stream, catchup_bytes_max=700)
    reader = Reader(stream, loop, policy=policy, form=form, capacity=0, slots=32)
    for step, count in steps:
        if step == "feed":
            feed(stream, count)
        elif step == "take":
            reader.take(count)
        elif step == "stall":
            reader.stall()
        elif step == "loose":
            stream.loose(b": c\n", 1.0)
        elif step == "turn":
            loop.turn()
        else:
            stream.append_all([event(f"{stream.log.seq_next + k} ") for k in range(3)], 1.0)
    stream.seal(CloseReason.COMPLETE, 2.0, clean=True)
    reader.take()
    loop.rest()
    return reader


@given(LOSSLESS, st.sampled_from([Form.CHUNKED, Form.BARE]))
def test_coalesce_loses_nothing(steps: list[tuple[str, int]], form: Form) -> None:
    reader = play(steps, Policy.COALESCE, form)
    assert reader.ended is True
    assert reader.text == said(reader.stream)
    assert reader.gaps == []
    assert reader.seqs == sorted(set(reader.seqs))
    check_counters(reader)


@given(LOSSLESS)
def test_a_raw_reader_loses_nothing(steps: list[tuple[str, int]]) -> None:
    reader = play(steps, Policy.COALESCE, Form.RAW_CHUNKED)
    log = reader.stream.log
    assert reader.body == b"".join(each for _, each in log.read(log.seek(1), bytes_max=1 << 30))


@given(LOSSLESS, st.sampled_from([Policy.COALESCE, Policy.DROP_OLDEST]))
def test_every_token_is_there_or_announced(steps: list[tuple[str, int]], policy: Policy) -> None:
    reader = play(steps, policy, stream_log_events_max=100)
    assert reader.ended is True
    covered = [seq for first, last in reader.gaps for seq in range(first, last + 1)]
    covered += [int(word) for word in reader.text.split()]
    assert sorted(covered) == list(range(1, reader.stream.events + 1))
    assert reader.subscriber.dropped == sum(last + 1 - first for first, last in reader.gaps)
    check_counters(reader)


@given(LOSSLESS)
def test_close_gives_a_beginning_without_a_hole(steps: list[tuple[str, int]]) -> None:
    reader = play(steps, Policy.CLOSE)
    words = reader.text.split()
    assert words == [str(seq) for seq in range(1, len(words) + 1)]
    assert (reader.ended is True) is not bool(reader.cut)
    if reader.ended:
        assert len(words) == reader.stream.events


# -- streams with readers that count bytes


def counted(**bounds: int) -> CountedStream:
    return new_hub(**bounds).open_conversation(Dialect.CHAT, 0.0, conversation="c", terms=Terms(owner="p"))


PIECES = st.lists(st.lists(st.text(max_size=20), min_size=1, max_size=5), min_size=1, max_size=30)


@given(PIECES, st.integers(1, 9), st.data())
def test_every_byte_offset_is_found_in_its_event(reads: list[list[str]], mark_events: int, data: st.DataObject) -> None:
    stream = counted(stream_log_events_max=data.draw(st.sampled_from([4, 20, 1000])))
    whole = b""
    with mock.patch.object(core_stream, "MARK_EVENTS", mark_events):
        for texts in reads:
            events = [event(text) for text in texts]
            if len(events) > 1 or not stream.append_if_templated(events[0], 1.0):
                stream.append_all(events, 1.0)
            whole += b"".join(events)
    assert stream.event_bytes == len(whole)
    log = stream.log
    held = b"".join(each for _, each in log.read(log.seek(log.seq_first), bytes_max=1 << 30))
    for offset in {0, len(whole) - len(held), len(whole), *data.draw(st.lists(st.integers(0, len(whole)), max_size=9))}:
        place = stream.place(offset)
        if offset < len(whole) - len(held):
            assert place is None
            continue
        assert place is not None
        rest = log.read(log.seek(place.seq), bytes_max=1 << 30)
        assert place.rest + b"".join(each for _, each in rest) == whole[offset:]


def test_marks_bound_the_search_for_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = counted()
    for k in range(5 * MARK_EVENTS):
        stream.append(event(str(k)), 1.0)
    read: list[int] = []
    whole = stream._walk

    def walk(self: CountedStream, seq: int, end: int) -> Iterator[tuple[int, bytes]]:
        for number, each in whole(seq, end):
            read.append(number)
            yield number, each

    monkeypatch.setattr(CountedStream, "_walk", walk)
    place = stream.place(stream.event_bytes - 1)
    assert place == (5 * MARK_EVENTS + 1, b"\n")
    assert len(read) <= MARK_EVENTS


def test_a_farewell_before_an_unannounced_gap_names_the_position_before_it() -> None:
    stream, loop = new_stream(), Loop()
    reader = Reader(stream, loop, policy=Policy.DROP_OLDEST)
    feed(stream, 3)
    reader.stall()
    feed(stream, RING_SLOTS + 6)
    assert reader.subscriber.dropped == 5
    reader.paused, reader.capacity = False, PLENTY  # there is room again, but resume_writing has not been called yet
    reader.subscriber.farewell(message="Come back.", retry_ms=1500)
    assert reader.events[-1].json["last_id"] == f"{stream.id}:4"


def test_each_of_several_events_in_one_read_is_inspected() -> None:
    stream = new_stream()
    stream.append_all([event("a"), event("b"), DONE], 1.0)
    assert stream.first_event_at == 1.0
    assert stream.progress.complete and stream.progress.terminal


# -- streams that another process owns


def copied(loop: Loop, *counts: int) -> tuple[Stream, Stream, list[LogRecord]]:
    """A stream, an empty copy of it, and the records of its growth by so many events each."""
    own, copy = new_stream(), new_stream(loop)
    mark, records = own.log.mark_at_start(), []
    for count in counts:
        feed(own, count)
        record = own.log.since(mark, bytes_max=1 << 20)
        assert record is not None
        records.append(record)
    return own, copy, records


def test_records_reach_readers_as_events_do() -> None:
    loop = Loop()
    own, copy, records = copied(loop, 1, 1, 5, 300)
    readers = [Reader(copy, loop), Reader(copy, loop, form=Form.BARE), Reader(copy, loop, form=Form.RAW_CHUNKED)]
    slow = Reader(copy, loop, capacity=2000)
    for record in records:
        copy.take_record(record, 1.0)
        loop.rest()
    slow.take()
    loop.rest()
    direct = Reader(own, loop)
    loop.rest()
    for reader in (*readers, slow):
        assert text_of(events_in(reader.body)) == direct.text
    assert copy.log.parts() == own.log.parts() and copy.events == 307
    assert (copy.progress.text_events, copy.text_events) == (own.progress.text_events, own.text_events)


def test_a_record_reaches_a_live_reader_in_a_single_write() -> None:
    loop = Loop()
    _, copy, records = copied(loop, 1, 50)
    copy.take_record(records[0], 1.0)
    reader = Reader(copy, loop)
    before = len(reader.frames)
    copy.take_record(records[1], 1.0)
    assert len(reader.frames) == before + 1 and reader.seqs == list(range(1, 52))


def test_a_record_larger_than_the_log_reaches_every_live_reader() -> None:
    loop = Loop()
    own, copy = new_stream(), new_stream(loop, stream_log_events_max=20)
    readers = [Reader(copy, loop), Reader(copy, loop, form=Form.BARE), Reader(copy, loop, form=Form.RAW_CHUNKED)]
    mark = own.log.mark_at_start()
    for count in (1, 300):
        feed(own, count)
        record = own.log.since(mark, bytes_max=1 << 20)
        assert record is not None
        copy.take_record(record, 1.0)
        loop.rest()
    assert copy.log.seq_first > 200, "the log has dropped most of the record"
    for reader in readers:
        assert text_of(events_in(reader.body)) == said(own)


def test_a_reader_that_has_more_of_a_lost_stream_than_is_known_here_keeps_its_position() -> None:
    loop = Loop()
    stream = new_stream(loop)
    feed(stream, 3)
    stream.seal(CloseReason.NODE_LOST, 2.0, clean=False)
    for seq, told in ((2, 3), (4, 3), (9, 8)):
        reader = Reader(stream, loop, seq=seq)
        assert f"id: {stream.id}:{told}!\n".encode() in reader.body
        assert reader.ended is False and reader.subscriber.events_delivered == max(0, 4 - seq)


def test_a_record_that_does_not_continue_the_stream_is_refused() -> None:
    loop = Loop()
    _, copy, records = copied(loop, 3, 3, 3)
    copy.take_record(records[0], 1.0)
    reader = Reader(copy, loop)
    for record in (records[0], records[2]):
        with pytest.raises(ValueError):
            copy.take_record(record, 1.0)
    assert copy.events == 3 and reader.text == said(copy)


def test_a_log_that_continues_the_stream_takes_its_place() -> None:
    loop = Loop()
    own, copy, records = copied(loop, 40)
    copy.take_record(records[0], 1.0)
    live, slow = Reader(copy, loop), Reader(copy, loop)
    slow.stall()
    whole = feed(own, 30)
    fresh, mark = ReplayLog(bytes_max=1 << 20, events_max=1000), own.log.mark_at_start()
    while record := own.log.since(mark, bytes_max=100):
        fresh.extend(record)
    copy.replace_log(fresh, 2.0)
    copy.append(event("end"), 3.0)
    slow.take()
    loop.rest()
    for reader in (live, slow):
        assert reader.text == said(own) + "end" and whole in reader.text and reader.gaps == []
    short = ReplayLog(bytes_max=1 << 20, events_max=1000)
    with pytest.raises(ValueError):
        copy.replace_log(short, 4.0)


def test_of_a_copys_log_as_much_is_known_as_of_its_owners() -> None:
    own = new_stream()
    feed(own, 3)
    own.append(b'data: {"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n', 1.0)
    copy = new_stream()
    record = own.log.since(own.log.mark_at_start(), bytes_max=1 << 20)
    assert record is not None
    copy.log.extend(record)
    copy.look_into_log(1.0)
    assert copy.progress.chunk_head == own.progress.chunk_head != b""
    assert copy.progress.terminal == own.progress.terminal
    new_stream().look_into_log(1.0)
