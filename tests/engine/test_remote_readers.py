"""Readers at other nodes: a generation that is read there goes on, and ends by the rule of the last reader anywhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import orjson
import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from sinks import Loop, Reader, new_hub

from streamd.core.stream import Stream
from streamd.core.terms import Terms
from streamd.engine import remote_readers
from streamd.engine.notes import ClusterNote, NoteKind
from streamd.engine.presence import RENEW_S
from streamd.engine.remote_readers import LAPSE_S, RemoteReaders
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect

DETACH_S, RESUME_S = 5.0, 60.0


class Worker:
    """A worker whose generations are read at other members too."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.loop = Loop()
        self.hub = new_hub(self.loop)
        self.wanted: list[Stream] = []
        self.remote = RemoteReaders(self.hub, lambda: self.now, self.wanted.append)
        copies: Any = SimpleNamespace(
            grown=lambda stream: None,
            left=lambda stream, reason: None,
            is_read_elsewhere=self.remote.has,
            need=lambda stream: False,
        )
        self.hub.copies = copies
        self.hub.on_sealed = self.remote.ended

    def open(self, **terms: Any) -> Stream:
        rules = Terms(detach_grace_s=DETACH_S, resume_grace_s=RESUME_S, **terms)
        stream = self.hub.open(Dialect.CHAT, self.now, terms=rules)
        stream.source = Generation()
        return stream

    def reader(self, stream: Stream) -> Reader:
        return Reader(stream, self.loop)

    def leave(self, reader: Reader, reason: CloseReason = CloseReason.READER_GONE) -> None:
        reader.subscriber.end()
        self.hub.leave(reader.subscriber, reason, self.now)

    def follow(self, stream: Stream, member: str = "bbbbb") -> None:
        self.remote.take_follow(note(NoteKind.FOLLOW, [stream.id], member))

    def left(self, stream: Stream, reason: CloseReason, member: str = "bbbbb") -> None:
        self.remote.take_left(note(NoteKind.LEFT, [[stream.id, reason.word]], member))

    def pass_time(self, seconds: float) -> None:
        for _ in range(round(seconds * 4)):
            self.now += 0.25
            self.remote.tick(self.now)
            self.hub.sweep(tuple(self.hub), self.now)
            self.loop.rest()


class Generation:
    """A source."""

    needs_reader = True
    watch = None

    def __init__(self) -> None:
        self.cancelled: CloseReason | None = None

    def cancel(self, reason: CloseReason) -> None:
        self.cancelled = reason

    def on_terminal(self, now: float) -> None:
        pass


def note(kind: NoteKind, body: Any, member: str = "bbbbb") -> ClusterNote:
    shard: Any = None
    return ClusterNote(kind, member, 1, 0, orjson.dumps(body), shard)


@pytest.fixture
def worker() -> Worker:
    return Worker()


def test_a_generation_that_is_read_elsewhere_outlives_its_readers_here(worker: Worker) -> None:
    stream = worker.open()
    reader = worker.reader(stream)
    worker.follow(stream)
    assert worker.wanted == [stream], "its new readers get pushes at once"
    worker.leave(reader)
    for _ in range(20):
        worker.pass_time(RENEW_S)
        worker.follow(stream)
    assert stream.reason is None and worker.hub.detached == 0 and worker.wanted == [stream]


def test_a_reader_elsewhere_ends_the_grace(worker: Worker) -> None:
    stream = worker.open()
    worker.leave(worker.reader(stream), CloseReason.NETWORK_LOST)
    worker.pass_time(RESUME_S - 1)
    worker.follow(stream)
    worker.pass_time(2)
    assert stream.reason is None and worker.hub.detached == 0


@pytest.mark.parametrize(
    ("reason", "grace_s"),
    [
        (CloseReason.READER_GONE, DETACH_S),
        (CloseReason.NETWORK_LOST, RESUME_S),
        (CloseReason.SLOW_CONSUMER, RESUME_S),
    ],
)
def test_the_last_reader_elsewhere_decides_the_grace(worker: Worker, reason: CloseReason, grace_s: float) -> None:
    stream = worker.open()
    worker.leave(worker.reader(stream), CloseReason.NETWORK_LOST)
    worker.follow(stream)
    worker.left(stream, reason)
    worker.pass_time(grace_s - 1)
    assert stream.reason is None and worker.hub.detached == 1
    worker.pass_time(2)
    assert stream.reason is CloseReason.ABANDONED and worker.hub.detached == 0


def test_a_generation_ends_when_all_members_readers_have_left(worker: Worker) -> None:
    stream = worker.open()
    here = worker.reader(stream)
    for member in ("bbbbb", "ccccc"):
        worker.follow(stream, member)
    worker.left(stream, CloseReason.READER_GONE, "bbbbb")
    worker.leave(here)
    worker.pass_time(DETACH_S + 1)
    assert stream.reason is None
    worker.left(stream, CloseReason.READER_GONE, "ccccc")
    worker.pass_time(DETACH_S + 1)
    assert stream.reason is CloseReason.ABANDONED


def test_a_reader_here_holds_what_the_last_elsewhere_has_left(worker: Worker) -> None:
    stream = worker.open()
    worker.reader(stream)
    worker.follow(stream)
    worker.left(stream, CloseReason.READER_GONE)
    worker.pass_time(DETACH_S + 1)
    assert stream.reason is None


def test_a_member_that_dies_is_a_lost_connection(worker: Worker) -> None:
    stream = worker.open()
    worker.follow(stream)
    worker.pass_time(LAPSE_S - 1)
    assert worker.hub.detached == 0
    worker.pass_time(RESUME_S)
    assert stream.reason is None and worker.hub.detached == 1
    worker.pass_time(3)
    assert stream.reason is CloseReason.ABANDONED and len(worker.remote) == 0


def test_without_a_grace_the_generation_ends_with_its_last_reader_elsewhere(worker: Worker) -> None:
    stream = worker.hub.open(Dialect.CHAT, worker.now)
    source = stream.source = Generation()
    worker.follow(stream)
    worker.left(stream, CloseReason.READER_GONE)
    assert source.cancelled is CloseReason.READER_GONE


def test_a_running_grace_isnt_begun_anew(worker: Worker) -> None:
    stream = worker.open()
    worker.leave(worker.reader(stream), CloseReason.NETWORK_LOST)
    worker.pass_time(RESUME_S - 1)
    worker.left(stream, CloseReason.NETWORK_LOST)
    worker.pass_time(2)
    assert stream.reason is CloseReason.ABANDONED


def test_a_published_stream_with_readers_elsewhere_makes_no_room(worker: Worker) -> None:
    stream = worker.open(owner="one", published=True)
    source: Any = stream.source
    source.needs_reader = False
    reader = worker.reader(worker.open(owner="one"))
    assert not reader.ended
    worker.follow(stream)
    assert not worker.hub.make_place("two", worker.now, relayed=False)
    worker.left(stream, CloseReason.READER_GONE)
    assert stream.reason is None
    assert worker.hub.make_place("two", worker.now, relayed=False)


def test_nothing_is_kept_of_streams_that_are_not_here_or_over(worker: Worker) -> None:
    stream, copy = worker.open(), worker.open(is_copy=True)
    worker.follow(stream)
    stream.seal(CloseReason.COMPLETE, worker.now, clean=True)
    assert len(worker.remote) == 0
    worker.follow(stream)
    worker.follow(copy)
    unknown: Any = SimpleNamespace(id=worker.hub.new_id())
    foreign: Any = SimpleNamespace(id="s_ZZZZZ" + "x" * 22)
    for each in (unknown, foreign):
        worker.follow(each)
        worker.left(each, CloseReason.READER_GONE)
    assert len(worker.remote) == 0


def test_the_number_of_readers_elsewhere_is_bounded(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_readers, "READERSHIPS_MAX", 2)
    stream = worker.open()
    for member in ("bbbbb", "ccccc", "ddddd"):
        worker.follow(stream, member)
    assert len(worker.remote) == 2
    worker.follow(stream, "bbbbb")
    assert len(worker.remote) == 2


@pytest.mark.parametrize("body", [None, {}, "x", [1], [None], [["x"]], [["x", 1]], [["x", "y", "z"]], [["x", None]]])
def test_bodies_of_another_form_are_refused(worker: Worker, body: Any) -> None:
    with pytest.raises(ValueError, match=r"note|unpack"):
        worker.remote.take_left(note(NoteKind.LEFT, body))
    if body != [["x", "y", "z"]]:
        with pytest.raises(ValueError, match="note"):
            worker.remote.take_follow(note(NoteKind.FOLLOW, body))
