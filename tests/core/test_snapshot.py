"""Streams as bytes and back: readers get the same, and no bytes whatsoever do harm."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sinks import agree
from test_replay import chat, choice, coalesce_all, filled, read_all, runs, wire

from streamd.core import snapshot as snapshot_module
from streamd.core.hub import ENTRY_BYTES, RECORD_BYTES, Hub, body_hash
from streamd.core.makers import ID_CHARS_MAX, Made, Makers
from streamd.core.replay import ReplayLog, check_parts
from streamd.core.snapshot import (
    MADE_PER_RECORD,
    MadeObjects,
    Snapshot,
    StateError,
    choose,
    load,
    read_header,
    restore,
    save,
    take_snapshot,
)
from streamd.core.stream import CountedStream, Stream
from streamd.core.terms import Terms
from streamd.core.write_interval import WriteInterval
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect, sequence_number_of
from streamd.wire.dialects.members import TOKENS_MAX

SAVE_ID = b"save-one"
NOW, UNIX = 5000.0, 1_700_000_000.0
LATER, LATER_UNIX = 40.0, UNIX + 20  # the next process: its clock began anew, the wall clock went on by 20 s
PLENTY = 1 << 30


def new_hub(incarnation: str = "AAAA", **limits: int) -> Hub:
    bounds = {"log_bytes_max": PLENTY, "stream_log_bytes_max": 1 << 20, "stream_log_events_max": 100_000}
    return Hub(**(bounds | limits), detached_max=10, incarnation=incarnation)  # type: ignore[arg-type]


def opened(hub: Hub, events: Iterable[bytes], dialect: Dialect = Dialect.CHAT, **options: Any) -> Stream:
    stream = hub.open(dialect, NOW - 10, **options)
    agree(stream, retention_s=60.0)
    for event in events:
        stream.append(event, NOW - 5)
    return stream


def saved(*streams: Snapshot) -> bytes:
    return b"".join(save(streams, SAVE_ID, UNIX))


def loaded(raw: bytes) -> list[Snapshot]:
    source = io.BytesIO(raw)
    header = read_header(source.read)
    assert header.save_id == SAVE_ID
    return list(load(source.read))


def again(hub: Hub, stream: Stream) -> tuple[Hub, Stream]:
    """The stream after a restart, and its hub."""
    (snapshot,) = loaded(saved(take_snapshot(hub, stream, NOW, UNIX)))
    there = new_hub("BBBB")
    back = restore(there, snapshot, LATER, LATER_UNIX)
    assert back is not None
    return there, back


HELLO = [wire(chat(choices=[choice(text)])) for text in ("Hel", "lo", ",", " you")]
DONE = b"data: [DONE]\n\n"


# Logs


@given(runs(), st.integers(1, 3000))
def test_a_log_made_of_its_parts_reads_the_same(events: list[bytes], bytes_max: int) -> None:
    log = filled(events, bytes_max=bytes_max)
    back = ReplayLog.of_parts(log.parts(), bytes_max=bytes_max, events_max=1 << 20)
    assert (back.seq_first, back.seq_next) == (log.seq_first, log.seq_next)
    assert (back.text_events, back.text_bytes) == (log.text_events, log.text_bytes)
    assert read_all(back, back.seek(back.seq_first)) == read_all(log, log.seek(log.seq_first))
    assert coalesce_all(back, back.seek(back.seq_first)) == coalesce_all(log, log.seek(log.seq_first))
    log._drop_aims()  # a part of the state of writing, which begins anew
    assert abs(back.bytes_held - log.bytes_held) <= replay_list_bytes()


def replay_list_bytes() -> int:
    """A log that has dropped all but its tail keeps an empty list; a log made of its parts has no list."""
    return 56


@given(runs(), runs(), st.data())
def test_a_log_made_of_its_parts_goes_on(before: list[bytes], after: list[bytes], data: st.DataObject) -> None:
    log = filled(before)
    back = ReplayLog.of_parts(log.parts(), bytes_max=1 << 20, events_max=1 << 20)
    cursor = back.cursor_at_end()
    for event in after:
        back.append(event)
    assert [event for _, event in read_all(back, back.seek(1))] == before + after
    assert [event for _, event in read_all(back, cursor)] == after
    seq = data.draw(st.integers(1, back.seq_next))
    assert [event for _, event in read_all(back, back.seek(seq))] == (before + after)[seq - 1 :]


def test_a_log_is_trimmed_to_smaller_caps() -> None:
    log = filled([wire(chat(choices=[choice(f"token {k}")])) for k in range(2000)])
    back = ReplayLog.of_parts(log.parts(), bytes_max=4096, events_max=1 << 20)
    assert back.bytes_held <= 4096
    assert 1 < back.seq_first < back.seq_next == 2001
    few = ReplayLog.of_parts(log.parts(), bytes_max=1 << 20, events_max=500)
    assert few.seq_next - few.seq_first <= 500


# Facts


def test_a_cut_generation_comes_back_with_its_error_as_the_last_event() -> None:
    hub = new_hub()
    stream = opened(hub, HELLO)
    stream.upstream = "gpu-1"
    agree(stream, owner="key:one", model="m")
    stream.cancel(CloseReason.RESTARTED, NOW, message="cut")
    there, back = again(hub, stream)
    assert there.get(stream.id) is back
    assert (back.terms.owner, back.terms.model, back.upstream, back.dialect) == ("key:one", "m", "gpu-1", Dialect.CHAT)
    assert (back.reason, back.ended_clean) == (CloseReason.RESTARTED, False)
    events = read_all(back.log, back.log.seek(1))
    assert [event for _, event in events[:-1]] == HELLO
    assert orjson.loads(events[-1][1][5:])["error"]["code"] == "restarted"
    assert back.id_prefix == stream.id_prefix


def test_the_usage_the_counts_and_the_chunk_head_come_back() -> None:
    hub = new_hub()
    usage = {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}
    stream = opened(hub, [*HELLO, wire(chat(choices=[], usage=usage)), DONE])
    stream.seal(CloseReason.COMPLETE, NOW, clean=True)
    there, back = again(hub, stream)
    assert back.progress.usage == (7, 4)
    assert back.progress.terminal and back.ended_clean
    assert back.progress.chunk_head == stream.progress.chunk_head != b""
    assert (back.text_events, back.text_bytes) == (stream.text_events, stream.text_bytes)
    there.charge(back)
    assert (there.events_total, there.text_events_total, there.event_bytes_total) == (0, 0, 0)
    assert there.log_bytes == back.log.bytes_held + RECORD_BYTES


def test_a_restored_stream_is_found_by_its_response_id_and_idempotency_key() -> None:
    hub = new_hub()
    stream = opened(hub, [wire({"type": "response.created", "response": {"id": "resp_1"}})], Dialect.RESPONSES)
    agree(stream, owner="key:one")
    hub.stream_named(stream)
    hub.keep_key("key:one", "again", body_hash(b"{}"), stream)
    stream.cancel(CloseReason.RESTARTED, NOW, message="cut")
    there, back = again(hub, stream)
    assert there.by_response_id("key:one", "resp_1") is back
    found = there.by_key("key:one", "again")
    assert found is not None and found.stream is back and found.body_hash == body_hash(b"{}")
    names = 2 * ENTRY_BYTES + sys.getsizeof("resp_1") + sys.getsizeof("again")
    assert there.log_bytes == back.log.bytes_held + RECORD_BYTES + names
    there.remove(back)
    assert there.log_bytes == 0
    assert there.by_key("key:one", "again") is None
    assert there.by_response_id("key:one", "resp_1") is None


def test_a_conversation_goes_on_counting_bytes() -> None:
    hub = new_hub()
    stream = hub.open_conversation(Dialect.CHAT, NOW, conversation="c 1/é", terms=Terms(owner="key:one"))
    agree(stream, retention_s=60.0)
    for event in HELLO:
        stream.append(event, NOW)
    stream.cancel(CloseReason.RESTARTED, NOW, message="cut")
    there, back = again(hub, stream)
    assert there.by_conversation("key:one", "c 1/é") is back
    assert isinstance(back, CountedStream) and back.event_bytes == stream.event_bytes
    for offset in (0, 10, len(HELLO[0]), stream.event_bytes - 3, stream.event_bytes):
        assert back.place(offset) == stream.place(offset)


def test_a_published_stream_comes_back_live_and_goes_on() -> None:
    hub = new_hub()
    stream = opened(hub, [wire({"delta": "a"})], Dialect.UNKNOWN, name="news", epoch="abc_-1")
    agree(stream, published=True, name_public=True, write_interval=WriteInterval(0.05, adaptive=True))
    (snapshot,) = loaded(saved(take_snapshot(hub, stream, NOW, UNIX)))
    assert snapshot.live
    there = new_hub("BBBB")
    back = restore(there, snapshot, LATER, LATER_UNIX)
    assert back is not None and back.reason is None and back.source is None
    assert back.terms.published and back.terms.name_public
    assert back.terms.write_interval == WriteInterval(0.05, adaptive=True)
    assert back.event_id(1) == "news:abc_-1:1"
    back.append(wire({"delta": "b"}), LATER)
    assert [event for _, event in read_all(back.log, back.log.seek(1))] == [wire({"delta": text}) for text in "ab"]


def test_responses_go_on_with_their_own_numbers() -> None:
    hub = new_hub()
    stream = opened(hub, [wire({"type": "response.in_progress", "sequence_number": 4})], Dialect.RESPONSES)
    stream.cancel(CloseReason.RESTARTED, NOW, message="cut")
    _, back = again(hub, stream)
    assert back.progress.sequence_number == 5
    last = back.log.last_event()
    assert last is not None and sequence_number_of(last) == 5


# Time


def snapshot_for(retention_s: float, sealed_s_ago: float) -> Snapshot:
    hub = new_hub()
    stream = opened(hub, HELLO)
    agree(stream, retention_s=retention_s)
    stream.seal(CloseReason.COMPLETE, NOW - sealed_s_ago, clean=True)
    return take_snapshot(hub, stream, NOW, UNIX)


def test_retention_goes_on_by_the_wall_clock() -> None:
    there = new_hub()
    back = restore(there, snapshot_for(60.0, 10.0), LATER, LATER_UNIX)
    assert back is not None
    assert back.sealed_at == pytest.approx(LATER - 30)
    there.sweep([back], LATER + 29)
    assert there.get(back.id) is back
    there.sweep([back], LATER + 30.1)
    assert not tuple(there)


def test_a_stream_whose_retention_is_over_does_not_come_back() -> None:
    assert restore(new_hub(), snapshot_for(29.0, 10.0), LATER, LATER_UNIX) is None


def test_a_clock_that_was_set_back_counts_as_sealed_now() -> None:
    back = restore(new_hub(), snapshot_for(60.0, 10.0), LATER, UNIX - 3600)
    assert back is not None and back.sealed_at == LATER


def test_a_cut_generation_is_kept_for_its_readers_to_come_back() -> None:
    hub = new_hub()
    stream = opened(hub, HELLO)
    agree(stream, retention_s=0.0, resume_grace_s=30.0)
    stream.cancel(CloseReason.RESTARTED, NOW, message="cut")
    assert restore(new_hub(), take_snapshot(hub, stream, NOW, UNIX), LATER, LATER_UNIX) is not None


def test_a_stream_whose_id_exists_is_not_restored() -> None:
    there, snapshot = new_hub(), snapshot_for(60.0, 0.0)
    assert restore(there, snapshot, LATER, LATER_UNIX) is not None
    assert restore(there, snapshot, LATER, LATER_UNIX) is None
    assert len(there) == 1


# Choosing


def test_live_streams_are_saved_first_and_then_those_that_ended_last() -> None:
    hub = new_hub()
    early, late, live = (opened(hub, HELLO) for _ in range(3))
    early.seal(CloseReason.COMPLETE, NOW - 5, clean=True)
    late.seal(CloseReason.COMPLETE, NOW - 1, clean=True)
    one = live.log.bytes_held + snapshot_module.FACTS_BYTES
    assert choose(hub, 3 * one) == [live, late, early]
    assert choose(hub, 3 * one - 1) == [live, late]
    assert choose(hub, 1) == []


# Damage


def sample(count: int = 3) -> bytes:
    hub = new_hub()
    streams = [opened(hub, [*HELLO, wire({"padding": "p" * 40_000}), DONE]) for _ in range(count)]
    for stream in streams:
        stream.seal(CloseReason.COMPLETE, NOW, clean=True)
    return saved(*(take_snapshot(hub, stream, NOW, UNIX) for stream in streams))


SAMPLE = sample()


def taken(raw: bytes) -> int:
    """The number of streams read before a StateError, or before the end."""
    count = 0
    source = io.BytesIO(raw)
    try:
        read_header(source.read)
        for _ in load(source.read):
            count += 1
    except StateError:
        return count
    return count


def test_a_file_without_streams_is_a_valid_state() -> None:
    assert loaded(saved()) == []


def test_every_cut_is_noticed_and_the_streams_before_it_are_good() -> None:
    cuts = [*range(120), *range(120, len(SAMPLE), 997), *range(len(SAMPLE) - 30, len(SAMPLE))]
    counts = []
    for cut in cuts:
        with pytest.raises(StateError):
            loaded(SAMPLE[:cut])
        counts.append(taken(SAMPLE[:cut]))
    assert counts == sorted(counts) and set(counts) == {0, 1, 2, 3}


@given(st.integers(0, len(SAMPLE) - 1), st.integers(1, 255))
def test_every_changed_byte_is_noticed(at: int, change: int) -> None:
    damaged = bytearray(SAMPLE)
    damaged[at] ^= change
    header_end = snapshot_module._HEADER.size
    if header_end - 16 <= at < header_end:
        return  # save id and time: any value is right
    with pytest.raises(StateError):
        loaded(bytes(damaged))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "cut short"),
        (b"\0" * 1000, "not a file of streamd's saved streams"),
        (SAMPLE[:14] + b"\x01" + SAMPLE[15:], "version 1 of the format, and this streamd reads version 2 only"),
        (SAMPLE + b"x", "bytes follow the record that ends it"),
        (SAMPLE[:23] + b"\x7f\xf0\0\0\0\0\0\0" + SAMPLE[31:], "time of saving is not a number"),
    ],
)
def test_a_refused_file_says_why(raw: bytes, words: str) -> None:
    with pytest.raises(StateError, match=words):
        loaded(raw)


def test_streams_in_another_order_or_too_few_are_noticed() -> None:
    parts = list(save(loaded(SAMPLE), SAVE_ID, UNIX))
    with pytest.raises(StateError, match="missing"):
        loaded(b"".join(parts[:2] + parts[-1:]))


def test_a_forged_length_reads_no_more_than_the_file_holds() -> None:
    asked: list[int] = []

    def read(count: int) -> bytes:
        asked.append(count)
        return source.read(count)

    record = snapshot_module._RECORD.pack(b"S", 0xFFFF_FFFF, b"\0" * 8)
    source = io.BytesIO(SAMPLE[: snapshot_module._HEADER.size] + record + b"few")
    read_header(read)
    with pytest.raises(StateError, match="cut short"):
        next(load(read))
    assert max(asked) <= snapshot_module.READ_BYTES and len(asked) < 10


def survivors(raw: bytes) -> tuple[list[str], str]:
    """The ids of the streams that are read, and the fault that is told at the end."""
    source = io.BytesIO(raw)
    read_header(source.read)
    found: list[str] = []
    try:
        found.extend(snapshot.facts.id for snapshot in load(source.read))
    except StateError as error:
        return found, str(error)
    return found, ""


@pytest.mark.parametrize("bad", [(0,), (1,), (2,), (0, 1), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("fault", ["body", "digest", "facts", "kind", "empty"])
def test_a_bad_record_costs_its_own_stream_and_no_other(bad: tuple[int, ...], fault: str) -> None:
    header, *records, end = save(loaded(SAMPLE), SAVE_ID, UNIX)
    ids = [snapshot.facts.id for snapshot in loaded(SAMPLE)]
    for k in bad:
        record = records[k]
        if fault == "body":
            records[k] = record[:-1] + bytes((record[-1] ^ 1,))
        elif fault == "digest":
            records[k] = record[:5] + bytes((record[5] ^ 1,)) + record[6:]
        elif fault == "facts":  # such as an earlier version wrote them, with a right checksum
            (snapshot,) = loaded(b"".join((header, record, snapshot_module._record(b"E", (1).to_bytes(4, "big")))))
            facts = replace(snapshot.facts, input_tokens=2**53 + 1)
            records[k] = snapshot_module._record(b"S", snapshot_module._body(replace(snapshot, facts=facts)))
        else:
            records[k] = snapshot_module._record(b"S" if fault == "empty" else b"X", b"")
    found, told = survivors(b"".join((header, *records, end)))
    assert found == [each for k, each in enumerate(ids) if k not in bad]
    assert told.startswith(f"record {bad[0] + 1} ")
    assert ("more faults" in told) == (len(bad) > 1)


INTEGERS = st.integers(-(2**70), 2**70) | st.sampled_from([2**31, 2**53, 2**53 - 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64])
ANY_NUMBER = INTEGERS | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none()


@settings(max_examples=200)
@given(st.sampled_from(Dialect), st.lists(ANY_NUMBER, min_size=8, max_size=8))
def test_no_number_in_an_event_makes_a_stream_that_cannot_be_read_again(dialect: Dialect, given: list[Any]) -> None:
    usage = {"prompt_tokens": given[0], "completion_tokens": given[1]}
    google = {"promptTokenCount": given[2], "candidatesTokenCount": given[3], "thoughtsTokenCount": given[4]}
    numbered = {"sequence_number": given[5], "created": given[6], "choices": [{"index": given[7]}]}
    event = {"usage": usage, "usageMetadata": google, "response": {"id": "r", "usage": usage}, **numbered}
    hub = new_hub()
    stream = opened(hub, [wire({"type": "response.created", **event})], dialect)
    stream.fail(CloseReason.UPSTREAM_TRUNCATED, NOW, message="cut")
    there, back = again(hub, stream)
    assert back.progress.usage == stream.progress.usage
    assert all(0 <= count <= TOKENS_MAX for count in back.progress.usage or ())
    there.remove(back)


# Bytes with right checksums: they come from a mistake in the code, not from damage.


def as_record(body: bytes) -> bytes:
    end = snapshot_module._record(b"E", (1).to_bytes(4, "big"))
    return SAMPLE[: snapshot_module._HEADER.size] + snapshot_module._record(b"S", body) + end


def survives(body: bytes) -> None:
    """Check that the body gives a StateError, or a stream that is sound in every use."""
    try:
        (snapshot,) = loaded(as_record(body))
    except StateError:
        return
    hub = new_hub()
    stream = restore(hub, snapshot, LATER, LATER_UNIX)
    if stream is None:
        return
    read_all(stream.log, stream.log.seek(stream.log.seq_first))
    stream.log.seek((stream.log.seq_first + stream.log.seq_next) // 2)
    if stream.reason is None:
        for event in HELLO:
            stream.append(event, LATER)
    assert take_snapshot(hub, stream, LATER, LATER_UNIX).log.seq_next == stream.log.seq_next
    hub.remove(stream)


BODY = snapshot_module._body(loaded(sample(1))[0])


@settings(max_examples=300)
@given(st.binary(max_size=300))
@example(b"")
def test_any_record_is_refused_or_restored_soundly(body: bytes) -> None:
    survives(body)


@settings(max_examples=500)
@given(st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=6), st.integers(0, 4)), min_size=1, max_size=4))
def test_a_changed_record_is_refused_or_restored_soundly(changes: list[tuple[int, bytes, int]]) -> None:
    body = BODY
    for at, inserted, cut in changes:
        body = body[:at] + inserted + body[at + cut :]
    survives(body)


WORDS = ("", "x", "s_short", "../x", "a b", "a\nb", "é", "news", "abc-_1", "chat", "coalesce", "complete", '"id":1')
NUMBERS = (-1, 0, 1, 2**53, 2**60, 0.5, -0.5, 1e308)
OTHERS: tuple[Any, ...] = (True, False, None, [], {}, [1, 2, 0, 0], [2, 2, 0, 0], [1, 1, 1, 0])
FACT = st.sampled_from((*WORDS, *NUMBERS, *OTHERS))


@settings(max_examples=400)
@given(st.lists(st.tuples(st.sampled_from([*snapshot_module._FACTS, "log"]), FACT), min_size=1, max_size=3))
def test_changed_facts_are_refused_or_restored_soundly(changes: list[tuple[str, Any]]) -> None:
    length = int.from_bytes(BODY[:4], "big")
    facts = orjson.dumps({**orjson.loads(BODY[4 : 4 + length]), **dict(changes)})
    survives(len(facts).to_bytes(4, "big") + facts + BODY[4 + length :])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", "a b"),
        ("id", "s_short"),
        ("id", "ü"),
        ("epoch", "abc"),
        ("upstream", "a\r\nSet-Cookie: b"),
        ("reason", ""),
        ("opened_unix", -1e300),
        ("sealed_unix", 1e15),
        ("retention_s", -1.0),
        ("retention_s", 1e300),
        ("write_interval_s", 1.5),
        ("write_interval_s", -0.5),
    ],
)
def test_a_fact_that_no_stream_has_is_refused(name: str, value: object) -> None:
    (snapshot,) = loaded(sample(1))
    with pytest.raises(StateError, match="a value that no stream can have"):
        loaded(saved(replace(snapshot, facts=replace(snapshot.facts, **{name: value}))))


def test_facts_of_another_version_are_not_guessed() -> None:
    (snapshot,) = loaded(sample(1))
    facts = asdict(snapshot.facts) | {"log": [1, 1, 0, 0], "more": 1}
    body = orjson.dumps(facts)
    with pytest.raises(StateError, match="not those that this version writes"):
        loaded(as_record(len(body).to_bytes(4, "big") + body))


@settings(max_examples=200)
@given(runs(), st.data())
def test_changed_parts_of_a_log_are_refused_or_read_soundly(events: list[bytes], data: st.DataObject) -> None:
    """Changed bytes in segments: refused, or every way to read them is sound."""
    parts = filled(events).parts()
    segments = list(parts.segments)
    which = data.draw(st.integers(0, len(segments) - 1))
    at = data.draw(st.integers(0, len(segments[which]) - 1))
    put = data.draw(st.sampled_from([b"", b"\x01", b"\x01\xff", b"\x01\x00", b"\n", b"\x1f", b"\0", b"\x01\xfe", b"x"]))
    segments[which] = segments[which][:at] + put + segments[which][at + data.draw(st.integers(0, 2)) :]
    changed = parts._replace(segments=tuple(segments))
    try:
        check_parts(changed)
    except ValueError:
        return
    log = ReplayLog.of_parts(changed, bytes_max=1 << 20, events_max=1 << 20)
    assert len(read_all(log, log.seek(log.seq_first))) == log.seq_next - log.seq_first
    for seq in range(log.seq_first, log.seq_next + 1):
        log.seek(seq)


# Makers


def made(*objects: Any) -> bytes:
    """A record of makers with this JSON."""
    return snapshot_module._record(b"M", orjson.dumps(objects))


def with_makers(record: bytes) -> tuple[list[Any], str]:
    """What is read of a state with this record between two streams, and the fault."""
    header, first, second, _, _ = save(loaded(SAMPLE), SAVE_ID, UNIX)
    end = snapshot_module._record(b"E", (3).to_bytes(4, "big"))
    source = io.BytesIO(header + first + record + second + end)
    read_header(source.read)
    found: list[Any] = []
    try:
        found.extend(load(source.read))
    except StateError as error:
        return found, str(error)
    return found, ""


def test_makers_are_read_between_streams() -> None:
    found, fault = with_makers(made(["resp_1", "p", "up"], ["resp_1", "q", "up"]))
    assert fault == "" and len(found) == 3
    assert found[1] == MadeObjects((("resp_1", Made("p", "up")), ("resp_1", Made("q", "up"))))


@pytest.mark.parametrize(
    "record",
    [
        made(["resp_1", "p"]),
        made(["resp_1", "p", 7]),
        made(["", "p", "up"]),
        made(["x" * (ID_CHARS_MAX + 1), "p", "up"]),
        made(["resp_1", "", "up"]),
        made(["resp_1", "p" * 257, "up"]),
        made(["resp_1", "p", "up\r\nx: y"]),
        made("resp_1"),
        made(*[["resp_1", "p", "up"]] * (MADE_PER_RECORD + 1)),
        snapshot_module._record(b"M", b'{"resp_1": 1}'),
        snapshot_module._record(b"M", b"no JSON"),
        snapshot_module._record(b"M", b" " * (snapshot_module._MAKERS_BYTES_MAX + 1) + b"[]"),
        made(["resp_1", "p", "up"]).replace(b"resp_1", b"resp_2"),
    ],
)
def test_makers_that_none_can_be_cost_no_stream(record: bytes) -> None:
    found, fault = with_makers(record)
    assert [type(each) for each in found] == [Snapshot, Snapshot] and fault.startswith("record 2 ")


@given(st.binary(max_size=200))
def test_any_record_of_makers_is_refused_or_sound(body: bytes) -> None:
    found, _ = with_makers(snapshot_module._record(b"M", body))
    for each in found:
        if isinstance(each, MadeObjects):
            makers = Makers()
            for object_id, maker in each.made:
                makers.learn(object_id, *maker)
            assert len(makers) <= MADE_PER_RECORD
