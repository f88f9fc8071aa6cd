"""Streams and their readers as records: a live stream with its log goes on in another process of the same machine.

Times are monotonic: on the same boot both processes read the same clock. Not in a record, because the new process has
or makes it: the source and the readers (records of their own), the dispatcher of many readers, the key's account, the
price of the log, and templates that streams share. A stream that follows another node's isn't handed over this way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from streamd.core.hub import Hub, StreamNames
from streamd.core.limits import Account
from streamd.core.log_record import TEMPLATES_MAX
from streamd.core.replay import LogParts, ReplayLog, check_parts
from streamd.core.stream import CountedStream, Form, ReaderPlace, Stream
from streamd.core.terms import Terms
from streamd.core.write_interval import INTERVAL_S_MAX, WriteInterval
from streamd.handover.record import RecordKind
from streamd.handover.values import Bytes, Flag, Many, Maybe, RecordError, Seconds, Text, TupleOf, WholeNumber, Word
from streamd.handover.wire_kinds import HELD_BYTES_MAX, PROGRESS
from streamd.policy import Policy
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect
from streamd.wire.dialects.api import ProgressState
from streamd.wire.event_id import valid_name, valid_stream_id
from streamd.wire.template import TEMPLATE_BYTES_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamState:
    """A stream between two events. The members are those of Stream, Terms, the log and the ledger."""

    # identity
    id: str
    epoch: str
    dialect: Dialect
    upstream: str
    names: StreamNames
    # rules
    owner: str
    pays_tokens: bool
    name_public: bool
    published: bool
    model: str
    policy: Policy
    catchup_bytes_max: int
    detach_grace_s: float
    resume_grace_s: float
    retention_s: float
    write_interval_s: float
    write_adaptive: bool
    # events
    log: LogParts
    log_bytes_max: int
    log_events_max: int
    progress: ProgressState
    frame_bytes: int
    touched_at: float
    first_event_at: float
    first_token_at: float
    longest_gap_s: float
    marks: tuple[tuple[int, int], ...]  # of a stream whose readers count bytes; () of any other
    event_bytes: int
    # life
    drops: int
    opened_at: float
    grace_until: float  # 0: no grace is under way
    reason: CloseReason | None
    ended_clean: bool
    sealed_at: float


_NAME: Final = Text(256)
_HEADER: Final = Text(256, lambda text: text.isascii() and (not text or text.isprintable()))  # X-Upstream
_COUNT: Final = WholeNumber()

LOG: Final = RecordKind(
    "log",
    LogParts,
    {
        "seq_first": WholeNumber(1),
        "seq_next": WholeNumber(1),
        "text_events": _COUNT,
        "text_bytes": _COUNT,
        "templates": Many(TupleOf(Many(Bytes(TEMPLATE_BYTES_MAX)), Bytes(TEMPLATE_BYTES_MAX), Flag()), TEMPLATES_MAX),
        "segments": Many(Bytes(HELD_BYTES_MAX)),
    },
)
"""A replay log, as ReplayLog.parts() tells it."""

STREAM: Final = RecordKind(
    "stream",
    StreamState,
    {
        "id": Text(256, lambda text: valid_stream_id(text.encode()) or valid_name(text.encode())),
        "epoch": Text(6),
        "dialect": Word(Dialect),
        "upstream": _HEADER,
        "names": RecordKind(
            "names",
            StreamNames,
            {"principal": _NAME, "key": _NAME, "body_hash": Bytes(64), "conversation": Text(4096)},
        ),
        "owner": _NAME,
        "pays_tokens": Flag(),
        "name_public": Flag(),
        "published": Flag(),
        "model": _NAME,
        "policy": Word(Policy),
        "catchup_bytes_max": WholeNumber(1),
        "detach_grace_s": Seconds(),
        "resume_grace_s": Seconds(),
        "retention_s": Seconds(),
        "write_interval_s": Seconds(),
        "write_adaptive": Flag(),
        "log": LOG,
        "log_bytes_max": WholeNumber(1),
        "log_events_max": WholeNumber(1),
        "progress": PROGRESS,
        "frame_bytes": _COUNT,
        "touched_at": Seconds(),
        "first_event_at": Seconds(),
        "first_token_at": Seconds(),
        "longest_gap_s": Seconds(),
        "marks": Many(TupleOf(WholeNumber(1), _COUNT)),
        "event_bytes": _COUNT,
        "drops": _COUNT,
        "opened_at": Seconds(),
        "grace_until": Seconds(),
        "reason": Maybe(Word(CloseReason, "word")),
        "ended_clean": Flag(),
        "sealed_at": Seconds(),
    },
)
"""A stream with its log, without its readers."""

READER: Final = RecordKind(
    "reader",
    ReaderPlace,
    {
        "policy": Word(Policy),
        "form": Word(Form),
        "position": WholeNumber(1),
        "seq_start": WholeNumber(1),
        "dropped": _COUNT,
        "gap_from": _COUNT,
        "bytes_written": _COUNT,
    },
)
"""A reader of a stream."""


def stream_state(hub: Hub, stream: Stream) -> StreamState:
    """The state of a stream of this hub. Settles its accounts first, so that each event is counted in one process.

    Raises RecordError for a stream that follows another node's.
    """
    terms, log, ledger = stream.terms, stream.log, stream.ledger
    if terms.is_copy:
        raise RecordError(f"stream {stream.id} follows another node's")
    hub.charge(stream)
    return StreamState(
        id=stream.id,
        epoch=stream.epoch,
        dialect=stream.dialect,
        upstream=stream.upstream,
        names=hub.name_of(stream),
        owner=terms.owner,
        pays_tokens=terms.pays_tokens,
        name_public=terms.name_public,
        published=terms.published,
        model=terms.model,
        policy=terms.policy,
        catchup_bytes_max=terms.catchup_bytes_max,
        detach_grace_s=terms.detach_grace_s,
        resume_grace_s=terms.resume_grace_s,
        retention_s=terms.retention_s,
        write_interval_s=terms.write_interval.least_s,
        write_adaptive=terms.write_interval.adaptive,
        log=log.parts(),
        log_bytes_max=log.bytes_max,
        log_events_max=log.events_max,
        progress=stream.progress.state(),
        frame_bytes=stream.frame_bytes,
        touched_at=stream.touched_at,
        first_event_at=stream.first_event_at,
        first_token_at=ledger.first_token_at,
        longest_gap_s=ledger.longest_gap_s,
        marks=stream.marks() if isinstance(stream, CountedStream) else (),
        event_bytes=stream.event_bytes if isinstance(stream, CountedStream) else 0,
        drops=stream.drops,
        opened_at=stream.opened_at,
        grace_until=stream.grace_until,
        reason=stream.reason,
        ended_clean=stream.ended_clean,
        sealed_at=stream.sealed_at,
    )


def land_stream(hub: Hub, state: StreamState, account: Account | None = None) -> Stream:
    """Register the stream with this hub; `account`: of the owner's key, which has counted the stream already.

    It comes without source and readers. Raises ValueError, with nothing registered, for a state that no stream has, and
    for an id that is registered already.
    """
    _check(state)
    log = ReplayLog.of_parts(state.log, bytes_max=state.log_bytes_max, events_max=state.log_events_max)
    kind = CountedStream if state.marks else Stream
    trial = kind(state.id, log, state.dialect, now=state.opened_at, keeper=hub, terms=_terms_of(state, account))
    trial.progress.go_on_from(state.progress)
    if isinstance(trial, CountedStream):
        trial.take_marks(state.marks, state.event_bytes)
    stream = hub.restore(state.id, log, state.dialect, state.opened_at, kind=kind, terms=trial.terms, epoch=state.epoch)
    if stream is None:
        raise RecordError(f"stream {state.id} is here already")
    _go_on(stream, state)
    hub.restore_names(stream, state.names)
    if state.grace_until:
        hub.restore_grace(stream, state.grace_until)
    return stream


def _go_on(stream: Stream, state: StreamState) -> None:
    stream.progress.go_on_from(state.progress)
    if isinstance(stream, CountedStream):
        stream.take_marks(state.marks, state.event_bytes)
    stream.upstream = state.upstream
    stream.frame_bytes = stream.ledger.counted_bytes = state.frame_bytes
    stream.touched_at, stream.first_event_at = state.touched_at, state.first_event_at
    stream.ledger.first_token_at, stream.ledger.longest_gap_s = state.first_token_at, state.longest_gap_s
    stream.drops = state.drops
    stream.reason, stream.ended_clean, stream.sealed_at = state.reason, state.ended_clean, state.sealed_at


def _terms_of(state: StreamState, account: Account | None) -> Terms:
    return Terms(
        owner=state.owner,
        account=account,
        pays_tokens=state.pays_tokens,
        name_public=state.name_public,
        published=state.published,
        model=state.model,
        policy=state.policy,
        catchup_bytes_max=state.catchup_bytes_max,
        detach_grace_s=state.detach_grace_s,
        resume_grace_s=state.resume_grace_s,
        retention_s=state.retention_s,
        write_interval=WriteInterval(state.write_interval_s, state.write_adaptive),
    )


def _check(state: StreamState) -> None:
    check_parts(state.log)
    times = (state.detach_grace_s, state.resume_grace_s, state.retention_s, state.longest_gap_s, state.grace_until)
    right = (
        (len(state.epoch) == 6 and valid_name(state.id.encode())) or not state.epoch,
        min(times) >= 0,
        0 <= state.write_interval_s <= INTERVAL_S_MAX,
        state.reason is None or not state.grace_until,
        state.reason is not None or not state.ended_clean,
        not state.names.conversation or state.marks,
        state.marks or not state.event_bytes,
    )
    if not all(right):
        raise RecordError(f"the facts of stream {state.id} contradict each other")
