"""Hub, streams, readers and publishers in any order of events: the invariants hold after each event."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

from fakes import PLENTY, event
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sinks import Loop, Reader, Source, agree, new_hub

from streamd.core import fanout as core_fanout
from streamd.core import stream as core_stream
from streamd.core.hub import RECORD_BYTES, body_hash
from streamd.core.stream import CountedStream, Form, Policy, Stream, Subscriber, SubscriberState
from streamd.core.terms import Terms
from streamd.reasons import By, CloseReason
from streamd.wire.dialect import Dialect

STREAMS_MAX = 3
DETACHED_MAX = 2
RETENTION_S = 10.0
GRACE_S = 4.0


class Life(RuleBasedStateMachine):
    """Bounds so small that every case occurs: 2 direct readers, 2 readers a slice, 4 frames at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = [
            mock.patch.object(core_stream, "DIRECT_READERS_MAX", 2),
            mock.patch.object(core_fanout, "SLICE_MAX", 2),
            mock.patch.object(core_fanout, "FRAMES_MAX", 4),
        ]
        for patch in self.patches:
            patch.start()
        self.now = 0.0
        self.loop = Loop()
        self.hub = new_hub(
            self.loop,
            log_bytes_max=24 * 1024,
            stream_log_bytes_max=4096,
            stream_log_events_max=300,
            detached_max=DETACHED_MAX,
        )
        self.opened: list[Stream] = []
        self.joined: list[LeavingReader] = []
        self.sources: dict[str, Source] = {}
        self.bytes_said: dict[str, int] = {}

    def teardown(self) -> None:
        for patch in self.patches:
            patch.stop()

    def stream(self, number: int) -> Stream:
        """A registered stream, else a stream that was registered."""
        known = tuple(self.hub) or tuple(self.opened)
        return known[number % len(known)]

    def reader(self, number: int) -> LeavingReader:
        reading = [reader for reader in self.joined if not reader.left]
        return reading[number % len(reading)]

    @property
    def anybody_reads(self) -> bool:
        return not all(reader.left for reader in self.joined)

    # -- open

    def dress(self, stream: Stream, *, needs_reader: bool) -> None:
        detach_grace_s = GRACE_S if len(self.opened) % 2 else 0.0
        agree(
            stream,
            retention_s=RETENTION_S,
            detach_grace_s=detach_grace_s,
            resume_grace_s=GRACE_S,
            catchup_bytes_max=800,
        )
        stream.source = self.sources[stream.id] = Source(needs_reader=needs_reader)
        self.opened.append(stream)
        self.bytes_said[stream.id] = 0

    @precondition(lambda self: len(self.hub) < STREAMS_MAX)
    @rule(flush=st.booleans())
    def open_published(self, flush: bool) -> None:
        stream = self.hub.open(Dialect.CHAT, self.now)
        self.dress(stream, needs_reader=False)
        if flush:
            stream.use_fanout(self.loop.fanout(stream, 0.05))

    @precondition(lambda self: len(self.hub) < STREAMS_MAX)
    @rule(key=st.sampled_from("kl"))
    def open_generation(self, key: str) -> None:
        stream = self.hub.open(Dialect.CHAT, self.now)
        self.dress(stream, needs_reader=True)
        if self.hub.by_key("p", key) is None:
            self.hub.keep_key("p", key, body_hash(b""), stream)

    @precondition(lambda self: len(self.hub) < STREAMS_MAX)
    @rule(name=st.sampled_from("cd"))
    def open_conversation(self, name: str) -> None:
        old = self.hub.by_conversation("p", name)
        if old is not None:
            old.cancel(CloseReason.CANCELLED, self.now, message="again")
        stream = self.hub.open_conversation(Dialect.CHAT, self.now, conversation=name, terms=Terms(owner="p"))
        self.dress(stream, needs_reader=True)

    # -- publish

    def known(self, stream: Stream) -> bool:
        return self.hub.get(stream.id) is stream

    @precondition(lambda self: self.opened)
    @rule(number=st.integers(0, 3), count=st.integers(1, 60))
    def publish(self, number: int, count: int) -> None:
        stream = self.stream(number)
        for _ in range(count):
            if stream.reason is None:
                self.say(stream, [event(f"{stream.log.seq_next} ")])

    @precondition(lambda self: self.opened)
    @rule(number=st.integers(0, 3), count=st.integers(2, 9), large=st.booleans())
    def publish_read(self, number: int, count: int, large: bool) -> None:
        stream = self.stream(number)
        if stream.reason is None:
            end = "x" * 900 if large else ""
            self.say(stream, [event(f"{stream.log.seq_next + k} {end}") for k in range(count)])

    @precondition(lambda self: self.opened)
    @rule(number=st.integers(0, 3))
    def comment(self, number: int) -> None:
        stream = self.stream(number)
        if stream.reason is None:
            stream.loose(b": c\n", self.now)

    def say(self, stream: Stream, events: list[bytes]) -> None:
        before = stream.events
        frame = stream.append_if_templated(events[0], self.now) if len(events) == 1 else b""
        if frame:
            stream.hand_out(frame)
        else:
            stream.append_all(events, self.now)
        self.bytes_said[stream.id] += sum(map(len, events))
        assert stream.events == before + len(events)

    # -- join, stall, leave

    def join(self, stream: Stream, seq: int, policy: Policy, form: Form, capacity: int) -> None:
        if not self.known(stream):
            return
        self.hub.end_grace(stream)
        self.joined.append(LeavingReader(self, stream, policy=policy, form=form, capacity=capacity, seq=seq))

    @precondition(lambda self: self.opened)
    @rule(
        number=st.integers(0, 3),
        at=st.sampled_from(["start", "middle", "end"]),
        policy=st.sampled_from(list(Policy)),
        form=st.sampled_from([Form.CHUNKED, Form.CHUNKED, Form.CHUNKED, *Form]),
        capacity=st.sampled_from([500, PLENTY]),
    )
    def join_somewhere(self, number: int, at: str, policy: Policy, form: Form, capacity: int) -> None:
        stream = self.stream(number)
        log = stream.log
        seq = {"start": 1, "middle": (log.seq_first + log.seq_next) // 2, "end": log.seq_next}[at]
        if form in core_stream.RAW:
            seq = max(seq, log.seq_first)  # below it is a 400
        self.join(stream, seq, policy, form, capacity)

    @precondition(lambda self: self.anybody_reads)
    @rule(number=st.integers(0, 5))
    def stall(self, number: int) -> None:
        self.reader(number).stall()

    @precondition(lambda self: self.anybody_reads)
    @rule(number=st.integers(0, 5), count=st.sampled_from([300, 3000, PLENTY]))
    def take(self, number: int, count: int) -> None:
        self.reader(number).take(count)

    @precondition(lambda self: self.anybody_reads)
    @rule(
        number=st.integers(0, 5),
        reason=st.sampled_from([CloseReason.READER_GONE, CloseReason.NETWORK_LOST, CloseReason.STALLED]),
    )
    def leave(self, number: int, reason: CloseReason) -> None:
        reader = self.reader(number)
        reader.reason = reason
        reader.leave()

    @precondition(lambda self: self.anybody_reads)
    @rule(number=st.integers(0, 5))
    def resume(self, number: int) -> None:
        """The network cuts a reader, and it comes back at the event after its last."""
        reader = self.reader(number)
        reader.reason = CloseReason.NETWORK_LOST
        reader.leave()
        if reader.subscriber.form not in core_stream.RAW:
            self.join(reader.stream, reader.subscriber.position, reader.subscriber.policy, Form.CHUNKED, PLENTY)

    @precondition(lambda self: self.anybody_reads)
    @rule(number=st.integers(0, 5), count=st.integers(30, 120))
    def fall_behind(self, number: int, count: int) -> None:
        reader = self.reader(number)
        reader.stall()
        for _ in range(count):
            if reader.stream.reason is None:
                self.say(reader.stream, [event(f"{reader.stream.log.seq_next} ")])
            self.loop.turn()

    # -- ends: a single rule that acts only sometimes, or no stream would grow old

    @precondition(lambda self: self.opened)
    @rule(number=st.integers(0, 3), how=st.sampled_from(["not", "not", "seal", "fail", "stop"]))
    def end(self, number: int, how: str) -> None:
        stream = self.stream(number)
        if how == "stop":
            self.stop(stream)
        elif how != "not" and stream.reason is None:
            stream.source = None
            if how == "seal":
                stream.seal(CloseReason.SEALED, self.now, clean=True)
            else:
                stream.fail(CloseReason.UPSTREAM_TRUNCATED, self.now, message="gone")

    def stop(self, stream: Stream) -> None:
        """DELETE."""
        if self.known(stream):
            if stream.reason is None:
                stream.cancel(CloseReason.CANCELLED, self.now, message="stopped")
            elif not stream.readers:
                self.hub.remove(stream)

    @rule(name=st.sampled_from("cd"))
    def forget(self, name: str) -> None:
        self.hub.forget_conversation("p", name)

    # -- time

    @rule()
    def turn(self) -> None:
        self.loop.turn()

    @precondition(lambda self: self.loop.turns or self.loop.timers)
    @rule()
    def rest(self) -> None:
        self.loop.rest()
        self.loop.ring()

    @rule(seconds=st.sampled_from([0.25, 3.0, 11.0]))
    def sweep(self, seconds: float) -> None:
        self.now += seconds
        self.hub.sweep(self.hub, self.now)
        held = [stream.log.bytes_held + stream.ledger.names_bytes for stream in self.hub]
        finished = sum(stream.reason is not None for stream in self.hub)
        assert self.hub.log_bytes == sum(held) + RECORD_BYTES * finished
        assert self.hub.log_bytes <= self.hub.log_bytes_max + 4096
        for stream in self.hub:
            assert not (stream.grace_until and stream.grace_until <= self.now)
            assert stream.readers or stream.reason is None or stream.sealed_at + RETENTION_S > self.now

    # -- invariants after each step

    @invariant()
    def accounts_are_sums(self) -> None:
        hub = self.hub
        assert hub.log_bytes == sum(stream.ledger.charged_bytes for stream in hub)
        assert hub.detached == sum(bool(stream.grace_until) for stream in hub)
        assert 0 <= hub.detached <= DETACHED_MAX
        assert all(not stream.ledger.charged_bytes for stream in self.opened if not self.known(stream))

    @invariant()
    def seqs_have_no_hole(self) -> None:
        for stream in self.opened:
            log = stream.log
            assert 1 <= log.seq_first <= log.seq_next
            held = [seq for seq, _ in log.read(log.seek(log.seq_first), bytes_max=1 << 30)]
            assert held == list(range(log.seq_first, log.seq_next))
            if isinstance(stream, CountedStream) and stream.reason is None:
                assert stream.event_bytes == self.bytes_said[stream.id]

    @invariant()
    def readers_are_where_they_belong(self) -> None:
        for stream in self.opened:
            subscribers = {
                id(reader.subscriber) for reader in self.joined if reader.stream is stream and not reader.left
            }
            assert {id(subscriber) for subscriber in stream.readers} == subscribers
            assert [subscriber.index for subscriber in stream.readers] == list(range(len(stream.readers)))
            if not self.known(stream):
                assert not stream.readers
                assert stream.reason is not None

    @invariant()
    def names_point_to_what_is_registered(self) -> None:
        hub = self.hub
        named = [kept.stream for kept in hub._by_key.values()]
        named += [stream for streams in hub._by_conversation.values() for stream in streams.values()]
        for stream in named:
            assert stream is not None
            assert self.known(stream)
        conversations = hub._by_conversation.get("p", {})
        assert hub._conversation_of == {stream.id: name for name, stream in conversations.items()}

    @invariant()
    def a_generation_without_readers_is_detached_or_over(self) -> None:
        for stream in self.opened:
            had_some = any(reader.stream is stream for reader in self.joined)
            if stream.reason is None and not stream.readers and had_some and self.sources[stream.id].needs_reader:
                assert stream.grace_until
            if stream.readers or not self.sources[stream.id].needs_reader:
                assert not stream.grace_until

    @invariant()
    def sources_are_cancelled_once(self) -> None:
        for stream in self.opened:
            cancelled = self.sources[stream.id].cancelled
            assert len(cancelled) <= 1
            assert stream.source is None if stream.reason is not None else not cancelled
            if stream.reason is not None and stream.reason.by in (By.READER, By.NETWORK):
                assert cancelled

    @invariant()
    def positions_follow_the_rules(self) -> None:
        for reader in self.joined:
            subscriber, log = reader.subscriber, reader.stream.log
            assert subscriber.seq_start <= subscriber.position <= log.seq_next
            ring = subscriber.ring
            assert 0 <= ring.held <= ring.slots
            assert ring.bytes_held <= ring.bytes_max or ring.held == 1
            if subscriber.state is not SubscriberState.PAUSED:
                assert ring.held == 0
            elif reader.stream.direct:
                assert subscriber.position + ring.held == log.seq_next
            if subscriber._gap_from:
                assert subscriber._gap_from < subscriber.position
            assert not (subscriber.state is SubscriberState.LIVE and reader.paused)
            assert subscriber.bytes_delivered == sum(map(len, reader.frames))

    # -- the events of each reader

    @invariant()
    def every_token_is_there_or_announced(self) -> None:
        for reader in self.joined:
            subscriber = reader.subscriber
            if subscriber.form in core_stream.RAW or reader.checked == len(reader.frames):
                continue
            reader.checked = len(reader.frames)
            covered = list(covered_by(reader))
            last = covered[-1] if covered else subscriber.seq_start - 1
            assert covered == list(range(subscriber.seq_start, last + 1))
            assert last < reader.stream.log.seq_next
            if subscriber.state is not SubscriberState.ENDED:
                assert subscriber.position == last + 1 or subscriber._gap_from == last + 1


def covered_by(reader: Reader) -> Iterator[int]:
    """The seqs that a reader has, or knows of as lost, in the order of its events. Readers of data lines see no ids."""
    has_ids = reader.subscriber.form not in core_stream.EVENTS_ONLY
    last = reader.subscriber.seq_start - 1
    for each in reader.events:
        assert (each.id is not None) is has_ids and (has_ids or each.name is None)
        if "gap" in each.json:
            words = [*range(each.json["gap"]["from"], each.json["gap"]["to"] + 1)]
        elif each.data.startswith(b'{"error"'):
            words = [last + 1]
        else:
            text = each.json["choices"][0]["delta"]["content"]
            words = [int(word) for word in text.replace("x", "").split()]
        last = words[-1]
        assert not has_ids or each.seq == last
        yield from words


class LeavingReader(Reader):
    """A reader that leaves by way of the hub, for a reason, as connections do."""

    def __init__(self, life: Life, stream: Stream, **given: Any) -> None:
        self.life = life
        self.reason = CloseReason.COMPLETE
        self.checked = 0  # number of writes that were checked
        super().__init__(stream, life.loop, leave=self.leave_hub, **given)

    def leave_hub(self, subscriber: Subscriber) -> None:
        reason = CloseReason.SLOW_CONSUMER if self.cut else self.reason
        self.life.hub.leave(subscriber, reason, self.life.now)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=80)
