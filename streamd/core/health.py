"""Health: whether an inference server is asked, judged by its last failures and answers.

A failure leaves the server out for a time that doubles with each further failure. When the time is over, a single
request probes the server, and all others wait for its outcome elsewhere: an answer lets the server back in. Where
others may take its models, a server that can't be reached is tried by a connection of streamd's own (net/knocks.py): a
request would wait for connect_timeout to find out.

    in         no failure since the last answer
    out        until `out_until`
    due        the time is over: the next request is the probe
    probed     a probe is under way

`Health.view()` tells people the same: up, failing, out, probing (streamd/server_state.py).

Two kinds of failures (Fault) are told apart. A connection that can't be established is the server's failure, whoever
asks. After a request was sent, the request itself may be the cause: so a failure that a single principal provokes
leaves the server out for this principal alone, if another principal has asked it too. Failures of two principals
without an answer in between leave it out for all. A server that is out because of its answers is the last resort where
every other server is out too, because its own error says more than a refusal of streamd's.

An attempt that began before the last counted failure belongs to the same outage: it doubles nothing. A black hole that
a hundred requests have been sent to would be left out for the longest time otherwise.

Rejected: a share of failures over a window (a server that fails at once gets hundreds of requests until its share is
known), and a back-off per address of a client (a page of one user would have thousands).
"""

from __future__ import annotations

import random
from typing import Final, NamedTuple, Protocol

from streamd.choice import Choice
from streamd.reasons import CloseReason
from streamd.server_state import ERROR_CHARS_MAX, ServerState, ServerView

# Time for which a failing upstream is left out: doubles from half a second to half a minute, with jitter.
LEFT_OUT_S_MIN: Final = 0.5
LEFT_OUT_S_MAX: Final = 30.0

# 2^16 times LEFT_OUT_S_MIN is far beyond LEFT_OUT_S_MAX; the number stays small.
FAILURES_MAX: Final = 16

# Internal errors in a row that are the server's failure. A single request that a server chokes on gets 500, and SDKs
# send it three times.
ERRORS_IN_A_ROW: Final = 3

# A probe whose connection stands for this long after its request refutes that no connection can be established: a
# round trip around the world, doubled. Its answer may take minutes, and would keep the server out for so long.
STANDS_S: Final = 1.0

# A connection that is awaited for this long puts its server behind the others until it stands: over the ocean and with
# TLS it takes 0.3 s. Or the server that swallows connections would get its share of requests until connect_timeout.
AWAITED_S: Final = 0.5

# Principals of which a server's failures are kept, those that failed last: 256 x 250 B are 64 KB for each server.
PRINCIPALS_MAX: Final = 256


class Fault(Choice):
    """How a server failed."""

    CONNECTION = "connection"  # refused, timed out, closed at once: no request can be the cause
    ANSWER = "answer"  # a status, a reset, a silence after the request was sent


# Statuses that count as failures at once: the server, or the one behind it, takes no requests.
FAILED_STATUSES: Final = frozenset((502, 503, 504, 529))

# Statuses whose request was refused before work began: another server may take it.
REFUSED_STATUSES: Final = frozenset((429, 503, 529))

# Counts only in a row.
ERROR_STATUS: Final = 500


class Probe(Protocol):
    """A request under way."""

    asked_at: float  # when it was sent; 0: not yet


class ReputeState(NamedTuple):
    """A Repute without its probe: the request that probes goes on, or the next one does."""

    failures: int
    since: float
    errors: int
    failed_at: float
    fault: Fault
    out_until: float


class HealthState(NamedTuple):
    """A Health, for another process. Requests that await a connection are begun again there."""

    all: ReputeState
    by_principal: tuple[tuple[str, ReputeState], ...]
    is_doubtful: bool
    latest: str | None
    is_shared: bool
    blamed: tuple[str, ...]
    judged_at: float
    since: float
    failures: int
    reason: str
    error: str


class Repute:
    """The standing of a server, with all principals or with a single one."""

    __slots__ = ("_failures", "_since", "errors", "failed_at", "fault", "out_until", "probe")

    def __init__(self) -> None:
        self._failures = 0  # counted since the last answer
        self._since = 0.0  # time of the last counted failure
        self.errors = 0  # internal errors in a row
        self.failed_at = 0.0  # time of the last failure, also of an error that isn't counted
        self.fault = Fault.ANSWER  # of the last counted failure
        self.out_until = 0.0
        self.probe: Probe | None = None

    def state(self) -> ReputeState:
        """What go_on_from() takes."""
        return ReputeState(self._failures, self._since, self.errors, self.failed_at, self.fault, self.out_until)

    def go_on_from(self, state: ReputeState) -> None:
        """Take the standing that another process has found."""
        self._failures, self._since, self.errors = min(state.failures, FAILURES_MAX), state.since, state.errors
        self.failed_at, self.fault, self.out_until = state.failed_at, state.fault, state.out_until

    @property
    def is_in(self) -> bool:
        return not self._failures

    def takes(self, now: float) -> bool:
        """Whether a request may go there: the server is in, or due for a probe."""
        return self.is_in or (now >= self.out_until and (self.probe is None or self.stands(now)))

    def stands(self, now: float) -> bool:
        """Whether the probe shows already that connections can be established."""
        probe = self.probe
        return (
            probe is not None
            and self.fault is Fault.CONNECTION
            and probe.asked_at > 0
            and now - probe.asked_at >= STANDS_S
        )

    def begin(self, probe: Probe, now: float) -> None:
        """A request goes there."""
        if self.stands(now):
            self.let_in()
        if self._failures and now >= self.out_until and self.probe is None:
            self.probe = probe

    def end(self, probe: Probe) -> None:
        """The request is over; without a verdict the next request is the probe."""
        if self.probe is probe:
            self.probe = None

    def let_in(self) -> None:
        self._failures = self.errors = 0
        self.out_until = 0.0
        self.probe = None

    def failed(self, fault: Fault, began_at: float, now: float, rng: random.Random, *, is_error: bool = False) -> None:
        """A request that began at `began_at` failed. `is_error`: with 500, which counts only in a row."""
        self.failed_at = now
        self.errors += is_error
        if is_error and self.errors < ERRORS_IN_A_ROW:
            return
        if self._failures and began_at <= self._since:
            return
        wait_s = min(LEFT_OUT_S_MIN * 2**self._failures, LEFT_OUT_S_MAX)
        self._failures = min(self._failures + 1, FAILURES_MAX)
        self._since = now
        self.fault = fault
        self.out_until = now + wait_s * rng.uniform(0.75, 1.25)
        self.probe = None


class Health:
    """The standings of a server."""

    __slots__ = (
        "_blamed",
        "_error",
        "_failures",
        "_is_shared",
        "_judged_at",
        "_latest",
        "_of",
        "_reason",
        "_since",
        "all",
        "connecting",
        "is_checked",
        "is_doubtful",
        "is_knocked",
    )

    def __init__(self) -> None:
        self.all = Repute()
        self.connecting: dict[Probe, float] = {}  # requests that await a connection, since when; the oldest first
        self.is_checked = False  # whether checks find out that the server can be reached again: no request has to
        self.is_knocked = False  # the same by connections: a request has to where no other server is left
        self.is_doubtful = True  # no answer since the start, or since a connection was refused or closed without a byte
        self._of: dict[str, Repute] = {}  # by principal; the last that failed is the last
        self._latest: str | None = None  # the principal that asked last
        self._is_shared = False  # whether two principals or more have asked
        self._blamed: set[str] = set()  # principals of the failures since the last answer; two are enough
        # for people: the members of ServerView
        self._judged_at = self._since = 0.0
        self._failures = 0
        self._reason = self._error = ""

    def state(self) -> HealthState:
        """What go_on_from() takes."""
        return HealthState(
            self.all.state(),
            tuple([(principal, own.state()) for principal, own in self._of.items()]),
            self.is_doubtful,
            self._latest,
            self._is_shared,
            tuple(sorted(self._blamed)),
            self._judged_at,
            self._since,
            self._failures,
            self._reason,
            self._error,
        )

    def go_on_from(self, state: HealthState) -> None:
        """Take what another process knows of the server. Settings and requests under way are this process's own."""
        self.all.go_on_from(state.all)
        for principal, own in state.by_principal[-PRINCIPALS_MAX:]:
            self._own(principal).go_on_from(own)
        self.is_doubtful, self._latest, self._is_shared = state.is_doubtful, state.latest, state.is_shared
        self._blamed = set(state.blamed[:2])
        self._judged_at, self._since, self._failures = state.judged_at, state.since, state.failures
        self._reason, self._error = state.reason, state.error[:ERROR_CHARS_MAX]

    # -- choice

    def takes(self, principal: str, now: float) -> bool:
        """Whether a request of the principal may go there."""
        if (self.is_checked or self.is_knocked) and not self.is_reachable():
            return False
        return self._takes(principal, now)

    def takes_last(self, principal: str, now: float) -> bool:
        """Whether a request of the principal may go there if no other server takes it."""
        return not self.is_checked and self._takes(principal, now)

    def _takes(self, principal: str, now: float) -> bool:
        own = self._of.get(principal)
        return self.all.takes(now) and (own is None or own.takes(now))

    def is_reachable(self) -> bool:
        """Whether the server answers, be it with errors."""
        return self.all.is_in or self.all.fault is Fault.ANSWER

    def is_awaited(self, now: float) -> bool:
        """Whether a connection has been awaited for long."""
        return now - next(iter(self.connecting.values()), now) >= AWAITED_S

    def failed_at(self, principal: str) -> float:
        """Time of its last failure, as the principal saw it; 0: never."""
        own = self._of.get(principal)
        return self.all.failed_at if own is None else max(own.failed_at, self.all.failed_at)

    # -- requests

    def begin(self, probe: Probe, principal: str, now: float) -> None:
        """A request of the principal goes there."""
        self._is_shared = self._is_shared or self._latest not in (None, principal)
        self._latest = principal
        if self.all.stands(now):
            self._let_in(now)
        self.all.begin(probe, now)
        own = self._of.get(principal)
        if own is not None:
            own.begin(probe, now)

    def end(self, probe: Probe, principal: str) -> None:
        """The request is over, with or without a verdict."""
        self.all.end(probe)
        own = self._of.get(principal)
        if own is not None:
            own.end(probe)

    # -- verdicts

    def answered(self, principal: str, now: float) -> None:
        """The server answered a request properly, be it with a refusal: it works."""
        self.is_doubtful = False
        self._blamed.clear()
        self._let_in(now)
        own = self._of.get(principal)
        if own is not None:
            own.let_in()

    def passed_check(self, now: float) -> None:
        """A check got an answer: a server that could not be reached is in again, and other failures stay."""
        if not self.is_reachable():
            self._let_in(now)

    def _let_in(self, now: float) -> None:
        self.all.let_in()
        self._judged_at = now
        if self._failures:
            self._failures, self._since = 0, now

    def unreachable(self, began_at: float, now: float, rng: random.Random, *, error: str = "") -> None:
        """No connection was established, for the reason that `error` tells people."""
        self.is_doubtful = True
        was_in = self.all.is_in
        self.all.failed(Fault.CONNECTION, began_at, now, rng)
        self._note(CloseReason.UPSTREAM_CONNECT, error, now, was_in=was_in)

    def failed(
        self,
        principal: str,
        began_at: float,
        now: float,
        rng: random.Random,
        *,
        is_error: bool = False,
        reason: CloseReason = CloseReason.UPSTREAM_REFUSED,
        error: str = "",
    ) -> None:
        """A request that was sent failed. `is_error`: with 500, which counts only in a row. `error` is for people."""
        if len(self._blamed) < 2:
            self._blamed.add(principal)
        was_in = self.all.is_in
        self._own(principal).failed(Fault.ANSWER, began_at, now, rng, is_error=is_error)
        if len(self._blamed) > 1 or not self._is_shared:
            self.all.failed(Fault.ANSWER, began_at, now, rng, is_error=is_error)
        else:
            self.all.errors += is_error
        self._note(reason, error, now, was_in=was_in)

    def _note(self, reason: CloseReason, error: str, now: float, *, was_in: bool) -> None:
        """Remember a failure for people."""
        if not self._failures or was_in != self.all.is_in:
            self._since = now
        self._judged_at = now
        self._failures += 1
        self._reason, self._error = reason.word, error[:ERROR_CHARS_MAX]

    def view(self, now: float, listed: tuple[str, ...] = ()) -> ServerView:
        """How the server stands, and why; `listed` are its models. A probe that stands lets the server in here too."""
        if self.all.stands(now):
            self._let_in(now)
        return ServerView(
            self._state(now), self._judged_at, self._since, self._failures, self._reason, self._error, listed
        )

    def _state(self, now: float) -> ServerState:
        standing = self.all
        if standing.is_in:
            return ServerState.FAILING if self._failures else ServerState.UP
        is_due = now >= standing.out_until
        return ServerState.PROBING if is_due or standing.probe is not None else ServerState.OUT

    def _own(self, principal: str) -> Repute:
        """The principal's own standing, made where there is none."""
        own = self._of.pop(principal, None) or Repute()
        if len(self._of) >= PRINCIPALS_MAX:
            del self._of[next(iter(self._of))]
        self._of[principal] = own
        return own
