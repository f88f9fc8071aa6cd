"""The registry of streams: names, graces, retention, and the memory of all logs."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable

import pytest
from fakes import event
from sinks import Loop, Reader, Source, agree, feed, new_hub

from streamd.core.fanout import SlicedFanout
from streamd.core.hub import CHARGE_TURNS, ENTRY_BYTES, ID_LEN, RECORD_BYTES, Gone, Hub, body_hash
from streamd.core.limits import Account
from streamd.core.stream import CountedStream, Stream, Subscriber
from streamd.core.terms import Terms
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect
from streamd.wire.event_id import valid_stream_id


def opened(hub: Hub, now: float = 0.0, *, retention_s: float = 60.0, **given: object) -> Stream:
    stream = hub.open(Dialect.CHAT, now, **given)  # type: ignore[arg-type]
    agree(stream, retention_s=retention_s)
    stream.source = Source()
    return stream


def reading(hub: Hub, stream: Stream, reason: CloseReason = CloseReason.READER_GONE, now: float = 5.0) -> Reader:
    """A reader that leaves by way of the hub, as connections do."""

    def leave(subscriber: Subscriber) -> None:
        hub.leave(subscriber, reason, now)

    hub.end_grace(stream)
    return Reader(stream, Loop(), leave=leave)


# -- ids and names


def test_ids_are_random_and_have_their_form() -> None:
    hub = new_hub()
    ids = {opened(hub).id for _ in range(100)}
    assert len(ids) == 100
    assert all(valid_stream_id(each.encode()) and len(each) == ID_LEN for each in ids)
    assert all(hub.get(each) is not None for each in ids)


def test_an_id_of_a_process_that_has_ended_is_gone() -> None:
    before, after = new_hub(), new_hub()
    with pytest.raises(Gone):
        after.get(opened(before).id)
    with pytest.raises(Gone):
        after.get("s_" + "x" * (ID_LEN - 2))  # the slot of another worker
    assert after.get("s_" + "x" * (ID_LEN - 3)) is None  # too short for an id
    assert after.get("anything") is None


def test_a_name_is_taken_until_its_stream_is_removed() -> None:
    hub = new_hub()
    stream = opened(hub, name="n", epoch="abcdef")
    with pytest.raises(KeyError):
        opened(hub, name="n")
    assert stream.event_id(7) == "n:abcdef:7"
    stream.seal(CloseReason.SEALED, 1.0, clean=True)
    hub.remove(stream)
    assert hub.get("n") is None
    assert opened(hub, name="n") is not stream


def test_the_bounds_of_a_stream_are_at_most_those_of_the_hub() -> None:
    hub = new_hub(stream_log_bytes_max=1000, stream_log_events_max=50)
    own = opened(hub, log_bytes_max=500, log_events_max=10).log
    most = opened(hub, log_bytes_max=5000, log_events_max=500).log
    assert (own.bytes_max, own.events_max) == (500, 10)
    assert (most.bytes_max, most.events_max) == (1000, 50)


def test_each_principal_has_its_own_idempotency_keys_which_go_with_their_stream() -> None:
    hub = new_hub()
    stream = opened(hub)
    hub.keep_key("a", "k", body_hash(b"x"), stream)
    hub.keep_key("b", "k", body_hash(b"x"), None)
    kept = hub.by_key("a", "k")
    assert kept is not None
    assert (kept.stream, kept.body_hash) == (stream, body_hash(b"x"))
    assert hub.by_key("c", "k") is None
    hub.forget_key("b", "k")
    hub.forget_key("b", "k")
    assert hub.by_key("b", "k") is None
    stream.seal(CloseReason.COMPLETE, 0.0, clean=True)
    hub.remove(stream)
    assert hub.by_key("a", "k") is None


def created(name: str) -> bytes:
    body = {"type": "response.created", "sequence_number": 0, "response": {"id": name}}
    return b"event: response.created\ndata: " + json.dumps(body).encode() + b"\n\n"


def test_responses_are_found_by_the_id_that_the_upstream_gave_them() -> None:
    hub = new_hub()
    streams = [hub.open(Dialect.RESPONSES, 0.0) for _ in range(2)]
    for stream, owner in zip(streams, "ab", strict=True):
        agree(stream, owner=owner)
        stream.append(created("resp_1"), 1.0)
    assert [hub.by_response_id(owner, "resp_1") for owner in "abc"] == [*streams, None]
    streams[0].seal(CloseReason.COMPLETE, 1.0, clean=True)
    hub.remove(streams[0])
    assert [hub.by_response_id(owner, "resp_1") for owner in "ab"] == [None, streams[1]]


def test_a_response_id_names_its_newest_stream() -> None:
    hub = new_hub()
    old, new = (hub.open(Dialect.RESPONSES, 0.0) for _ in range(2))
    for stream in (old, new):
        stream.append(created("resp_1"), 1.0)
        stream.seal(CloseReason.COMPLETE, 1.0, clean=True)
    hub.remove(old)
    assert hub.by_response_id("", "resp_1") is new
    hub.remove(new)
    assert not hub._by_response


def conversation(hub: Hub, principal: str, name: str) -> CountedStream:
    return hub.open_conversation(Dialect.CHAT, 0.0, conversation=name, terms=Terms(owner=principal))


def test_a_conversation_is_its_newest_stream() -> None:
    hub = new_hub()
    old, new, other = (conversation(hub, *given) for given in (("a", "c"), ("a", "c"), ("b", "c")))
    assert (hub.by_conversation("a", "c"), hub.by_conversation("b", "c")) == (new, other)
    assert dict(hub.conversations("a")) == {"c": new}
    hub.remove(old)
    assert hub.by_conversation("a", "c") is new
    hub.remove(new)
    assert hub.by_conversation("a", "c") is None
    hub.forget_conversation("b", "c")
    hub.forget_conversation("b", "c")
    assert hub.get(other.id) is other
    hub.remove(other)
    assert not hub._by_conversation
    assert not hub._conversation_of


# -- graces


def test_the_last_reader_of_a_generation_ends_it() -> None:
    hub = new_hub()
    stream = opened(hub)
    first, second = reading(hub, stream), reading(hub, stream)
    first.leave()
    assert stream.reason is None
    second.leave()
    assert stream.reason is CloseReason.READER_GONE
    assert hub.detached == 0


def test_without_readers_the_source_ends_at_once_and_the_stream_a_turn_later() -> None:
    hub = new_hub()
    later: list[Callable[[], None]] = []
    hub.soon = later.append
    stream = opened(hub)
    stream.source = source = Source()
    reading(hub, stream).leave()
    assert (source.cancelled, stream.source, stream.reason) == ([CloseReason.READER_GONE], None, None)
    joined = reading(hub, stream)  # in between
    later.pop()()
    assert stream.reason is CloseReason.READER_GONE
    assert b"stopped because its reader left" in joined.frames[-1]
    assert not later


def test_a_stream_that_is_cancelled_before_its_late_end_ends_once() -> None:
    hub = new_hub()
    later: list[Callable[[], None]] = []
    hub.soon = later.append
    stream = opened(hub)
    reading(hub, stream).leave()
    stream.cancel(CloseReason.CANCELLED, 5.0, message="DELETE")
    later.pop()()
    assert stream.reason is CloseReason.CANCELLED


def test_a_published_stream_outlives_its_readers() -> None:
    hub = new_hub()
    stream = opened(hub)
    stream.source = Source(needs_reader=False)
    reading(hub, stream).leave()
    hub.sweep(hub, 1000.0)
    assert (stream.reason, hub.detached) == (None, 0)


@pytest.mark.parametrize(
    ("left", "grace_s"),
    [
        (CloseReason.READER_GONE, 10),
        (CloseReason.NETWORK_LOST, 30),
        (CloseReason.STALLED, 30),
        (CloseReason.SLOW_CONSUMER, 30),
        (CloseReason.DRAINING, 30),
    ],
)
def test_the_reason_of_the_last_leave_decides_the_grace(left: CloseReason, grace_s: int) -> None:
    hub = new_hub()
    stream = opened(hub)
    agree(stream, detach_grace_s=10.0, resume_grace_s=30.0)
    reading(hub, stream, left, now=5.0).leave()
    assert (hub.detached, stream.grace_until) == (1, 5.0 + grace_s)
    hub.sweep(hub, 5.0 + grace_s - 0.1)
    assert stream.reason is None
    hub.sweep(hub, 5.0 + grace_s)
    assert (stream.reason, hub.detached) == (CloseReason.ABANDONED, 0)


def test_a_reader_that_comes_back_ends_the_grace_and_the_next_grace_is_whole() -> None:
    hub = new_hub()
    stream = opened(hub)
    agree(stream, detach_grace_s=10.0)
    reading(hub, stream, now=0.0).leave()
    back = reading(hub, stream, now=8.0)
    assert (hub.detached, stream.grace_until) == (0, 0.0)
    hub.sweep(hub, 20.0)
    assert stream.reason is None
    back.leave()
    assert (hub.detached, stream.grace_until) == (1, 18.0)


def test_live_streams_are_charged_in_turn_and_graces_end_at_once() -> None:
    hub = new_hub()
    streams = [opened(hub) for _ in range(CHARGE_TURNS + 1)]
    for stream in streams:
        feed(stream, 3)
    charged: list[int] = []
    for turn in range(CHARGE_TURNS):
        hub.sweep(hub, 1.0, turn)
        charged.append(sum(stream.ledger.counted_events == 3 for stream in streams))
    assert charged == [1, 3, 4, 5]
    left = streams[0]
    hub.orphan(left, 5.0, CloseReason.READER_GONE, 1.0)
    hub.sweep(hub, 6.0, left.charge_turn + 1)
    assert left.reason is CloseReason.ABANDONED


def test_a_stream_orphaned_twice_is_counted_once() -> None:
    hub = new_hub()
    stream = opened(hub)
    hub.orphan(stream, 5.0, CloseReason.READER_GONE, 0.0)
    hub.orphan(stream, 9.0, CloseReason.READER_GONE, 0.0)
    assert (hub.detached, stream.grace_until) == (1, 9.0)
    hub.orphan(stream, 0.0, CloseReason.READER_GONE, 1.0)
    assert (hub.detached, stream.reason) == (0, CloseReason.READER_GONE)


def test_detached_streams_are_bounded() -> None:
    hub = new_hub(detached_max=2)
    streams = [opened(hub) for _ in range(3)]
    for stream in streams:
        agree(stream, detach_grace_s=10.0)
        reading(hub, stream).leave()
    assert [stream.reason for stream in streams] == [None, None, CloseReason.READER_GONE]
    assert hub.detached == 2


# -- the end, and afterwards


def test_a_sealed_stream_stays_for_its_retention_and_for_its_readers() -> None:
    hub = new_hub()
    stream = opened(hub, retention_s=60.0)
    feed(stream, 50)
    reader = Reader(stream, Loop(), capacity=0, leave=lambda subscriber: hub.leave(subscriber, CloseReason.COMPLETE, 0))
    stream.seal(CloseReason.COMPLETE, 10.0, clean=True)
    hub.sweep(hub, 1000.0)
    assert hub.get(stream.id) is stream
    reader.take()
    assert reader.left
    gone: list[Stream] = []
    hub.on_removed = gone.append
    hub.sweep(hub, 69.9)
    assert len(hub) == 1
    hub.sweep(hub, 70.0)
    assert (len(hub), hub.log_bytes, gone) == (0, 0, [stream])
    hub.remove(stream)
    assert gone == [stream]


def test_a_stream_with_a_reader_is_never_removed() -> None:
    hub = new_hub()
    stream = opened(hub)
    reading(hub, stream)
    with pytest.raises(AssertionError):
        hub.remove(stream)


def test_a_seal_is_reported_and_ends_the_grace() -> None:
    hub = new_hub()
    sealed: list[Stream] = []
    hub.on_sealed = sealed.append
    stream = opened(hub)
    hub.orphan(stream, 5.0, CloseReason.READER_GONE, 0.0)
    stream.seal(CloseReason.COMPLETE, 1.0, clean=True)
    assert (sealed, hub.detached) == ([stream], 0)


def test_a_keys_account_pays_for_the_tokens() -> None:
    hub = new_hub()
    stream = opened(hub)
    account = Account()
    agree(stream, account=account)
    account.streams_now = 1
    feed(stream, 10)
    hub.sweep(hub, 1.0)
    assert account.tokens_total == 10
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":12}}\n\n'
    stream.append(usage, 1.0)
    stream.seal(CloseReason.COMPLETE, 1.0, clean=True)
    assert (account.tokens_total, account.streams_now) == (12, 0)


def usage_event(tokens: int) -> bytes:
    return b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":%d}}\n\n' % tokens


@pytest.mark.parametrize(
    ("steps", "charged"),
    [
        ([10, "usage 4"], 4),  # the last word of the upstream decides, down
        ([10, "usage 40"], 40),  # and up
        ([10, "usage 0"], 0),
        (["usage 1", 300], 300),  # Anthropic's first word, and a reader that leaves before the last
        (["usage 500", 300], 500),
        (["usage 1", 300, "usage 120"], 120),
        (["usage 1"], 1),
        ([10, "usage 4", 1], 11),
        ([7], 7),
        ([5, "usage 5", 5, "usage 10"], 10),  # a server that states the usage beside each text
        ([], 0),
    ],
)
@pytest.mark.parametrize("is_swept", [True, False])
def test_a_stream_costs_its_last_usage_or_what_was_seen_of_it(
    steps: list[int | str], charged: int, is_swept: bool
) -> None:
    hub = new_hub()
    stream, account = opened(hub), Account()
    agree(stream, account=account)
    account.streams_now = 1
    for step in steps:
        if isinstance(step, int):
            feed(stream, step)
        else:
            stream.append(usage_event(int(step.split()[1])), 1.0)
        if is_swept:
            hub.sweep(hub, 1.0)
    stream.cancel(CloseReason.READER_GONE, 1.0, message="left")
    assert account.tokens_total == charged


@pytest.mark.parametrize("tokens", [0, 1, 999_999_999])
def test_a_publishers_usage_counts_for_nothing(tokens: int) -> None:
    hub = new_hub()
    stream, account = opened(hub), Account()
    account.streams_now, account.tokens_total = 1, 3000
    agree(stream, account=account, published=True)
    feed(stream, 10)
    stream.append(usage_event(tokens), 1.0)
    stream.seal(CloseReason.SEALED, 1.0, clean=True)
    assert account.tokens_total == 3010


def test_a_stored_answer_that_is_read_again_costs_no_tokens() -> None:
    hub = new_hub()
    stream, account = opened(hub), Account()
    account.streams_now = 1
    agree(stream, account=account, pays_tokens=False)
    feed(stream, 10)
    stream.append(usage_event(50), 1.0)
    stream.seal(CloseReason.COMPLETE, 1.0, clean=True)
    assert (account.tokens_total, account.streams_now) == (0, 0)


# -- memory


def total(hub: Hub) -> int:
    return sum(stream.log.bytes_held + RECORD_BYTES * (stream.reason is not None) for stream in hub)


def test_the_sum_follows_the_logs() -> None:
    hub = new_hub()
    streams = [opened(hub) for _ in range(3)]
    for k, stream in enumerate(streams):
        feed(stream, 500 * k)
    hub.sweep(hub, 1.0)
    assert hub.log_bytes == total(hub)
    assert (hub.events_total, hub.text_events_total) == (1500, 1500)
    assert hub.event_bytes_total == sum(stream.frame_bytes for stream in streams)
    streams[2].seal(CloseReason.COMPLETE, 1.0, clean=True)
    hub.remove(streams[2])
    assert hub.log_bytes == total(hub)
    assert hub.events_total == 1500


def test_a_finished_stream_is_charged_for_itself_and_not_only_for_its_log() -> None:
    hub = new_hub()
    stream = opened(hub)
    assert hub.log_bytes == stream.log.bytes_held
    stream.seal(CloseReason.COMPLETE, 1.0, clean=True)
    assert hub.log_bytes == stream.log.bytes_held + RECORD_BYTES
    hub.remove(stream)
    assert hub.log_bytes == 0


def test_each_name_of_a_stream_is_charged_for_as_long_as_it_finds_the_stream() -> None:
    hub = new_hub()
    stream = hub.open_conversation(Dialect.RESPONSES, 0.0, conversation="ü" * 256, terms=Terms(owner="p"))
    assert hub.log_bytes == stream.log.bytes_held + ENTRY_BYTES + sys.getsizeof("ü" * 256)
    before = hub.log_bytes
    hub.keep_key("p", "k" * 255, body_hash(b""), stream)
    assert hub.log_bytes == before + ENTRY_BYTES + sys.getsizeof("k" * 255)
    hub.forget_key("p", "k" * 255)
    assert hub.log_bytes == before
    hub.forget_conversation("p", "ü" * 256)
    assert hub.log_bytes == stream.log.bytes_held
    stream.append(created("r" * 200), 1.0)
    hub.charge(stream)
    assert hub.log_bytes == stream.log.bytes_held + ENTRY_BYTES + sys.getsizeof("r" * 200)


def test_a_removed_stream_takes_the_charge_of_all_its_names_with_it() -> None:
    hub = new_hub()
    stream = hub.open_conversation(Dialect.RESPONSES, 0.0, conversation="c", terms=Terms(owner="p"))
    hub.keep_key("p", "k", body_hash(b""), stream)
    stream.append(created("r"), 1.0)
    stream.seal(CloseReason.COMPLETE, 1.0, clean=True)
    hub.remove(stream)
    assert hub.log_bytes == stream.ledger.charged_bytes == 0


def test_over_the_budget_the_oldest_finished_streams_go_first() -> None:
    hub = new_hub()
    streams = [opened(hub, retention_s=1000.0) for _ in range(4)]
    for k, stream in enumerate(streams):
        feed(stream, 2000)
        if k:
            stream.seal(CloseReason.COMPLETE, 10.0 - k, clean=True)
    hub.sweep(hub, 11.0)
    hub.log_bytes_max = hub.log_bytes - streams[3].ledger.charged_bytes - 1
    hub.sweep(hub, 12.0)
    assert [hub.get(stream.id) is not None for stream in streams] == [True, True, False, False]
    assert streams[0].log.seq_first == 1


def test_over_the_budget_without_finished_streams_the_longest_log_is_halved() -> None:
    hub = new_hub()
    short, long = opened(hub), opened(hub)
    feed(short, 100)
    for _ in range(200):
        long.append(event("x" * 400), 1.0)
    hub.sweep(hub, 1.0)
    before = long.log.bytes_held
    hub.log_bytes_max = hub.log_bytes - 1
    hub.sweep(hub, 2.0)
    assert short.log.seq_first == 1
    assert long.log.seq_first > 50
    assert long.log.bytes_held <= before // 2
    assert hub.log_bytes == total(hub) <= hub.log_bytes_max


def test_a_read_stream_is_halved_and_not_removed() -> None:
    hub = new_hub()
    stream = opened(hub)
    agree(stream, catchup_bytes_max=800)
    feed(stream, 2000)
    loop = Loop()
    reader = Reader(stream, loop, capacity=0)
    stream.seal(CloseReason.COMPLETE, 1.0, clean=True)
    hub.log_bytes_max = 2000
    hub.sweep(hub, 2.0)
    assert hub.get(stream.id) is stream
    written = reader.subscriber.position - 1
    reader.take()
    loop.rest()
    assert reader.gaps == [(written + 1, stream.log.seq_first - 1)]
    assert reader.ended is True


def test_a_removed_stream_leaves_the_reused_key_of_another_stream() -> None:
    hub = new_hub()
    first, second = opened(hub), opened(hub)
    hub.keep_key("a", "k", body_hash(b"1"), first)
    hub.forget_key("a", "k")
    hub.keep_key("a", "k", body_hash(b"2"), second)
    hub.remove(first)
    kept = hub.by_key("a", "k")
    assert kept is not None and kept.stream is second


def test_a_removed_stream_with_passes_is_freed_without_the_collector() -> None:
    hub, loop = new_hub(), Loop()
    gc.collect()
    gc.disable()
    try:
        stream = opened(hub)
        stream.use_fanout(loop.fanout(stream, 0.1))
        stream.cancel(CloseReason.CANCELLED, 1.0, message="stopped")
        while loop.timers or loop.turns:
            loop.ring()
            loop.rest()
        hub.remove(stream)
        del stream
        assert not [each for each in gc.get_objects() if isinstance(each, (Stream, SlicedFanout))]
    finally:
        gc.enable()


# -- bounds for all: the principal that holds most gives way


def of(hub: Hub, owner: str, **terms: object) -> Stream:
    """A stream of that principal."""
    stream = hub.open(Dialect.CHAT, 0.0, terms=Terms(owner=owner, retention_s=60.0, **terms))  # type: ignore[arg-type]
    stream.source = Source()
    return stream


def detached(hub: Hub, owner: str) -> Stream:
    stream = of(hub, owner)
    hub.orphan(stream, 60.0, CloseReason.READER_GONE, 1.0)
    return stream


def test_over_detached_max_the_oldest_grace_of_the_largest_holder_ends() -> None:
    hub = new_hub(detached_max=4)
    greedy = [detached(hub, "greedy") for _ in range(5)]
    assert greedy[4].reason is CloseReason.READER_GONE, "the principal with the most is refused itself"
    others = [detached(hub, "alice"), detached(hub, "bob")]
    assert [stream.reason for stream in others] == [None, None]
    assert [stream.reason for stream in greedy[:4]] == [CloseReason.ABANDONED] * 2 + [None] * 2
    assert hub.detached == 4
    assert detached(hub, "alice").reason is CloseReason.READER_GONE, "two of four are greedy's: alice has her share"


def test_a_grace_that_ended_for_another_stops_its_source() -> None:
    hub = new_hub(detached_max=2)
    first = of(hub, "greedy")
    source = first.source
    assert isinstance(source, Source)
    hub.orphan(first, 60.0, CloseReason.READER_GONE, 1.0)
    detached(hub, "greedy")
    detached(hub, "alice")
    assert source.cancelled == [CloseReason.ABANDONED] and first.source is None


def test_a_place_is_made_by_streams_without_a_reader_alone() -> None:
    hub = new_hub()
    read = of(hub, "greedy", published=True)
    reading(hub, read)
    asked = of(hub, "greedy")  # its client waits for the first byte
    idle = of(hub, "greedy", published=True)
    resting = detached(hub, "greedy")
    copy = of(hub, "greedy", published=True, is_copy=True)  # its place is given back by the follow, later
    assert hub.make_place("alice", 2.0, relayed=True) and resting.reason is CloseReason.ABANDONED
    assert hub.make_place("alice", 2.0, relayed=False) and idle.reason is CloseReason.ABANDONED
    assert not hub.make_place("alice", 2.0, relayed=False)
    assert (read.reason, asked.reason, copy.reason) == (None, None, None)


def test_no_place_is_made_for_the_principal_that_holds_most_or_as_many() -> None:
    hub = new_hub()
    streams = [of(hub, owner, published=True) for owner in ("greedy", "greedy", "alice")]
    assert not hub.make_place("greedy", 2.0, relayed=False)
    assert not hub.make_place("alice", 2.0, relayed=False)
    streams.append(of(hub, "greedy", published=True))
    assert hub.make_place("alice", 2.0, relayed=False)
    assert [stream.reason for stream in streams] == [CloseReason.ABANDONED, None, None, None]


def test_a_place_at_an_upstream_is_made_by_a_generation_there() -> None:
    hub = new_hub()
    streams = [detached(hub, "greedy") for _ in range(3)]
    streams[1].upstream = "gpu2"
    assert hub.make_place("alice", 2.0, relayed=True, upstreams=("gpu2",))
    assert [stream.reason is None for stream in streams] == [True, False, True]
    assert not hub.make_place("alice", 2.0, relayed=True, upstreams=("gpu2",))


def test_over_the_logs_budget_the_finished_logs_of_the_largest_holder_go_first() -> None:
    hub = new_hub()
    owners = ["alice", "greedy", "greedy", "greedy", "bob"]
    streams = [of(hub, owner) for owner in owners]
    for k, stream in enumerate(streams):
        feed(stream, 2000)
        stream.seal(CloseReason.COMPLETE, 1.0 + k, clean=True)
    hub.sweep(hub, 11.0)
    hub.log_bytes_max = hub.log_bytes * 3 // 5
    hub.sweep(hub, 12.0)
    assert [hub.get(stream.id) is not None for stream in streams] == [True, False, False, True, True]


def test_over_the_logs_budget_the_live_logs_of_the_largest_holder_are_halved() -> None:
    hub = new_hub()
    lone = of(hub, "alice")
    many = [of(hub, "greedy") for _ in range(4)]
    feed(lone, 4000)
    for stream in many:
        feed(stream, 3000)
    hub.sweep(hub, 11.0)
    hub.log_bytes_max = hub.log_bytes - 1
    hub.sweep(hub, 12.0)
    assert lone.log.seq_first == 1 and many[0].log.seq_first > 1


def test_the_number_of_finished_streams_is_bounded_and_with_it_that_of_their_names() -> None:
    hub = new_hub()
    hub.kept_max = 16
    streams = []
    for k in range(40):
        stream = of(hub, "alice" if k % 10 == 0 else "greedy")
        hub.keep_key(stream.terms.owner, f"key-{k}", b"", stream)
        stream.seal(CloseReason.COMPLETE, 1.0 + k, clean=True)
        streams.append(stream)
    live = of(hub, "greedy")
    hub.free_kept()
    left = [stream for stream in streams if hub.get(stream.id) is not None]
    assert len(left) == 16 - 2
    assert [stream for stream in streams[::10] if stream in left] == streams[::10], "alice's stay"
    greedy = [stream for stream in streams if stream.terms.owner == "greedy"]
    assert [stream for stream in left if stream in greedy] == greedy[-10:], "the oldest of greedy's go"
    assert hub.get(live.id) is live
    assert sum(hub.by_key(stream.terms.owner, f"key-{k}") is not None for k, stream in enumerate(streams)) == len(left)
