"""A copy of a log that grows by records is the log: byte for byte, through every form of the record, or refused."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_replay import chat, choice, coalesce_all, filled, reachable_bytes, read_all, runs, wire

from streamd.core.log_record import TEMPLATES_MAX, LogRecord, pack, unpack
from streamd.core.replay import SEGMENT_BYTES_MAX, Mark, ReplayLog, check_parts
from streamd.wire.template import TEMPLATE_BYTES_MAX

LARGE = 1 << 20
SIZES = st.sampled_from([0, 1, 100, 1000, LARGE])  # of a record


def new_log(bytes_max: int = LARGE) -> ReplayLog:
    return ReplayLog(bytes_max=bytes_max, events_max=LARGE)


def sent(record: LogRecord) -> LogRecord:
    """The record as another process reads it."""
    return unpack(pack(record), record.seq_last)


def catch_up(copy: ReplayLog, log: ReplayLog, mark: Mark, bytes_max: int = LARGE) -> None:
    while record := log.since(mark, bytes_max=bytes_max):
        assert record.seq_last == mark.seq_next - 1
        copy.extend(sent(record))
    assert mark.seq_next == log.seq_next
    assert copy.seq_next == log.seq_next or log.seq_first == log.seq_next


def text(content: str) -> bytes:
    return wire(chat(choices=[choice(content)]))


@settings(max_examples=40, deadline=None)
@given(runs(), st.lists(st.tuples(st.integers(1, 9), SIZES), max_size=14))
def test_a_copy_that_follows_has_the_same_bytes_at_each_step(events: list[bytes], steps: list[tuple[int, int]]) -> None:
    log, copy = new_log(), new_log()
    mark, at = log.mark_at_start(), 0
    for count, bytes_max in [*steps, (len(events), LARGE)]:
        for event in events[at : at + count]:
            log.append(event)
        at += count
        catch_up(copy, log, mark, bytes_max)
        assert copy.parts() == log.parts()
        assert 0.9 * reachable_bytes(copy) - 300 <= copy.bytes_held <= log.bytes_held
    check_parts(copy.parts())
    assert read_all(copy, copy.seek(1)) == list(enumerate(events, 1))
    assert coalesce_all(copy, copy.seek(1)) == coalesce_all(log, log.seek(1))


@settings(max_examples=40, deadline=None)
@given(runs(), st.data())
def test_a_copy_that_was_left_behind_is_caught_up_from_its_last_seq(events: list[bytes], data: st.DataObject) -> None:
    """For instance after a failover to a replica that lacks the newest records."""
    log, copy = new_log(), new_log()
    behind = data.draw(st.integers(1, len(events)))
    for event in events[:behind]:
        log.append(event)
    catch_up(copy, log, log.mark_at_start(), data.draw(SIZES))
    for event in events[behind:]:
        log.append(event)
    mark = log.mark_behind(behind)
    assert mark.seq_next == behind + 1
    catch_up(copy, log, mark, data.draw(SIZES))
    assert copy.parts() == log.parts()


@settings(max_examples=40, deadline=None)
@given(runs(), st.sampled_from([900, 2500]), st.lists(st.integers(1, 5), max_size=20))
def test_of_a_trimmed_log_a_copy_has_what_the_log_has(events: list[bytes], bytes_max: int, steps: list[int]) -> None:
    log, copy = new_log(bytes_max), new_log()
    mark, at = log.mark_at_start(), 0
    for count in [*steps, len(events)]:
        for event in events[at : at + count]:
            log.append(event)
        at += count
        if count == 5:
            log.trim_to(log.bytes_held // 2)
        try:
            catch_up(copy, log, mark, 300)
        except LookupError:
            copy, mark = new_log(), log.mark_at_start()
            if log.seq_first < log.seq_next:
                catch_up(copy, log, mark)
            continue
        if log.seq_first < log.seq_next:
            held, copied = log.parts(), copy.parts()
            assert copied.segments[-len(held.segments) :] == held.segments and copied.templates == held.templates
            assert read_all(copy, copy.seek(log.seq_first)) == read_all(log, log.seek(log.seq_first))


def test_a_record_that_starts_over_begins_with_the_oldest_event_held() -> None:
    log, copy = filled([text(f" {n}") for n in range(900)], bytes_max=2500), new_log()
    assert log.seq_first > 1
    catch_up(copy, log, log.mark_at_start(), 700)
    assert (copy.seq_first, copy.parts().segments) == (log.seq_first, log.parts().segments)
    with pytest.raises(LookupError):
        log.mark_behind(log.seq_first - 1)
    with pytest.raises(LookupError):
        log.mark_behind(log.seq_next)


def test_a_log_that_forgot_everything_starts_over_at_its_next_event() -> None:
    log, copy = filled([text(" a")] * 9), new_log()
    mark = log.mark_behind(9)
    log.trim_to(0)
    assert log.since(mark, bytes_max=LARGE) is None
    assert log.since(log.mark_at_start(), bytes_max=LARGE) is None
    log.append(text(" b"))
    with pytest.raises(LookupError):
        log.since(mark, bytes_max=LARGE)
    catch_up(copy, log, log.mark_at_start())
    assert read_all(copy, copy.seek(10)) == [(10, text(" b"))]


def test_a_token_takes_its_bytes_and_two_more() -> None:
    log = filled([text(" a")] * 5)
    mark = log.mark_behind(5)
    log.append(text(" token"))
    record = log.since(mark, bytes_max=LARGE)
    assert record is not None and pack(record) == b"\0\1 token\n"


def test_a_record_is_as_long_as_asked_for() -> None:
    log = filled([text(" token")] * 4000)
    mark, lengths = log.mark_at_start(), []
    while record := log.since(mark, bytes_max=2000):
        lengths.append(sum(map(len, record.pieces)))
    assert len(lengths) > 5 and max(lengths) <= 2000 + SEGMENT_BYTES_MAX
    assert min(lengths[:-1]) > 2000


@settings(max_examples=30, deadline=None)
@given(runs(), runs(), st.data())
def test_a_copy_can_be_written_on(events: list[bytes], more: list[bytes], data: st.DataObject) -> None:
    log, copy = filled(events), new_log()
    catch_up(copy, log, log.mark_at_start())
    reader = copy.cursor_at_end()
    for event in more:
        copy.append(event)
    assert read_all(copy, copy.seek(1)) == list(enumerate([*events, *more], 1))
    assert read_all(copy, reader) == list(enumerate([*events, *more], 1))[len(events) :]
    check_parts(copy.parts())
    # The log that went on is a copy's source itself, and a log that was written can be extended again.
    other, mark = new_log(), copy.mark_at_start()
    catch_up(other, copy, mark)
    back = copy.mark_behind(data.draw(st.integers(1, copy.seq_next - 1)))
    assert back.seq_next <= mark.seq_next
    follow, at = filled(events), log.mark_behind(len(events))
    log.append(text(" z"))
    catch_up(follow, log, at)
    assert follow.parts() == log.parts()
    follow.append(text(" y"))
    assert follow.last_event() == text(" y")


def test_a_log_that_was_written_is_extended_and_written_again() -> None:
    log, copy = filled([text(" a")] * 3), filled([text(" a")] * 3)
    assert copy.append_text(text(" b")) and log.append_text(text(" b"))
    mark = log.mark_behind(4)
    log.append(text(" c"))
    catch_up(copy, log, mark)
    for content in (" d", " e"):
        assert copy.append(text(content))
        assert copy.last_event() == text(content)


def test_a_mark_in_a_dropped_segment_never_goes_on_in_another() -> None:
    log = filled([text(" token")] * 2000)
    mark = log.mark_behind(100)
    log.trim_to(log.bytes_held * 3 // 4)
    assert 101 < log.seq_first < 1000
    with pytest.raises(LookupError, match="^101$"):
        log.since(mark, bytes_max=LARGE)
    assert mark.seq_next == 101


def test_a_template_is_sent_once() -> None:
    log, sent_templates = new_log(), list[int]()
    mark = log.mark_at_start()
    for content in (" a", " b", " c"):
        log.append(text(content))
        record = log.since(mark, bytes_max=LARGE)
        assert record is not None
        sent_templates.append(len(record.templates))
    assert sent_templates == [1, 0, 0]


def test_a_copy_that_is_written_on_goes_the_short_way_again() -> None:
    log, copy = filled([text(" a")] * 5), new_log()
    catch_up(copy, log, log.mark_at_start())
    assert not copy.append_text(text(" b"))
    assert copy.append(text(" b"))
    assert copy.append_text(text(" c"))
    assert [len(each.segments) for each in (log.parts(), copy.parts())] == [1, 1]


@settings(max_examples=40, deadline=None)
@given(runs(), st.lists(st.integers(1, 6), max_size=10))
def test_a_cursor_at_the_end_reads_each_record_that_follows(events: list[bytes], steps: list[int]) -> None:
    log, copy = new_log(), new_log()
    mark, cursor, read, at = log.mark_at_start(), copy.cursor_at_end(), list[Any](), 0
    for count in [*steps, len(events)]:
        for event in events[at : at + count]:
            log.append(event)
        at += count
        catch_up(copy, log, mark)
        read += read_all(copy, cursor)
        cursor = copy.cursor_at_end()
    assert read == list(enumerate(events, 1))


@settings(max_examples=30, deadline=None)
@given(runs(), st.data())
def test_cursors_go_on_where_they_are_when_the_log_is_replaced(events: list[bytes], data: st.DataObject) -> None:
    """The fresh log has the same events in other segments, and perhaps more of them."""
    log, held = filled(events), data.draw(st.integers(0, len(events)))
    copy = filled(events[:held])
    cursors = [copy.seek(seq) for seq in range(1, held + 2)]
    for number, cursor in enumerate(cursors):
        if number % 2:
            copy.read(cursor, bytes_max=1)
    fresh = new_log()
    catch_up(fresh, log, log.mark_at_start(), data.draw(SIZES))
    copy.replace(fresh)
    assert copy.parts() == log.parts()
    for cursor in cursors:
        seq = cursor.seq
        assert read_all(copy, cursor) == list(enumerate(events, 1))[seq - 1 :]


def test_a_cursor_in_front_of_the_log_that_replaces_another_is_told_so() -> None:
    events = [text(f" {n}") for n in range(900)]
    log, copy, fresh = filled(events, bytes_max=2500), filled(events[:500]), new_log()
    early, late = copy.seek(1), copy.seek(501)
    catch_up(fresh, log, log.mark_at_start())
    copy.replace(fresh)
    with pytest.raises(LookupError):
        copy.read(early, bytes_max=100)
    with pytest.raises(LookupError):
        copy.read(late, bytes_max=100)
    assert copy.seq_first > 501 and read_all(copy, copy.seek(copy.seq_first)) == read_all(log, log.seek(log.seq_first))


@settings(max_examples=40, deadline=None)
@given(runs(), st.integers(0, 20))
def test_an_extension_tells_texts_from_events_that_have_to_be_looked_into(events: list[bytes], held: int) -> None:
    log = new_log()
    told = [log.append(event) for event in events]
    held = min(held, len(events))
    cursor = log.seek(held + 1)
    extension = log.extension(cursor)
    assert [event for event, _ in extension] == events[held:] and cursor.seq == log.seq_next
    assert all(is_text for (_, is_text), was_told in zip(extension, told[held:], strict=True) if was_told)


# -- records of strangers


def record_of(**changes: Any) -> LogRecord:
    """A record that continues base_log()."""
    given = LogRecord(False, 1, 4, 0, (), (b" b\n",))
    return given._replace(**changes)


def base_log() -> ReplayLog:
    copy = new_log()
    log = filled([text(" a")] * 3)
    catch_up(copy, log, log.mark_at_start())
    return copy


TEMPLATE = ((b'data: {"a":"', b'"}\n\n'), b"T", True)
KNOWN = base_log().parts().templates[0]
HEAD_4 = b"\0\0\0\0\4"

REFUSED = {
    "a hole": record_of(seq_last=5),
    "an overlap": record_of(seq_last=3),
    "a start over a log that has begun": record_of(starts_over=True, pieces=(HEAD_4 + b"\1\xff\0\0\0\4a:\n\n",)),
    "another count": record_of(events=2, seq_last=5),
    "no piece": record_of(pieces=()),
    "half a text": record_of(pieces=(b" b",)),
    "a control byte": record_of(pieces=(b" \0\n",)),
    "a carriage return": record_of(pieces=(b" \r\n",)),
    "a mark alone": record_of(pieces=(b"\1",)),
    "an unknown template": record_of(pieces=(b"\1\1 b\n",)),
    "a date that is none": record_of(pieces=(b"\1\xfe17000000x0 b\n",)),
    "a whole event cut short": record_of(pieces=(b"\1\xff\0\0\0\5a:\n\n",)),
    "a whole event without its end": record_of(pieces=(b"\1\xff\0\0\0\3a:\n",)),
    "a tail beyond a segment": record_of(pieces=(b"x" * SEGMENT_BYTES_MAX + b"\n",)),
    "a segment with another seq": record_of(pieces=(b"", b"\0\0\0\0\5\1\0\1\xfe1700000000 b\n")),
    "a segment that needs the one before": record_of(pieces=(b"", HEAD_4 + b" b\n")),
    "a segment without its date": record_of(pieces=(b"", HEAD_4 + b"\1\0 b\n")),
    "a segment without events": record_of(events=0, seq_last=3, pieces=(b"", HEAD_4)),
    "a large segment of two events": record_of(
        events=2, seq_last=5, pieces=(b"", HEAD_4 + b"\1\0\1\xfe1700000000" + b"x" * 470 + b"\n\n")
    ),
    "a gap of templates": record_of(templates=(TEMPLATE,), templates_from=2),
    "another template in a place": record_of(templates=(TEMPLATE,), templates_from=0),
    "a template without a text": record_of(templates=(((b"data: ", b"\n\n"), b"C", True),), templates_from=1),
    "a template with two texts": record_of(templates=(((b"", b"", b"\n\n"), b"TT", True),), templates_from=1),
    "a template with a control byte": record_of(templates=(((b"\r", b"\n\n"), b"T", True),), templates_from=1),
    "a template without an end": record_of(templates=(((b"data: ", b"\n"), b"T", True),), templates_from=1),
    "a template too large": record_of(
        templates=(((b"x" * TEMPLATE_BYTES_MAX, b"\n\n"), b"T", True),), templates_from=1
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_record_that_cannot_continue_the_log_changes_nothing(name: str) -> None:
    copy = base_log()
    before = copy.parts(), copy.bytes_held
    with pytest.raises(ValueError, match=r"a |texts|an "):
        copy.extend(REFUSED[name])
    assert (copy.parts(), copy.bytes_held) == before
    copy.extend(record_of())
    assert copy.last_event() == text(" b")


def test_a_record_may_repeat_templates_and_add_others() -> None:
    copy = base_log()
    copy.extend(record_of(templates=(KNOWN, TEMPLATE), pieces=(b"\1\1 b\n",)))
    assert copy.last_event() == b'data: {"a":" b"}\n\n'
    assert copy.text_events == 2  # neither the first event of a template nor that of the other


def test_a_sequence_number_stays_within_its_five_bytes() -> None:
    numbered = ((b'data: {"sequence_number":', b',"a":"', b'"}\n\n'), b"NT", True)
    copy = base_log()
    with pytest.raises(ValueError, match="five bytes"):
        copy.extend(record_of(templates=(numbered,), templates_from=1, pieces=(b"\1\1\xff\xff\xff\xff\xff b\n",)))


BROKEN = {
    "nothing": b"",
    "flags alone": b"\0",
    "unknown flags": b"\x08\1 b\n",
    "more events than seqs": b"\0\x7f b\n",
    "a number without end": b"\0" + b"\x80" * 9,
    "no templates": b"\1\1\0\0 b\n",
    "too many templates": b"\1\1\1\x40" + b"\0" * 99,
    "a template of a third kind": b"\1\1\0\1\2\1T\1a\1b b\n",
    "a template cut short": b"\1\1\0\1\1\1T\1a\x7fb",
    "holes beyond the end": b"\1\1\0\1\1\x7fT",
    "pieces cut short": b"\2\1\2\0\5 b\n",
    "more pieces than bytes": b"\2\1\xff\xff\xff\xff\x0f\0",
    "bytes behind the pieces": b"\2\1\2\0\0 b\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_bytes_that_are_no_record_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"a (record|number|template) "):
        unpack(BROKEN[name], 4)


def test_a_seq_beyond_five_bytes_is_refused() -> None:
    assert unpack(b"\0\1 b\n", (1 << 40) - 1).seq_first == (1 << 40) - 1
    with pytest.raises(ValueError, match="5 bytes"):
        unpack(b"\0\1 b\n", 1 << 40)


def test_a_record_can_have_as_many_templates_as_a_log() -> None:
    record = LogRecord(True, 0, 3, 0, (TEMPLATE,) * TEMPLATES_MAX, ())
    assert sent(record) == record
    with pytest.raises(ValueError, match="more templates"):
        sent(record._replace(templates_from=1))


@settings(max_examples=40, deadline=None)
@given(runs(), st.randoms(use_true_random=False), SIZES)
def test_a_damaged_record_is_refused_or_read_to_its_end(events: list[bytes], rng: random.Random, size: int) -> None:
    """Readers of the copy never fail, and never see an event without its blank line."""
    log, copy = filled(events), new_log(4000)
    mark = log.mark_at_start()
    while record := log.since(mark, bytes_max=size):
        data = bytearray(pack(record))
        for _ in range(rng.randint(0, 2)):
            data[rng.randrange(len(data))] = rng.choice([0, 1, 10, 31, 127, 128, 255, rng.randrange(256)])
        before = copy.parts(), copy.bytes_held
        try:
            copy.extend(unpack(bytes(data), record.seq_last))
        except ValueError:
            assert (copy.parts(), copy.bytes_held) == before
    check_parts(copy.parts())
    read = read_all(copy, copy.seek(copy.seq_first))
    assert [seq for seq, _ in read] == list(range(copy.seq_first, copy.seq_next))
    assert all(event.endswith(b"\n\n") for _, event in read)
    assert [seq for seq, _ in coalesce_all(copy, copy.seek(copy.seq_first))][-1:] == [seq for seq, _ in read][-1:]
