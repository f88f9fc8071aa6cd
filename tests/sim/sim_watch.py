"""The simulation's view into the code under test: counted situations, and rules that hold at a certain moment.

A simulator proves nothing about a situation that it never reaches. So each run counts those in SITUATIONS, and a search
fails when a count stayed at zero. The counting wraps methods of the code under test for the time of a run; none of the
wrapped methods is on the way of a token to a reader that keeps up.

Rules that hold only at a certain moment are checked here too: a ring is full when a policy acts, a grace has the
promised length, a stream ends for the reason that its upstream gave. Rules about lasting state are in sim_checks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sim_loop import Violation, must
from sim_transport import Transport

from streamd.api.publish import Publishing
from streamd.core import replay
from streamd.core.fanout import SlicedFanout
from streamd.core.hub import Hub
from streamd.core.replay import ReplayLog
from streamd.core.stream import Policy, Stream, Subscriber, SubscriberState
from streamd.core.write_interval import WriteInterval
from streamd.net import client as net_client
from streamd.net import outlet
from streamd.net import turns as net_turns
from streamd.net import upstream as net_upstream
from streamd.net.answer import Answer
from streamd.net.exchange import Exchange
from streamd.net.pacing import Pacing
from streamd.net.read_batch import ReadBatch
from streamd.net.reading import PACE, TURN
from streamd.net.turns import STEP_LINES_MAX, TakesTurns, Turns
from streamd.net.upstream import UpstreamConnection
from streamd.reasons import By, CloseReason
from streamd.wire.answer_fields import is_event_stream
from streamd.wire.http1 import ResponseHead

if TYPE_CHECKING:
    from sim_script import Script
    from sim_world import World

SITUATIONS = (
    # slow readers
    *(f"the ring is full under {policy.value}" for policy in Policy),
    *(f"a pass has lost a paused reader's frames under {policy.value}" for policy in Policy),
    *(f"a gap is announced under {policy.value}" for policy in Policy),
    "a reader is full again at once when it resumes",
    "a reader resumes between two passes and lacks events",
    # fan-out
    "an event arrives during a pass",
    "a live reader lags behind a pass",
    "the stream is sealed during a pass",
    "a stream switches to passes",
    "a stream switches back to direct writes",
    # coalescing
    "texts of several choices are coalesced",
    "events kept whole are coalesced",
    "a reader of data lines gets texts merged",
    # reads
    "a read holds several events",
    "several upstreams are read in one turn",
    "a client's bytes wait for a turn",
    "an upstream's bytes wait for a turn",
    *(f"an upstream rests after a read, for {cause}" for cause in ("the load", "its terms")),
    "an upstream rests on, read past its transport",
    "a turn has no pieces left",
    # the log
    "the log drops its oldest segment",
    "logs over budget: finished streams are removed",
    "logs over budget: live logs are halved",
    "too many finished streams are kept: the oldest are removed",
    # graces
    "a detach grace is granted",
    "a resume grace is granted",
    "a grace is refused, too many are detached",
    "a reader comes back within the grace",
    # farewells
    "a farewell",
    "a farewell with an unannounced gap",
    "a farewell to a paused reader",
    # answers
    "an answer ends with some choices unfinished",
    "an answer ends with all choices finished and no terminal",
    "an answer is complete before its framing ends",
    "a request with an Idempotency-Key joins a generation",
    # how readers end
    *(
        f"a reader ends: {reason.word}"
        for reason in (
            CloseReason.COMPLETE,
            CloseReason.READER_GONE,
            CloseReason.NETWORK_LOST,
            CloseReason.SLOW_CONSUMER,
            CloseReason.STALLED,
            CloseReason.TOKEN_EXPIRED,
            CloseReason.PIPELINE_FULL,
        )
    ),
    # how streams end
    *(
        f"a stream ends: {reason.word}"
        for reason in (
            CloseReason.COMPLETE,
            CloseReason.SEALED,
            CloseReason.READER_GONE,
            CloseReason.ABANDONED,
            CloseReason.CANCELLED,
            CloseReason.PUBLISHER_GONE,
            CloseReason.UPSTREAM_CONNECT,
            CloseReason.UPSTREAM_RESET,
            CloseReason.UPSTREAM_PROTOCOL,
            CloseReason.UPSTREAM_TTFT_TIMEOUT,
            CloseReason.UPSTREAM_IDLE_TIMEOUT,
            CloseReason.UPSTREAM_STREAM_TIMEOUT,
            CloseReason.UPSTREAM_TRUNCATED,
            CloseReason.UPSTREAM_REFUSED,
            CloseReason.EVENT_TOO_LARGE,
        )
    ),
)

# Reasons that blame the upstream for an answer that broke off.
BROKEN_ANSWERS = (CloseReason.UPSTREAM_TRUNCATED, CloseReason.UPSTREAM_PROTOCOL, CloseReason.UPSTREAM_RESET)

ROUNDING_S = 1e-6
FROZEN_S_MAX = 0.5  # for which moves may put off a check

# Pieces of a connection's turn, by the seed of the run: the real bound is reached by few reads of a small world.
TURN_SIZES = (4, 16, 256)


class Watch:
    """The wrapped methods of a run; `remove()` puts the originals back."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.seen = world.seen
        self._originals: list[tuple[Any, str, Any]] = []
        self._grace_until: dict[str, float] = {}
        self._around(Subscriber, "_hold", self._hold)
        self._around(Subscriber, "frames_gone", self._frames_gone)
        self._around(Subscriber, "lag", self._lag)
        self._around(Subscriber, "resume", self._resume)
        self._around(Subscriber, "_gap_frame", self._gap_frame)
        self._around(Subscriber, "farewell", self._farewell)
        self._around(SlicedFanout, "add", self._fanout_add)
        self._around(SlicedFanout, "flush", self._fanout_flush)
        self._around(Stream, "append_all", self._append_all)
        self._around(UpstreamConnection, "take_opening", self._take_opening)
        self._around(Exchange, "_open_unasked", self._open_unasked)
        self._around(Stream, "use_fanout", self._use_fanout)
        self._around(Stream, "maybe_direct", self._maybe_direct)
        self._around(replay._Coalescing, "_take_whole", self._take_whole)
        self._around(replay._Coalescing, "_merged_texts", self._merged_texts)
        self._around(ReplayLog, "_drop", self._drop)
        self._around(Hub, "leave", self._leave)
        self._around(Hub, "orphan", self._orphan)
        self._around(Hub, "rejoin", self._rejoin)
        self._around(Hub, "free_log_memory", self._free_log_memory)
        self._around(Hub, "free_kept", self._free_kept)
        self._around(Hub, "by_key", self._by_key)
        self._around(Answer, "slow_consumer", self._slow_consumer)
        self._around(ReadBatch, "_end", self._read_batch_end)
        self._around(Publishing, "body_piece", self._body_piece)
        self._turn_pieces = 0  # events appended in this turn
        for owner in (net_client, net_upstream, net_turns):
            self._replace(owner, "CONNECTION_PIECES_MAX", TURN_SIZES[world.seed % len(TURN_SIZES)])
        self._replace(net_turns, "TURN_PIECES_MAX", 4 * net_turns.CONNECTION_PIECES_MAX)
        self._around(Stream, "append_pieces", self._append_pieces)
        self._around(Turns, "_begin", self._begin_turn)
        self._around(TakesTurns, "wait_for_turn", self._wait_for_turn)
        self._around(Pacing, "rest", self._rest)
        self._replace(net_upstream, "read_past", Transport.read_past)
        self._replace(outlet, "outstanding", lambda transport: len(transport.buffer) + len(transport.kernel))

    def _around(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        original, failed = getattr(owner, name), self.world.loop.failed
        self._originals.append((owner, name, original))

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            try:
                return wrapper(original, *args, **kwargs)
            except Violation as violation:
                failed.append(violation)  # the code under test may catch it
                raise

        setattr(owner, name, wrapped)

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._originals.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def remove(self) -> None:
        for owner, name, original in reversed(self._originals):
            setattr(owner, name, original)
        self._originals.clear()

    # -- the source

    def _take_opening(self, original: Any, link: UpstreamConnection, head: ResponseHead, *coding: Any) -> None:
        """The relay may read the head of a stream in a later turn than that in which its server sent it all."""
        original(link, head, *coding)
        peer: Any = getattr(link.transport, "owner", None)
        if is_event_stream(head.get(b"content-type")) and peer is not None and peer.newest is not None:
            stream = getattr(link._asker, "stream", None)
            if stream is not None:
                self.world.stream_has(stream, peer.newest)

    def _open_unasked(self, original: Any, exchange: Exchange, **kwargs: Any) -> bool:
        """In no known dialect the first event opens the stream."""
        is_open = bool(original(exchange, **kwargs))
        link = exchange._attempt.link if exchange._attempt is not None else None
        peer: Any = getattr(link.transport, "owner", None) if link is not None else None
        if exchange.stream is not None and peer is not None and peer.newest is not None:
            self.world.stream_has(exchange.stream, peer.newest)
        return is_open

    def _body_piece(self, original: Any, publishing: Publishing, piece: bytes) -> int:
        """Published lines are read, in the order of their reads: several requests may publish to a stream."""
        self.world.read_lines(publishing._answer.request.id, publishing._publisher.stream, piece.count(b"\n"))
        spent: int = original(publishing, piece)
        return spent

    # -- slow readers

    def _hold(self, original: Any, reader: Subscriber, frame: bytes) -> None:
        ring = reader.ring
        held, size, position = ring.held, len(frame), reader.own_position
        fits = not held or (held < ring.slots and ring.bytes_held + size <= ring.bytes_max)
        original(reader, frame)
        if fits:
            must(
                reader.state is SubscriberState.PAUSED and ring.held == held + 1,
                "a frame that fits is not held",
                ring.held,
                held,
            )
            return
        self.seen[f"the ring is full under {reader.policy.value}"] += 1
        if reader.policy is Policy.DROP_OLDEST:
            dropped = reader.own_position - position
            must(reader.state is SubscriberState.PAUSED and dropped >= 1, "nothing was dropped", reader.state, dropped)
            must(
                ring.held == held + 1 - dropped, "the ring does not count the dropped frames", held, dropped, ring.held
            )
        else:
            wanted = SubscriberState.BEHIND if reader.policy is Policy.COALESCE else SubscriberState.ENDED
            must(reader.state is wanted, "a full ring met the wrong policy", reader.policy, reader.state)

    def _frames_gone(self, original: Any, reader: Subscriber, first: int) -> None:
        end = reader.own_position + reader.ring.held
        must(reader.state is SubscriberState.PAUSED and first > end, "present frames are called lost", first, end)
        original(reader, first)
        self.seen[f"a pass has lost a paused reader's frames under {reader.policy.value}"] += 1
        wanted = {
            Policy.COALESCE: SubscriberState.BEHIND,
            Policy.DROP_OLDEST: SubscriberState.PAUSED,
            Policy.CLOSE: SubscriberState.ENDED,
        }
        must(reader.state is wanted[reader.policy], "lost frames met the wrong policy", reader.policy, reader.state)

    def _lag(self, original: Any, reader: Subscriber) -> None:
        if reader.stream.fanout is not None and reader.stream.fanout.running:
            self.seen["a live reader lags behind a pass"] += 1
        original(reader)

    def _resume(self, original: Any, reader: Subscriber) -> None:
        was = reader.state
        if was is SubscriberState.PAUSED and reader.own_position + reader.ring.held < reader.stream.log.seq_next:
            self.seen["a reader resumes between two passes and lacks events"] += 1
        original(reader)
        if was is SubscriberState.PAUSED and reader.state is SubscriberState.PAUSED:
            self.seen["a reader is full again at once when it resumes"] += 1

    def _gap_frame(self, original: Any, reader: Subscriber) -> Any:
        frame = original(reader)
        if frame:
            self.seen[f"a gap is announced under {reader.policy.value}"] += 1
        return frame

    def _farewell(self, original: Any, reader: Subscriber, **kwargs: Any) -> None:
        if reader.state is not SubscriberState.ENDED:
            self.seen["a farewell"] += 1
            self.seen["a farewell with an unannounced gap"] += bool(reader._gap_from)
            self.seen["a farewell to a paused reader"] += reader.state in (
                SubscriberState.PAUSED,
                SubscriberState.BEHIND,
            )
        original(reader, **kwargs)

    def _slow_consumer(self, original: Any, answer: Answer) -> None:
        reader = answer.reader
        must(reader is not None and reader.policy is Policy.CLOSE, "a slow reader is closed against its policy")
        original(answer)

    # -- fan-out

    def _fanout_add(self, original: Any, fanout: SlicedFanout, seq: int, frame: bytes) -> None:
        if fanout._readers and fanout._at:
            self.seen["an event arrives during a pass"] += 1
        original(fanout, seq, frame)

    def _fanout_flush(self, original: Any, fanout: SlicedFanout) -> None:
        if fanout._readers and fanout._at:
            self.seen["the stream is sealed during a pass"] += 1
        original(fanout)

    def _use_fanout(self, original: Any, stream: Stream, fanout: Any) -> None:
        self.seen["a stream switches to passes"] += 1
        original(stream, fanout)

    def _maybe_direct(self, original: Any, stream: Stream) -> None:
        was = stream.direct
        original(stream)
        self.seen["a stream switches back to direct writes"] += stream.direct and not was

    # -- turns

    def _append_pieces(self, original: Any, stream: Stream, pieces: list[bytes], now: float) -> None:
        self._turn_pieces += len(pieces)
        # A read of a connection is a step at most, and each connection may have had a single read in a turn.
        most = net_turns.TURN_PIECES_MAX + net_turns.CONNECTION_PIECES_MAX + 2 * STEP_LINES_MAX
        must(self._turn_pieces <= most, "a turn holds the loop", self._turn_pieces, most)
        original(stream, pieces, now)

    def _begin_turn(self, original: Any, turns: Turns) -> None:
        self.seen["a turn has no pieces left"] += turns.left <= 0
        self._turn_pieces = 0
        original(turns)

    def _wait_for_turn(self, original: Any, connection: Any) -> None:
        side = "a client" if isinstance(connection, net_client.ClientConnection) else "an upstream"
        self.seen[f"{side}'s bytes wait for a turn"] += 1
        original(connection)
        transport = connection.transport
        is_over = transport.closing or transport.gone or transport.lost or transport.eof_received
        must(connection.pauses & TURN and (is_over or not transport.reading), "a connection that waits is read")

    def _rest(self, original: Any, pacing: Pacing, connection: Any, interval: WriteInterval, *times: float) -> bool:
        was = connection.pauses
        rests: bool = original(pacing, connection, interval, *times)
        must(not was & ~PACE, "an upstream that is silent already is paced", was)
        must(rests == (connection.pauses == PACE) or was, "a rest that isn't one", connection.pauses)
        cause = "the load" if pacing.adaptive.seconds > interval.least_s else "its terms"
        self.seen[f"an upstream rests after a read, for {cause}"] += rests
        self.seen["an upstream rests on, read past its transport"] += rests and bool(was)
        return rests

    # -- reads and coalescing

    def _append_all(self, original: Any, stream: Stream, events: list[bytes], now: float) -> None:
        self.seen["a read holds several events"] += len(events) > 1
        original(stream, events, now)

    def _read_batch_end(self, original: Any, turn: ReadBatch) -> None:
        self.seen["several upstreams are read in one turn"] += len(turn._readings) > 1
        original(turn)

    def _take_whole(self, original: Any, reading: Any, event: bytes, end: int) -> None:
        gathered = reading._delta is not None
        original(reading, event, end)
        self.seen["events kept whole are coalesced"] += gathered and reading._delta is not None and not reading._event

    def _merged_texts(self, original: Any, reading: Any) -> Any:
        self.seen["texts of several choices are coalesced"] += len(reading._texts) > 1
        return original(reading)

    # -- the log

    def _drop(self, original: Any, log: ReplayLog, bytes_max: int, events_max: int, **options: bool) -> None:
        segments, base = list(log._segments or ()), log._base
        original(log, bytes_max, events_max, **options)
        dropped = log._base - base
        if not dropped:
            return
        self.seen["the log drops its oldest segment"] += 1
        last = segments[dropped - 1]
        needed = log.bytes_held + replay._held(last) > bytes_max or log.seq_next - replay._first(last) > events_max
        must(needed, "a segment was dropped that had room", log.bytes_held, bytes_max, log.seq_next, events_max)

    def _free_log_memory(self, original: Any, hub: Hub) -> None:
        streams, before = len(hub), {stream.id: stream.log.seq_first for stream in hub}
        self.world.relieving = True
        try:
            original(hub)
        finally:
            self.world.relieving = False
        self.seen["logs over budget: finished streams are removed"] += len(hub) < streams
        trimmed = any(stream.log.seq_first > before[stream.id] for stream in hub)
        self.seen["logs over budget: live logs are halved"] += trimmed
        may_free = any(stream.log.seq_next > stream.log.seq_first for stream in hub)
        freed = trimmed or len(hub) < streams
        must(freed or not may_free or hub.log_bytes <= hub.log_bytes_max, "logs over budget are kept", hub.log_bytes)

    def _free_kept(self, original: Any, hub: Hub) -> None:
        streams, finished = len(hub), [stream for stream in hub if stream.reason is not None]
        self.world.relieving = True
        try:
            original(hub)
        finally:
            self.world.relieving = False
        removed = streams - len(hub)
        self.seen["too many finished streams are kept: the oldest are removed"] += removed > 0
        excess = len(finished) - hub.kept_max
        must(
            removed <= max(0, excess) + hub.kept_max // 8, "finished streams are removed that had room", removed, excess
        )
        left = [stream for stream in hub if stream.reason is not None and not stream.readers]
        must(removed >= excess or not left, "more finished streams are kept than the bound", len(left), hub.kept_max)

    # -- graces

    def _leave(self, original: Any, hub: Hub, reader: Subscriber, reason: CloseReason, now: float) -> None:
        self._check_who_left(reader.sink._carrier.transport, reason, reader)  # type: ignore[attr-defined]
        original(hub, reader, reason, now)
        self.world.reader_left(reader.stream)

    def _check_who_left(self, transport: Any, reason: CloseReason, reader: Subscriber) -> None:
        """The network's record decides whether the reader left, was lost, or was sent away."""
        stream = reader.stream
        if reason is CloseReason.COMPLETE:
            if stream.reason is None or not stream.ended_clean:
                whole = reader.position == stream.log.seq_next and not transport.buffer
                must(whole, "a reader without the rest of its answer counts as complete", reader.position)
            return
        if reason is stream.reason:  # the stream's own end, which its readers share
            return
        by, left = reason.by, transport.eof_received or (transport.gone and not transport.timed_out)
        must(by is not By.READER or left, "a present reader counts as gone", reason)
        must(by is not By.NETWORK or transport.timed_out, "a reader that wasn't lost counts as lost", reason)
        half_closed = transport.eof_received and stream.reason is None  # a sealed stream's rest is still written
        must(by is not By.STREAMD or not half_closed, "a reader that left counts as sent away", reason)

    def _orphan(self, original: Any, hub: Hub, stream: Stream, grace_s: float, reason: CloseReason, now: float) -> None:
        wanted_s = self._grace_wanted_s(stream, reason)
        room = hub.detached - bool(stream.grace_until) < hub.detached_max
        original(hub, stream, grace_s, reason, now)
        if wanted_s <= 0 or not room:
            self.seen["a grace is refused, too many are detached"] += wanted_s > 0
            must(not stream.grace_until and stream.source is None, "a forbidden grace is granted", stream.id)
            return
        kind = "resume" if reason.by is not By.READER else "detach"
        self.seen[f"a {kind} grace is granted"] += 1
        given_s = stream.grace_until - now
        must(abs(given_s - wanted_s) < ROUNDING_S, "a grace of another length", stream.id, given_s, wanted_s, reason)
        self._grace_until[stream.id] = stream.grace_until

    def _grace_wanted_s(self, stream: Stream, reason: CloseReason) -> float:
        """The grace by docs/PROTOCOL.md, section 4: it depends on which side closed the connection."""
        settings = self.world.settings
        errand = self.world.errand_of(stream)
        wish_s = None if errand is None else errand.detach_grace_s
        detach_s = settings.detach_grace_s if wish_s is None else min(wish_s, settings.detach_grace_max_s)
        return detach_s if reason.by is By.READER else max(detach_s, settings.resume_grace_s)

    def _rejoin(self, original: Any, hub: Hub, stream: Stream, reader: Subscriber) -> None:
        if stream.grace_until:
            self.seen["a reader comes back within the grace"] += 1
            self._grace_until.pop(stream.id, None)
        original(hub, stream, reader)

    def _by_key(self, original: Any, hub: Hub, principal: str, key: str) -> Any:
        kept = original(hub, principal, key)
        if kept is not None and kept.stream is not None:
            self.seen["a request with an Idempotency-Key joins a generation"] += 1
        return kept

    # -- ends

    def request_ended(self, answer: Any) -> None:
        """A request is over, for its reason."""
        request, reader, transport = answer.request, answer.reader, answer._carrier.transport
        reason, now, settings = request.reason, self.world.loop.time(), self.world.settings
        if reader is not None and reader.stream.reason is reason is not CloseReason.COMPLETE:
            return  # the stream's own end, which its readers share
        if reader is not None or reason is CloseReason.PIPELINE_FULL:
            self.seen[f"a reader ends: {reason.word}"] += 1
        if reason is CloseReason.STALLED and reader is not None:
            # It is checked four times within the limit: bytes taken before the first check aren't noticed.
            silent_s, least_s = now - transport.taken_at, settings.stall_timeout_s * 3 / 4 - ROUNDING_S
            least_s -= FROZEN_S_MAX if self.world.mover is not None else 0.0  # the first check may be late
            slept = self.world.jumped_at > transport.taken_at - self.world.jumped_s  # checks were missed
            must(silent_s >= least_s or slept, "a reader that took bytes counts as stalled", silent_s)
        elif reason is CloseReason.TOKEN_EXPIRED:
            must(now >= request.expires_at, "a reader's right to read ended early")
        elif reason is CloseReason.HEAD_TIMEOUT:
            waited_s = now - max(transport.opened_at, transport.peer.errand.asked_at)
            must(waited_s >= settings.head_timeout_s - ROUNDING_S, "a head had less than its time", waited_s)

    def stream_sealed(self, stream: Stream, script: Script | None) -> None:
        """A stream has ended, for the reason that its upstream, its readers or its limits gave."""
        reason, now, settings = stream.reason, self.world.loop.time(), self.world.settings
        assert reason is not None
        self.seen[f"a stream ends: {reason.word}"] += 1
        if reason is CloseReason.ABANDONED:
            until = self._grace_until.pop(stream.id, None)
            must(
                until is not None and now >= until - ROUNDING_S, "a grace ended before its time", stream.id, until, now
            )
        if script is None or stream.terms.published:
            return
        if (script.read_whole and script.complete) or script.said_terminal:
            must(reason not in BROKEN_ANSWERS, "a whole answer counts as broken", stream.id, reason)
        if script.read_whole and script.partly_finished:
            self.seen["an answer ends with some choices unfinished"] += 1
        if script.said_terminal and not script.read_whole and reason is CloseReason.COMPLETE:
            self.seen["an answer is complete before its framing ends"] += 1
        if stream.ended_clean and not script.said_terminal:
            self.seen["an answer ends with all choices finished and no terminal"] += script.dialect == "chat"
        if reason is CloseReason.UPSTREAM_IDLE_TIMEOUT:
            silent_s = now - script.event_at  # 0: the read of that event still waits for the end of this turn
            silent = not silent_s or silent_s >= settings.idle_timeout_s - ROUNDING_S
            must(silent, "an upstream that spoke counts as silent", silent_s)
        elif reason is CloseReason.UPSTREAM_TTFT_TIMEOUT:
            # An event of this very turn may still wait for the turn's end.
            late = not script.events or now == script.event_at
            must(late, "a first event that came in time counts as late", stream.id, now - script.event_at)
