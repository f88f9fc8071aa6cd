"""Streams that go on in another process: the same log, ids, accounts and ends, and readers lose and double nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from fakes import event
from hypothesis import given
from hypothesis import strategies as st
from sinks import agree

from streamd.core.hub import Hub, body_hash
from streamd.core.limits import Account
from streamd.core.ring import Ring
from streamd.core.stream import CountedStream, Form, ReaderPlace, Stream, Subscriber, SubscriberState
from streamd.core.terms import Terms
from streamd.handover.record import pack, unpack
from streamd.handover.streams import READER, STREAM, StreamState, land_stream, stream_state
from streamd.handover.values import RecordError
from streamd.policy import Policy
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect

NOW = 5000.0
PLENTY = 1 << 24


def new_hub() -> Hub:
    return Hub(
        log_bytes_max=PLENTY,
        stream_log_bytes_max=PLENTY,
        stream_log_events_max=100_000,
        detached_max=10,
        incarnation="AAAA",
    )


def read_all(stream: Stream) -> list[tuple[int, bytes]]:
    cursor, out = stream.log.seek(stream.log.seq_first), []
    while more := stream.log.read(cursor, bytes_max=PLENTY):
        out += more
    return out


def moved(hub: Hub, stream: Stream, account: Account | None = None) -> tuple[Hub, Stream]:
    """The stream in another process, and its hub."""
    there = new_hub()
    return there, land_stream(there, unpack(STREAM, pack(STREAM, stream_state(hub, stream))), account)


class Sink:
    """Takes all that a reader writes, until it is full."""

    def __init__(self, room: int = PLENTY) -> None:
        self.raw = b""
        self.room = room
        self.reader: Subscriber
        self.ended: bool | None = None

    def write(self, frame: bytes) -> None:
        self.raw += frame
        if len(self.raw) > self.room:
            self.reader.pause()

    def soon(self, turn: Any) -> None:
        turn()

    def share_packets(self) -> None:
        pass

    def stream_ended(self, clean: bool) -> None:
        self.ended = clean

    def events(self) -> list[bytes]:
        """The events without their chunks, in order."""
        raw, out = self.raw, []
        while raw:
            size, _, raw = raw.partition(b"\r\n")
            out.append(raw[: int(size, 16)])
            raw = raw[int(size, 16) + 2 :]
        return b"".join(out).split(b"\n\n")[:-1]


def reading(
    stream: Stream, sink: Sink, place: ReaderPlace | None = None, policy: Policy = Policy.COALESCE
) -> Subscriber:
    policy, form = (place.policy, place.form) if place is not None else (policy, Form.CHUNKED)
    reader = sink.reader = Subscriber(stream, sink, policy=policy, ring=Ring(32, 4096), form=form)
    stream.add_reader(reader)
    if place is None:
        reader.start(1)
    else:
        reader.go_on_from(place, writable=True)
    return reader


TEXTS = ["Hel", "lo", "", "\n", '"', "ä", " you"]


@given(st.lists(st.sampled_from(TEXTS), max_size=30), st.integers(0, 30))
def test_a_stream_goes_on_between_any_two_events(texts: list[str], at: int) -> None:
    here, whole = new_hub(), new_hub()
    one, two = (hub.open(Dialect.CHAT, NOW, name="topic", epoch="abcdef") for hub in (here, whole))
    for text in texts[:at]:
        one.append(event(text), NOW + 1)
        two.append(event(text), NOW + 1)
    there, then = moved(here, one)
    assert there.get("topic") is then
    for text in texts[at:]:
        then.append(event(text), NOW + 2)
        two.append(event(text), NOW + 2)
    assert read_all(then) == read_all(two)
    assert (then.frame_bytes, then.text_events, then.text_bytes, then.events) == (
        two.frame_bytes,
        two.text_events,
        two.text_bytes,
        two.events,
    )
    assert then.event_id(9) == two.event_id(9) and then.progress.state() == two.progress.state()
    for hub, stream in ((there, then), (here, one), (whole, two)):
        hub.charge(stream)
    for total in ("events_total", "event_bytes_total", "text_events_total"):
        assert getattr(here, total) + getattr(there, total) == getattr(whole, total), total


def test_terms_names_grace_and_the_end_move_with_the_stream() -> None:
    hub, account = new_hub(), Account()
    account.streams_now = 1
    terms = Terms(owner="k", account=account, detach_grace_s=7.0, retention_s=60.0, policy=Policy.CLOSE, model="m")
    stream = hub.open(Dialect.MESSAGES, NOW, terms=terms)
    hub.keep_key("k", "once", body_hash(b"x"), stream)
    hub.orphan(stream, 7.0, CloseReason.READER_GONE, NOW)
    there, then = moved(hub, stream, account)
    kept = there.by_key("k", "once")
    assert then.terms == terms and kept is not None and kept.stream is then and kept.body_hash == body_hash(b"x")
    assert there.detached == 1 and then.grace_until == NOW + 7
    there.sweep([then], NOW + 8)
    assert then.reason is CloseReason.ABANDONED and there.detached == account.streams_now == 0
    _, after = moved(there, then, account)
    assert (after.reason, after.sealed_at, after.ended_clean) == (then.reason, then.sealed_at, False)


def test_a_key_pays_once_for_each_event() -> None:
    hub, account = new_hub(), Account()
    stream = hub.open(Dialect.CHAT, NOW, terms=Terms(owner="k", account=account))
    for text in TEXTS:
        stream.append(event(text), NOW)
    there, then = moved(hub, stream, account)
    paid = account.tokens_total
    assert paid == stream.text_events
    then.append(event("more"), NOW)
    there.charge(then)
    assert account.tokens_total == paid + 1


def test_a_stream_that_counts_bytes_goes_on_counting() -> None:
    hub, whole = new_hub(), new_hub()
    one, two = (
        each.open_conversation(Dialect.CHAT, NOW, conversation="c", terms=Terms(owner="k")) for each in (hub, whole)
    )
    for number in range(2100):
        one.append(event(f"t{number}"), NOW)
        two.append(event(f"t{number}"), NOW)
    there, then = moved(hub, one)
    assert isinstance(then, CountedStream) and there.by_conversation("k", "c") is then
    for stream in (then, two):
        stream.append(event("last"), NOW)
    for offset in (0, 1, 50_000, two.event_bytes - 3, two.event_bytes):
        assert then.place(offset) == two.place(offset)


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("room", [PLENTY, 3000, 100])
def test_a_reader_loses_and_doubles_nothing(policy: Policy, room: int) -> None:
    hub = new_hub()
    stream = hub.open(Dialect.CHAT, NOW)
    agree(stream, policy=policy)
    first = Sink(room)
    reader = reading(stream, first, policy=policy)
    texts = [f"text {number} " for number in range(20)]
    for text in texts[:12]:
        stream.append(event(text), NOW)
    place = unpack(READER, pack(READER, reader.place()))
    assert place == reader.place()
    _, then = moved(hub, stream)
    second = Sink()
    after = reading(then, second, place)
    assert (after.seq_start, after.policy, after.state) == (1, policy, SubscriberState.LIVE)
    for text in texts[12:]:
        then.append(event(text), NOW)
    then.seal(CloseReason.COMPLETE, NOW, clean=True)
    said = b"".join(first.events() + second.events())
    assert [said.count(text.encode()) for text in texts] == [1] * 20
    assert after.bytes_delivered == len(first.raw) + len(second.raw) and second.ended is True


def test_a_gap_that_was_not_announced_is_announced_after_the_move() -> None:
    hub = new_hub()
    stream = hub.open(Dialect.CHAT, NOW)
    sink = Sink(10)
    reader = reading(stream, sink, policy=Policy.DROP_OLDEST)
    for number in range(60):
        stream.append(event(f"text {number}"), NOW)
    place = reader.place()
    assert place.dropped > 0 and place.gap_from > 0
    _, then = moved(hub, stream)
    second = Sink()
    after = reading(then, second, place)
    assert b'"gap":{"from":%d,"to":%d}' % (place.gap_from, place.position - 1) in second.events()[0]
    assert after.events_delivered == reader.events_delivered + (61 - place.position)


@pytest.mark.parametrize(
    "wrong",
    [
        {"position": 9},
        {"position": 0, "seq_start": 0},
        {"seq_start": 3},
        {"dropped": 2},
        {"dropped": -1},
        {"gap_from": 2},
        {"bytes_written": -1},
    ],
)
def test_a_place_that_the_stream_does_not_have_is_refused(wrong: dict[str, Any]) -> None:
    stream = new_hub().open(Dialect.CHAT, NOW)
    for text in TEXTS:
        stream.append(event(text), NOW)
    place = ReaderPlace(Policy.COALESCE, Form.CHUNKED, 2, 1, 0, 0, 0)
    reading(stream, Sink(), place)
    with pytest.raises(ValueError, match="place"):
        reading(stream, Sink(), place._replace(**wrong))


def _state(**wrong: Any) -> StreamState:
    hub = new_hub()
    stream = hub.open(Dialect.CHAT, NOW)
    for text in TEXTS:
        stream.append(event(text), NOW)
    return dataclasses.replace(stream_state(hub, stream), **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epoch": "abcdef"},
        {"epoch": "abc"},
        {"retention_s": -1.0},
        {"write_interval_s": 99.0},
        {"ended_clean": True},
        {"grace_until": 7.0, "reason": CloseReason.COMPLETE},
        {"marks": ((2, 0),)},
        {"marks": ((1, 0), (3, 5), (2, 9)), "event_bytes": 10},
        {"marks": ((1, 0), (99, 5)), "event_bytes": 10},
        {"event_bytes": 5},
        {"log": _state().log._replace(seq_next=3)},
        {"log": _state().log._replace(segments=(b"junk",))},
        {"log": _state().log._replace(templates=((), b"", True))},
        {"progress": _state().progress._replace(finished=8)},
    ],
)
def test_a_stream_that_can_not_be_is_refused_and_nothing_is_registered(wrong: dict[str, Any]) -> None:
    there = new_hub()
    with pytest.raises((ValueError, TypeError)):
        land_stream(there, _state(**wrong))
    assert len(there) == 0 and there.log_bytes == 0 and there.detached == 0


def test_an_id_that_is_here_already_and_a_copy_are_refused() -> None:
    hub = new_hub()
    stream = hub.open(Dialect.CHAT, NOW)
    with pytest.raises(RecordError, match="here already"):
        land_stream(hub, stream_state(hub, stream))
    agree(stream, is_copy=True)
    with pytest.raises(RecordError, match="another node"):
        stream_state(hub, stream)
