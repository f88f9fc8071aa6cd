"""What a key has left: requests a minute, tokens a minute, streams at once.

Each rate is a bucket that holds one minute's worth and refills evenly, so N a minute is a burst of N and then one
every 60/N s. A request's tokens aren't known beforehand: it is let in while the bucket holds one, and what it then
writes may take the bucket below zero, which later requests wait for. So the average is the limit, whatever the length
of an answer.

Buckets look at totals that only count up, instead of being told of each event. Two things follow. The token path bumps
one plain integer (`account.tokens_total += 1`) and nothing else. And several workers share a limit by publishing their
totals: each passes the others' sum as `elsewhere`, and sees one bucket; a limit may be overshot by what passes between
two looks, workers − 1 at most for requests and streams.

The upstream's usage, when it comes, corrects what was counted from text events: `correct(counted, usage)`.
"""

from __future__ import annotations

from collections.abc import Container, MutableSequence
from typing import Final, NamedTuple, Protocol

from streamd.core.auth import Key, Refusal
from streamd.core.keys import KEYS_MAX
from streamd.reasons import CloseReason

# docs/PROTOCOL.md, section 4: the SDKs don't wait for longer than a minute.
RETRY_AFTER_S_MAX: Final = 60.0
# A usage chunk that claims 10^12 tokens must not lock a key out for good: an hour at most.
DEBT_MINUTES_MAX: Final = 60
# Who waits exactly as long as told must not fail on the last bit of a float.
LEVEL_SLACK: Final = 1e-6
# For streams at once there is no telling when one ends: a short wait.
STREAMS_RETRY_AFTER_S: Final = 5.0


class Spent(NamedTuple):
    """What one worker, or the sum of several, has counted for a key."""

    requests_total: int
    tokens_total: int
    streams_now: int


NOTHING: Final = Spent(0, 0, 0)


class Bucket:
    """The level of one rate: seconds come in as `now` (monotonic), counts as a running total."""

    __slots__ = ("_at", "_level", "_total")

    def __init__(self, per_minute: int, total: int, now: float) -> None:
        self._level = float(per_minute)
        self._total = total
        self._at = now

    def look(self, per_minute: int, total: int, now: float) -> float:
        """The level at `now`. -DEBT_MINUTES_MAX * per_minute <= level <= per_minute, a lowered limit included."""
        # What was spent comes off before the refill: a request is counted in the instant of the look before.
        level = self._level - (total - self._total) + (now - self._at) * per_minute / 60
        self._level = max(-DEBT_MINUTES_MAX * per_minute, min(per_minute, level))
        self._total = total
        self._at = now
        return self._level


class Board(Protocol):
    """Where workers show each other what they have counted, by the key's id."""

    def entry_of(self, key_id: str) -> MutableSequence[int] | None:
        """Where this worker's three numbers stand, in Spent's order; None where there is no more room."""

    def spent_elsewhere(self, key_id: str) -> Spent:
        """The sum of all others'."""


class Account:
    """The counters of one key in this worker. A running stream holds on to it, also when the key is revoked."""

    __slots__ = ("_entry", "_requests", "_tokens", "requests_total", "streams_now", "tokens_total")

    def __init__(self, entry: MutableSequence[int] | None = None) -> None:
        self._entry = entry  # where other workers read it
        self.requests_total = 0
        self.tokens_total = 0  # bumped by one for each text event, then corrected
        self.streams_now = 0
        # None until a limit is set, and again when it is taken away: a bucket starts full.
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None

    def spent(self) -> Spent:
        """What this worker publishes for the others."""
        return Spent(self.requests_total, self.tokens_total, self.streams_now)

    def publish(self) -> None:
        """Let the others see it. Tokens alone may wait for the sweep."""
        entry = self._entry
        if entry is not None:
            entry[0], entry[1], entry[2] = self.requests_total, self.tokens_total, self.streams_now

    def admit_request(self, key: Key, now: float, elsewhere: Spent = NOTHING) -> Refusal | None:
        """Count a request and return None, or don't and return the refusal (429)."""
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
        """Reserve one of the streams at once and return None, or the refusal (429). See `close_stream`."""
        if key.streams_max is not None and self.streams_now + elsewhere.streams_now >= key.streams_max:
            return _refuse(f"{key.streams_max} streams at once", STREAMS_RETRY_AFTER_S)
        self.note_stream()
        return None

    def note_stream(self) -> None:
        """One more stream, which runs already: it counts and isn't refused."""
        self.streams_now += 1
        self.publish()

    def close_stream(self) -> None:
        """Give back what `open_stream` reserved."""
        assert self.streams_now > 0
        self.streams_now -= 1
        self.publish()

    def correct(self, counted: int, usage: int) -> None:
        """Replace what was counted for one answer by what the upstream says it was. The total never falls below 0."""
        self.tokens_total = max(0, self.tokens_total - counted + max(0, usage))


class Accounts:
    """The accounts of all keys: at most the key file's, for only an authenticated key gets one."""

    __slots__ = ("_by_id", "board")

    def __init__(self) -> None:
        self._by_id: dict[str, Account] = {}
        self.board: Board | None = None  # where there are other workers

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
        """What the other workers have counted for a key."""
        return self.board.spent_elsewhere(key.id) if self.board is not None else NOTHING

    def publish(self) -> None:
        """Show the others what was spent since, tokens above all. For the sweep."""
        for account in self._by_id.values():
            account.publish()

    def retain(self, ids: Container[str]) -> None:
        """Drop the accounts of keys that are no more: call it with the new Keys after each reload."""
        self._by_id = {key_id: account for key_id, account in self._by_id.items() if key_id in ids}


def _wait(bucket: Bucket | None, per_minute: int | None, total: int, now: float) -> tuple[Bucket | None, float]:
    """The bucket to keep, and the seconds until it holds one; 0 if it does."""
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
