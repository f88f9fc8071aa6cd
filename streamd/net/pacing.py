"""Pacing: when does a token wait, and for how long at most?

WHY. Most of a token's cost is the kernel's, for a read and a write of a few hundred bytes, and the next largest part is
paid for each read as well, not for each token. Two tokens in a read and a write cost little more than one. A relay that
copies bytes can't wait; streamd knows the events, and may hold a token back for a moment that nobody sees.

THE RULE. Each stream has a *write interval* (core/write_interval.py), from the settings of its route (`write_interval`)
and the request that opened it (X-Stream-Write-Interval):

    0           a token goes out in the loop's turn that reads it
    a duration  a token waits at most so long, from its own arrival
    adaptive    the same, with an interval that follows this worker's load: 0 while the worker is idle, up to 50 ms as
                it fills up, up to a second while it can't keep up

    The first event of a stream goes at once, and so does the first after a silence longer than the interval. The end of
    an answer, its terminal event, an error and a seal go as soon as they are read, with all that is held.

WHERE A TOKEN WAITS. A relayed stream's token waits in the kernel: after a read of an upstream's socket the socket isn't
read again for the interval (the reason PACE of net/reading.py), then all that has come is one read and one write. A
pause costs no work for the tokens that come meanwhile, and TCP slows down a source that is faster than streamd. The
time of a token's arrival isn't known there, but the pause began before it: no token waits longer than the pause. A
terminal event that comes during a pause waits for the pause's end, because nobody has read it.

    A pause has to gather something, or it is only work. So a read is followed by a pause only if the read before it was
    less than the interval ago: a stream of ten tokens a second never pauses for 50 ms. And a pause follows a pause only
    if something had come during the first.

    So a pause that the settings or a request ask for is at most READ_PAUSE_S_MAX. The rest of a longer interval is
    spent in the stream's dispatcher (core/fanout.py), where a terminal event, an error or the seal ends the wait. Only
    a pause that the load asks for may be longer, up to a second: it is there to save reads.

    A published stream's token waits in the stream's dispatcher for the whole interval. Its publisher is always read.

    A stream with more than 64 readers is handed out by its dispatcher in any case. Of a relayed stream the dispatcher
    adds no wait of its own to the pause.

WHAT IT COSTS. All pauses end by a single timer: the connections that have to be read again in the same TICK_S are a
list. A pause is a call of the transport and an append. At its end the socket is read past the transport: a stream that
goes on like that leaves the kernel's set of watched sockets once, and its reads cost neither a wake-up nor a call to
leave the set and to join it (docs/ARCHITECTURE.md, Measured, 18). The transport reads on where nothing has come, which
may be the end, where READ_BYTES_MAX bytes have come, and under TLS. A read without a pause costs a comparison of times,
and nothing while no stream has an interval.

NEVER FOR A READER. A pause follows a read, whatever the stream's readers do. For a slow reader the source is never
paused.

BOUNDS. A connection is in at most one list, and a list is dropped at its tick, a second later at most. A pause ends by
a read of at most READ_BYTES_MAX bytes of each connection.

Rejected: reading each token at once and holding its frame (saves the write, but not the read, and needs a timer and
memory for each stream); one pause for the whole loop (holds back requests and first tokens too); a timer for each
connection (two heap operations each pause).
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

from streamd.core.write_interval import AdaptiveInterval, WriteInterval
from streamd.counters import Counters
from streamd.net.reading import PACE, Readable, pause_reading, resume_reading

# The longest pause that settings or requests bring about, and so the longest that an end stays unread: users see an
# answer that ends a tenth of a second late as one that ends in time.
READ_PAUSE_S_MAX: Final = 0.1

# What came during a pause is read within this time after it, or within this part of the pause: a worker that is short
# of time reads many sockets in a turn.
READ_AFTER_S: Final = 0.01
READ_AFTER_SHARE: Final = 0.25

# The pauses that end within this time end together: a turn finds more to read, and no pause is shorter by more.
TICK_S: Final = 0.005


class Paced(Readable, Protocol):
    """A connection to an upstream whose socket may rest."""

    touched_at: float  # the time of its last sign of life
    read_at: float  # the time of its last read; a pause's end sets it so that only a read right behind may pause again

    def rest(self, pacing: Pacing, since_s: float, now: float) -> bool:
        """Its bytes are processed: pause it, if its state allows. Returns whether it rests."""

    def read_rested(self) -> bool:
        """Take what has come during its pause, past the transport. False: the transport has to read on."""

    def crash(self, where: str, error: Exception) -> None:
        """As in Guarded (core/guard.py)."""


class Pacing:
    """One per worker: the pauses of its upstreams' sockets, and the interval that its load asks for."""

    __slots__ = (
        "_armed_tick",
        "_awake",
        "_counters",
        "_due",
        "_late_s",
        "_loop",
        "_timer",
        "adaptive",
        "answers",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, counters: Counters) -> None:
        self._loop = loop
        self._counters = counters
        self.adaptive = AdaptiveInterval()
        self.answers = 0  # under way, whose interval is at least some time by their terms
        self._due: dict[tuple[int, float], list[Paced]] = {}  # by the tick of the pause's end, and its length
        self._awake: list[Paced] = []  # read at the end of their pause, until these bytes are processed
        self._timer: asyncio.TimerHandle | None = None
        self._armed_tick = 0
        self._late_s = 0.0  # the latest end of a pause since the last note_load()

    # -- intervals

    def interval_s(self, interval: WriteInterval) -> float:
        """The seconds for which a token of a stream with these terms may wait at this moment."""
        return max(interval.least_s, self.adaptive.seconds) if interval.adaptive else interval.least_s

    def read_pause_s(self, interval: WriteInterval) -> float:
        """The part of the interval in which the upstream isn't read."""
        wanted_s = min(interval.least_s, READ_PAUSE_S_MAX)
        return max(wanted_s, self.adaptive.seconds) if interval.adaptive else wanted_s

    def hold_s(self, interval: WriteInterval) -> float:
        """The rest of the interval, in which events that were read wait in the stream's dispatcher."""
        return self.interval_s(interval) - self.read_pause_s(interval)

    def note_load(self, busy_share: float, lag_s: float) -> None:
        """Follow the load of the last 250 ms: the part of it that the worker was busy, and the loop's lateness."""
        late_s, self._late_s = max(self._late_s, lag_s), 0.0
        self.adaptive.note(busy_share, late_s)

    def enter(self, interval: WriteInterval) -> None:
        """An answer begins whose stream has these terms; leave() follows."""
        self.answers += interval.least_s > 0

    def leave(self, interval: WriteInterval) -> None:
        """The answer is over."""
        self.answers -= interval.least_s > 0

    # -- pauses

    def rest(self, connection: Paced, interval: WriteInterval, since_s: float, now: float) -> bool:
        """Don't read this connection again for its interval, which began with the read of this turn, unless a pause
        gathers nothing. The read before was `since_s` ago. Returns whether it rests.
        """
        wait_s = self.read_pause_s(interval)
        tick = int((now + wait_s) / TICK_S)
        if since_s >= wait_s or tick <= int(now / TICK_S):
            return False
        pause_reading(connection, PACE)
        resting = self._due.get((tick, wait_s))
        if resting is None:
            self._due[tick, wait_s] = [connection]
            if self._timer is None or tick < self._armed_tick:
                self._arm(tick)
        else:
            resting.append(connection)
        return True

    def end_rest(self, connection: Paced) -> None:
        """End this connection's rest, if it has one: whoever calls has another reason for which it isn't read."""
        if connection.pauses & PACE:
            for resting in (*self._due.values(), self._awake):
                if connection in resting:
                    resting.remove(connection)
            resume_reading(connection, PACE)

    def _arm(self, tick: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._armed_tick = tick
        self._timer = self._loop.call_later(max(0.0, tick * TICK_S - self._loop.time()), self._wake)

    def _wake(self) -> None:
        """Read the connections whose pause is over."""
        self._timer = None
        now = self._loop.time()
        self._late_s = max(self._late_s, now - self._armed_tick * TICK_S)
        # Why the armed tick: a timer may come a fraction of a millisecond early.
        tick_now = max(self._armed_tick, int(now / TICK_S))
        for tick, wait_s in [due for due in self._due if due[0] <= tick_now]:
            resting = self._due.pop((tick, wait_s))
            self._counters.held_s.observe(wait_s, len(resting))
            read_at = now - wait_s + max(READ_AFTER_S, wait_s * READ_AFTER_SHARE)
            for connection in resting:
                connection.touched_at = now  # it had no chance to show a sign of life
                connection.read_at = read_at
                try:
                    if connection.read_rested():
                        self._awake.append(connection)
                    else:
                        resume_reading(connection, PACE)
                except Exception as error:
                    connection.crash("pacing.wake", error)
        if self._awake:
            self._loop.call_soon(self._rest_on)  # behind the call that processes the reads (net/read_batch.py)
        if self._due:
            self._arm(min(tick for tick, _ in self._due))

    def _rest_on(self) -> None:
        """The bytes read at the end of pauses are processed: begin the next pauses."""
        connections, self._awake = self._awake, []
        now = self._loop.time()
        for connection in connections:
            try:
                if not connection.rest(self, 0.0, now):
                    resume_reading(connection, PACE)
            except Exception as error:
                connection.crash("pacing.rest_on", error)
