"""Limits of a key: requests a minute, tokens a minute, streams at once.

Each rate is a bucket that holds a minute's worth and refills evenly, so a limit of N a minute allows a burst of N and
then a request every 60/N s. A request's tokens aren't known beforehand: the request is let in while the bucket holds a
token, and its answer may take the bucket below zero; later requests wait until it has refilled. So the average is the
limit, whatever the length of an answer.

Buckets look at totals that only count up, instead of being told of each event. Two things follow. The token path bumps
a plain integer (`account.tokens_total += 1`) and nothing else. And several workers share a limit by publishing their
totals: each passes the others' sum as `elsewhere`, so that all see the same level. Spending between two looks may
overshoot a limit, for requests and streams by at most workers − 1.

The upstream's usage, when it comes, replaces the count of text events: `correct(counted, usage)`.
"""

from __future__ import annotations

from collections.abc import Container, MutableSequence
from typing import Final, NamedTuple, Protocol

from streamd.core.auth import Key
from streamd.core.keys import KEYS_MAX
from streamd.core.refusal import Refusal
from streamd.reasons import CloseReason

# Longest Retry-After (docs/PROTOCOL.md, section 4): the SDKs don't wait for longer than a minute.
RETRY_AFTER_S_MAX: Final = 60.0
# Most debt of a bucket: a usage chunk that claims 10^12 tokens locks its key out for an hour and not for good.
DEBT_MINUTES_MAX: Final = 60
# Tolerance: float rounding must not refuse a client that waits exactly as long as Retry-After says.
LEVEL_SLACK: Final = 1e-6
# Retry-After at the limit of streams at once: short, because nothing tells when a stream ends.
STREAMS_RETRY_AFTER_S: Final = 5.0


class Spent(NamedTuple):
    """Counts for a key, of one worker or summed over several."""

    requests_total: int
    tokens_total: int
    streams_now: int


NOTHING: Final = Spent(0, 0, 0)


class Bucket:
    """The level of a rate: seconds come in as `now` (monotonic), counts as a running total."""

    __slots__ = ("_at", "_level", "_total")

    def __init__(self, per_minute: int, total: int, now: float) -> None:
        self._level = float(per_minute)
        self._total = total
        self._at = now

    def look(self, per_minute: int, total: int, now: float) -> float:
        """The level at `now`. -DEBT_MINUTES_MAX * per_minute <= level <= per_minute, a lowered limit included."""
        # Spending comes off before the refill: it happened right after the previous look, before the time since then.
        level = self._level - (total - self._total) + (now - self._at) * per_minute / 60
        self._level = max(-DEBT_MINUTES_MAX * per_minute, min(per_minute, level))
        self._total = total
        self._at = now
        return self._level


class SpendingBoard(Protocol):
    """Shared memory in which workers see each other's counts, by the key's id."""

    def entry_of(self, key_id: str) -> MutableSequence[int] | None:
        """The place of this worker's three numbers, in Spent's order; None if the board is full."""

    def spent_elsewhere(self, key_id: str) -> Spent:
        """The sum of all other workers' counts."""


class Account:
    """The counters of a key in this worker. A running stream keeps its account, even if the key is revoked."""

    __slots__ = ("_entry", "_requests", "_tokens", "requests_total", "streams_now", "tokens_total")

    def __init__(self, entry: MutableSequence[int] | None = None) -> None:
        self._entry = entry  # where other workers read it
        self.requests_total = 0
        self.tokens_total = 0  # 1 more with each text event, then corrected
        self.streams_now = 0
        # None while the key has no such limit. A bucket starts full.
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None

    def spent(self) -> Spent:
        """The counts that this worker publishes for the others."""
        return Spent(self.requests_total, self.tokens_total, self.streams_now)

    def publish(self) -> None:
        """Show the counts to the other workers. A change of tokens alone may wait for the sweep."""
        entry = self._entry
        if entry is not None:
            entry[0], entry[1], entry[2] = self.requests_total, self.tokens_total, self.streams_now

    def admit_request(self, key: Key, now: float, elsewhere: Spent = NOTHING) -> Refusal | None:
        """Count a request and return None, or return the refusal (429) and count nothing."""
        requests_total = self.requests_total + elsewhere.requests_total
        tokens_total = self.tokens_total + elsewhere.tokens_total
        self._requests, requests_wait_s = _wait(self._requests, key.requests_per_minute, requests_total, now)
        self._tokens, tokens_wait_s = _wait(self._tokens, key.tokens_per_minute, tokens_total, now)
        if requests_wait_s or tokens_wait_s:
            if requests_wait_s >= tokens_wait_s:
                return _refuse(f"{key.requests_per_minute} requests per minute", requests_wait_s)
            return _refuse(f"{key.tokens_per_minute} tokens per minute", tokens_wait_s)
        self.requests_total += 1
        self.publish()
        return None

    def open_stream(self, key: Key, elsewhere: Spent = NOTHING) -> Refusal | None:
        """Count a stream that begins and return None, or return the refusal (429). `close_stream` gives it back."""
        if key.streams_max is not None and self.streams_now + elsewhere.streams_now >= key.streams_max:
            return _refuse(f"{key.streams_max} streams at once", STREAMS_RETRY_AFTER_S)
        self.note_stream()
        return None

    def note_stream(self) -> None:
        """Count a stream that runs already and can't be refused any more."""
        self.streams_now += 1
        self.publish()

    def close_stream(self) -> None:
        """Undo `open_stream` or `note_stream`: the stream has ended."""
        assert self.streams_now > 0
        self.streams_now -= 1
        self.publish()

    def correct(self, counted: int, usage: int) -> None:
        """Replace an answer's counted tokens by the upstream's own number. The total never falls below 0."""
        self.tokens_total = max(0, self.tokens_total - counted + max(0, usage))


class Accounts:
    """The accounts of all keys. Only an authenticated key gets an account, so there are at most as many as keys."""

    __slots__ = ("_by_id", "board")

    def __init__(self) -> None:
        self._by_id: dict[str, Account] = {}
        self.board: SpendingBoard | None = None  # None if there are no other workers

    def __len__(self) -> int:
        return len(self._by_id)

    def of(self, key: Key) -> Account:
        """The account of an authenticated key, made at its first request."""
        account = self._by_id.get(key.id)
        if account is None:
            assert len(self._by_id) < KEYS_MAX, "retain() follows each reload"
            account = self._by_id[key.id] = Account(self.board.entry_of(key.id) if self.board is not None else None)
        return account

    def elsewhere(self, key: Key) -> Spent:
        """The other workers' counts for a key."""
        return self.board.spent_elsewhere(key.id) if self.board is not None else NOTHING

    def publish(self) -> None:
        """Show all counts to the other workers, tokens above all. For the sweep."""
        for account in self._by_id.values():
            account.publish()

    def retain(self, ids: Container[str]) -> None:
        """Drop the accounts of keys that are gone: call it with the new Keys after each reload."""
        self._by_id = {key_id: account for key_id, account in self._by_id.items() if key_id in ids}


def _wait(bucket: Bucket | None, per_minute: int | None, total: int, now: float) -> tuple[Bucket | None, float]:
    """The bucket to keep, and the seconds until its level is 1; 0 if it is already."""
    if per_minute is None:
        return None, 0.0
    if bucket is None:
        return Bucket(per_minute, total, now), 0.0
    level = bucket.look(per_minute, total, now)
    if level >= 1 - LEVEL_SLACK:
        return bucket, 0.0
    return bucket, (1 - level) * 60 / per_minute


def _refuse(limit: str, wait_s: float) -> Refusal:
    text = f"This API key is limited to {limit}. Try again later."
    return Refusal(CloseReason.RATE_LIMITED, "rate_limit_exceeded", text, min(wait_s, RETRY_AFTER_S_MAX))
