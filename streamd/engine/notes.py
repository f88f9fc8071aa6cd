"""Notes: messages of a member to another member, through an inbox in the engine.

An inbox is a stream of the engine on each of its servers, `<prefix>in:<member>`; a message on the channel
`<prefix>c:in:<member>` wakes its reader. A note about a stream goes over the server that has the stream's copy.

A note may be lost: with a link, in a failover, in an inbox that is full, with a member that is gone. So nothing depends
on a single note. A statement is made again (engine/presence.py), and a question without an answer within its time has
the answer None, as if the other member were dead.

A note may also be read twice, after a failover. Each has its sender and a number that grows, and a number that is not
above the sender's last one is passed over.

READING. What was read is deleted, and reading always starts at the first entry: after a restart of the engine with a
slower clock ids go back, and a read behind the last id then finds nothing for ever. A call wakes the reader of an
inbox, which reads once in READ_EVERY_S without one, too.

BOUNDS. A note has NOTE_BYTES_MAX. A large note keeps the inbox at LARGE_MAX notes, a small one at SMALL_MAX: 256 of
64 KiB and 4,096 of 1 KiB are 20 MiB. An inbox that isn't read for INBOX_TTL_S goes by itself. All that is read is
untrusted: an entry that is no note, and a note of a kind that this version doesn't know, are counted and deleted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

from streamd.choice import Choice
from streamd.core.guard import Guard
from streamd.engine.channels import ChannelReceiver
from streamd.engine.connection import EngineError, Reply, packed
from streamd.engine.owner import Commands
from streamd.engine.shards import CopyKeys

NOTE_BYTES_MAX: Final = 64 * 1024
SMALL_BYTES_MAX: Final = 1024
SMALL_MAX: Final = 4096
LARGE_MAX: Final = 256

# A question is given up after a second, and a statement is made again within ten.
INBOX_TTL_S: Final = 60
READ_EVERY_S: Final = 1.0
# A reply of 16 large notes is 1 MiB.
READ_NOTES: Final = 16

# An answer takes two round trips and a turn of the other member's loop. A loop that is later than this takes no new
# streams, either.
ANSWER_S: Final = 1.0
QUESTIONS_MAX: Final = 1024

# Senders with a last number that is known: 100 nodes with 8 workers, five times over.
SENDERS_MAX: Final = 4096

_is_member = re.compile(rb"[A-Za-z0-9_-]{1,64}").fullmatch
_is_number = re.compile(rb"[0-9]{1,16}").fullmatch


class NoteKind(Choice):
    """Kinds of notes, as they stand in the engine."""

    ANSWER = "answer"  # to a question, by its number
    SYNC = "sync"  # a stream's id: write what its copy lacks, and see to it that the copy is there
    FOLLOW = "follow"  # ids of streams that have readers at the sender
    CANCEL = "cancel"  # a stream's id: a client with the right to it stops it
    LEFT = "left"  # ids of streams that have no reader at the sender any more, each with the reason


_KINDS: Final = {kind.value.encode(): kind for kind in NoteKind}


class NoteShard(Protocol):
    """A server of the engine, as notes use it (engine/servers.py's EngineShard)."""

    @property
    def link(self) -> Commands:
        """The link for commands."""

    @property
    def channels(self) -> NoteChannels:
        """The link for pushes."""


class NoteChannels(Protocol):
    """Channels, as notes use them."""

    def subscribe(self, channel: bytes, receiver: ChannelReceiver) -> None:
        """Listen to a channel."""

    def unsubscribe(self, channel: bytes) -> None:
        """Listen no more."""


class ClusterNote(NamedTuple):
    """A note that was read."""

    kind: NoteKind
    sender: str  # a member's id
    number: int  # of the sender's notes
    about: int  # an answer: the number of its question
    body: bytes
    shard: NoteShard  # over which it came, and an answer goes


class NoteCounts:
    """Counted for metrics."""

    def __init__(self) -> None:
        self.sent = self.read = 0
        self.refused = 0  # by the engine
        self.broken = 0  # that are no notes, or of an unknown kind
        self.repeated = 0
        self.unanswered = 0


class _Inbox:
    """This member's inbox on a server."""

    def __init__(self, shard: NoteShard) -> None:
        self.shard = shard
        self.is_reading = False
        self.reads_again = False
        self.read_at = 0.0
        self.last_numbers: dict[str, int] = {}  # by sender


class _Question(NamedTuple):
    """A question without an answer yet."""

    member: str
    over: Callable[[bytes | None], None]
    due_at: float


class Notes:
    """This member's inboxes, and its notes to other members."""

    def __init__(
        self, shards: Sequence[NoteShard], keys: CopyKeys, member: str, *, guard: Guard, time: Callable[[], float]
    ) -> None:
        self._keys = keys
        self._member = member
        self._guard = guard
        self._time = time
        self._inboxes = [_Inbox(shard) for shard in shards]
        self._takers: dict[NoteKind, Callable[[ClusterNote], None]] = {NoteKind.ANSWER: self._answered}
        self._number = 0
        self._questions: dict[int, _Question] = {}
        self.counts = NoteCounts()

    def on(self, kind: NoteKind, take: Callable[[ClusterNote], None]) -> None:
        """Notes of this kind go to `take`, which may raise ValueError for a body that isn't one of the kind's."""
        assert kind not in self._takers
        self._takers[kind] = take

    # -- life

    def start(self) -> None:
        """Listen to the calls that wake this member."""
        for inbox in self._inboxes:
            wake = lambda inbox=inbox: self._read(inbox)  # noqa: E731
            receiver = ChannelReceiver(wake, lambda text, wake=wake: wake())  # type: ignore[misc]
            inbox.shard.channels.subscribe(self._keys.inbox_channel(self._member), receiver)

    def stop(self) -> None:
        """Read no more, and answer all questions with None."""
        for inbox in self._inboxes:
            inbox.shard.channels.unsubscribe(self._keys.inbox_channel(self._member))
        for number in tuple(self._questions):
            self._end(number, None)

    def tick(self, now: float) -> None:
        """Read what no call has told of, and give up old questions; the sweep calls it four times a second."""
        for inbox in self._inboxes:
            if now >= inbox.read_at:
                self._read(inbox)
        for number in [number for number, question in self._questions.items() if now >= question.due_at]:
            self._end(number, None)

    # -- sending

    def tell(self, shard: NoteShard, member: str, kind: NoteKind, body: bytes = b"") -> bool:
        """Send a note. False: the engine can't be asked now. `body` has at most NOTE_BYTES_MAX."""
        return self._send(shard, member, kind, body, lambda: None)

    def ask(
        self,
        shard: NoteShard,
        member: str,
        kind: NoteKind,
        body: bytes,
        over: Callable[[bytes | None], None],
        *,
        within_s: float = ANSWER_S,
    ) -> bool:
        """Send a question. `over` hears the answer in a later turn, or None if there is none in time. False: the engine
        can't be asked now, and `over` hears nothing.
        """
        if len(self._questions) >= QUESTIONS_MAX:
            return False
        number = self._number + 1
        if not self._send(shard, member, kind, body, lambda: self._end(number, None)):
            return False
        self._questions[number] = _Question(member, over, self._time() + within_s)
        return True

    def answer(self, note: ClusterNote, body: bytes = b"") -> bool:
        """Answer a question. False: the engine can't be asked now, so the asker hears of no answer."""
        return self._send(note.shard, note.sender, NoteKind.ANSWER, body, lambda: None, about=note.number)

    def _send(
        self,
        shard: NoteShard,
        member: str,
        kind: NoteKind,
        body: bytes,
        on_refused: Callable[[], None],
        *,
        about: int = 0,
    ) -> bool:
        assert len(body) <= NOTE_BYTES_MAX
        link = shard.link
        if not link.has_room:
            return False
        self._number += 1

        def sent(reply: Reply) -> None:
            if isinstance(reply, EngineError):
                self.counts.refused += 1
                on_refused()

        inbox, most = self._keys.inbox(member), SMALL_MAX if len(body) <= SMALL_BYTES_MAX else LARGE_MAX
        fields = ("k", kind.value, "w", self._member, "n", self._number, "a", about, "b", body)
        link.ask(packed("XADD", inbox, "MAXLEN", most, "*", *fields), sent)
        link.ask(packed("PEXPIRE", inbox, INBOX_TTL_S * 1000), _ignore)
        link.ask(packed("PUBLISH", self._keys.inbox_channel(member), b""), _ignore)
        self.counts.sent += 1
        return True

    def _answered(self, note: ClusterNote) -> None:
        question = self._questions.get(note.about)
        if question is not None and question.member == note.sender:
            self._end(note.about, note.body)

    def _end(self, number: int, answer: bytes | None) -> None:
        question = self._questions.pop(number, None)
        if question is not None:
            self.counts.unanswered += answer is None
            with self._guard:
                question.over(answer)

    # -- reading

    def _read(self, inbox: _Inbox) -> None:
        if inbox.is_reading:
            inbox.reads_again = True
        elif inbox.shard.link.has_room:
            inbox.read_at = self._time() + READ_EVERY_S
            inbox.is_reading, inbox.reads_again = True, False
            command = packed("XRANGE", self._keys.inbox(self._member), "-", "+", "COUNT", READ_NOTES)
            inbox.shard.link.ask(command, lambda reply: self._entries(inbox, reply))

    def _entries(self, inbox: _Inbox, reply: Reply) -> None:
        inbox.is_reading = False
        if not isinstance(reply, list) or isinstance(reply, EngineError):
            return  # tick() reads again
        ids = [each[0] for each in reply if isinstance(each, list) and each and isinstance(each[0], bytes)]
        if ids:
            inbox.shard.link.ask(packed("XDEL", self._keys.inbox(self._member), *ids), _ignore)
        for each in reply:
            with self._guard:
                self._take(inbox, each)
        if inbox.reads_again or len(reply) == READ_NOTES:
            self._read(inbox)

    def _take(self, inbox: _Inbox, entry: Any) -> None:
        try:
            note = parse(entry, inbox.shard)
            if note.number <= inbox.last_numbers.get(note.sender, 0):
                self.counts.repeated += 1
                return
            inbox.last_numbers[note.sender] = note.number
            if len(inbox.last_numbers) > SENDERS_MAX:
                del inbox.last_numbers[next(iter(inbox.last_numbers))]
            self.counts.read += 1
            self._takers[note.kind](note)
        except ValueError:
            self.counts.broken += 1


def parse(entry: Any, shard: NoteShard) -> ClusterNote:
    """A note as XRANGE returns it. Raises ValueError for anything else."""
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], list) or len(entry[1]) != 10:
        raise ValueError("an entry that is no note")
    names, values = entry[1][::2], entry[1][1::2]
    if names != [b"k", b"w", b"n", b"a", b"b"] or not all(isinstance(value, bytes) for value in values):
        raise ValueError("an entry with other fields than a note's")
    kind, sender, number, about, body = values
    if kind not in _KINDS:
        raise ValueError("a note of a kind that this version doesn't know")
    if not _is_member(sender) or not _is_number(number) or not _is_number(about) or len(body) > NOTE_BYTES_MAX:
        raise ValueError("a note with a value that no member sends")
    return ClusterNote(_KINDS[kind], sender.decode(), int(number), int(about), body, shard)


def _ignore(reply: Reply) -> None:
    """The reply to a command that needs none."""
