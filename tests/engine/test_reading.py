"""A copy is read entry by entry: what continues it is taken, everything else is refused and changes nothing."""

from __future__ import annotations

import pytest
from fakes import event
from sinks import new_hub

from streamd.core.log_record import pack
from streamd.core.replay import ReplayLog
from streamd.core.stream import Stream
from streamd.engine.entry import End, Entry, Position
from streamd.engine.facts import facts_of, pack_facts
from streamd.engine.reading import CopyReader, NotNext
from streamd.wire.dialect import Dialect

END = End("complete", True)


class Written:
    """A stream, and its entries as an owner would write them."""

    def __init__(self) -> None:
        self.stream: Stream = new_hub().open(Dialect.CHAT, 0.0)
        self.mark = self.stream.log.mark_at_start()
        self.facts = pack_facts(facts_of(self.stream, 0.0, 1e9))
        self.fence = 1

    def add(self, *texts: str, end: End | None = None) -> Entry:
        for text in texts:
            self.stream.append(event(text), 0.0)
        record = self.stream.log.since(self.mark, bytes_max=1 << 20)
        assert record is not None
        position = Position(self.fence, 0 if record.starts_over else record.seq_last)
        facts = self.facts if record.starts_over else b""
        by = "m1" if record.starts_over else ""
        return Entry(position, pack(record), record.starts_over, facts, end, "", by, record.seq_last)

    def restart(self) -> Entry:
        self.fence += 1
        self.mark = self.stream.log.mark_at_start()
        return self.add()


def new_reader() -> CopyReader:
    return CopyReader(lambda: ReplayLog(bytes_max=1 << 20, events_max=1 << 20))


def test_entries_in_a_row_make_the_log() -> None:
    own, reader = Written(), new_reader()
    for entry in (own.add(" a"), own.add(" b", " c"), own.add(" d", end=END)):
        reader.take(entry)
    assert reader.log is not None and reader.log.parts() == own.stream.log.parts()
    assert reader.end == END and reader.facts is not None and reader.facts.id == own.stream.id


def test_a_start_over_replaces_all_that_was_read() -> None:
    own, reader = Written(), new_reader()
    reader.take(own.add(" a"))
    own.add(" b")  # which this reader never sees
    reader.take(own.restart())
    reader.take(own.add(" c"))
    assert reader.log is not None and reader.log.parts() == own.stream.log.parts()


def test_a_start_over_replaces_the_former_log_only_when_it_has_got_as_far() -> None:
    own, reader = Written(), new_reader()
    reader.take(own.add(*[letter * 600 for letter in "abc"]))
    own.fence, own.mark = 2, own.stream.log.mark_at_start()
    for number in (1, 2, 3):
        record = own.stream.log.since(own.mark, bytes_max=1)
        assert record is not None and record.seq_last == number
        position = Position(2, 0 if number == 1 else number)
        facts, by = (own.facts, "m1") if number == 1 else (b"", "")
        reader.take(Entry(position, pack(record), number == 1, facts, None, "", by, number))
        assert reader.log is not None and reader.log.parts() == own.stream.log.parts()
        assert (reader.is_whole, reader.position, reader.fence) == (
            (True, (2, 3), 2) if number == 3 else (False, (1, 0), 2)
        )


def test_a_declared_end_at_the_same_place_is_the_end_until_the_owner_goes_on() -> None:
    own, reader = Written(), new_reader()
    reader.take(own.add(" a"))
    lost = End("node_lost", False)
    reader.take(Entry(Position(2, 0), b"", False, b"", lost, "", "m2", 1))
    assert reader.end == lost
    own.fence = 2
    reader.take(own.restart())
    assert reader.end is None and reader.position == (3, 0)


def test_what_does_not_continue_the_copy_is_refused() -> None:
    own, reader = Written(), new_reader()
    first, second, third = own.add(" a"), own.add(" b"), own.add(" c")
    with pytest.raises(NotNext):
        reader.take(second)  # it begins in its middle
    reader.take(first)
    refused = [
        first,  # again
        third,  # a hole
        second._replace(position=Position(2, 2)),  # another fence, without its raiser
        second._replace(last_seq=5, position=Position(1, 5)),  # not the seqs that it says
        second._replace(record=b"\0\1 b"),  # half a text
        second._replace(record=b""),
        Entry(Position(2, 0), b"", False, b"", END, "", "m2", 7),  # an end at another place
        own.restart()._replace(facts=b"{}"),
    ]
    assert reader.log is not None
    before = reader.log.parts()
    for entry in refused:
        with pytest.raises(ValueError):
            reader.take(entry)
        assert reader.log.parts() == before and reader.position == first.position
    reader.take(second)
    reader.take(third)
