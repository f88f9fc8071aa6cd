"""Limits of a key: requests a minute, tokens a minute, streams at once.

Each rate is a bucket that holds a minute's worth and refills evenly, so a limit of N a minute allows a burst of N and
then a request every 60/N s. A request's tokens aren't known beforehand: the request is let in while the bucket holds a
token, and its answer may take the bucket below zero; later requests wait until it has refilled. So the average is the
limit, whatever the length of an answer.

Buckets look at totals that only count up, instead of being told of each event: the token path counts nothing. All
workers share a bucket. Each publishes its totals, and with each look at a bucket the level that it found. The next
look, of any worker, goes on from the newest of these: less the spending since, more the refill since. So no worker
waits for another, and a worker that sees a key for the first time finds its bucket as the others left it. Looks at the
same moment may overshoot a limit, for requests and streams by at most workers - 1.

Nodes that share an engine share limits as well (engine/key_limits.py): what other nodes spent is in the sum of all
other workers, as it was heard of last. While a node can't ask the others, each node has an even share of a limit.

A request is counted when nothing stands between it and its upstream any more, and given back if it doesn't get there. A
refusal for any reason counts nothing.

The tokens of a stream are its text events. At its end `settle(counted, tokens)` replaces them. A bucket's debt has a
floor, and what the floor forgave is remembered, so that a credit gives back no more than was taken.
"""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Final, NamedTuple, Protocol

from streamd.core.auth import Key
from streamd.core.keys import KEYS_MAX
from streamd.core.refusal import Refusal
from streamd.reasons import CloseReason

# Longest Retry-After (docs/PROTOCOL.md, section 4): the SDKs don't wait for longer than a minute.
RETRY_AFTER_S_MAX: Final = 60.0
# Most debt of a bucket: a usage chunk that claims all of TOKENS_MAX locks its key out for an hour and not for good.
DEBT_MINUTES_MAX: Final = 60
# Tolerance: rounding (of floats, and of levels that other workers read) must not refuse a client that waits exactly as
# long as Retry-After says.
LEVEL_SLACK: Final = 1e-4
# Retry-After at the limit of streams at once: short, because nothing tells when a stream ends.
STREAMS_RETRY_AFTER_S: Final = 5.0
# Sums saturate here, so that they fit the signed and the unsigned numbers of 64 bits in which workers share them.
TOTAL_MAX: Final = 2**63 - 1


class Spent(NamedTuple):
    """Counts for a key, of one worker or summed over several."""

    requests_total: int
    tokens_total: int
    streams_now: int


NOTHING: Final = Spent(0, 0, 0)


class Bucket(NamedTuple):
    """The level of a rate at a look: -DEBT_MINUTES_MAX * per_minute <= level <= per_minute."""

    level: float
    forgiven: float  # debt that the floor cut off since the bucket was full; a credit pays for this first
    total: int  # the spending that the level has in it


class Look(NamedTuple):
    """The buckets of a key as a worker found them at `at` (monotonic). None: never limited.

    The newest look is the greatest: in the same moment the look that went on from the other, with the next number.
    """

    at: float
    number: int
    requests: Bucket | None
    tokens: Bucket | None


class KeyLevels(NamedTuple):
    """The levels of a key's buckets; None: never limited."""

    requests: float | None
    tokens: float | None


def look_at(bucket: Bucket | None, per_minute: int | None, total: int, elapsed_s: float) -> Bucket | None:
    """The bucket `elapsed_s` after it was looked at, with the spending of now. A new bucket is full.

    While a key has no such limit (None) the level stays, and spending is free.
    """
    if per_minute is None:
        return bucket and bucket._replace(total=total)
    if bucket is None:
        return Bucket(float(per_minute), 0.0, total)
    forgiven, spent = bucket.forgiven, float(total - bucket.total)
    if spent < 0:
        unpaid = min(forgiven, -spent)
        forgiven -= unpaid
        spent += unpaid
    # Spending comes off before the refill, as if it happened right after the previous look.
    level = min(float(per_minute), bucket.level - spent + max(0.0, elapsed_s) * per_minute / 60)
    floor = -float(DEBT_MINUTES_MAX * per_minute)
    if level < floor:
        return Bucket(floor, forgiven + floor - level, total)
    return Bucket(level, forgiven if level < per_minute else 0.0, total)


def look_again(last: Look, rates: tuple[int | None, int | None], spent: Spent, now: float) -> Look:
    """The buckets of now: `last`, brought up to date. `spent` is the spending of all workers, `rates` are the requests
    and tokens a minute of the key.
    """
    requests_rate, tokens_rate = rates
    elapsed_s = now - last.at
    requests = look_at(last.requests, requests_rate, spent.requests_total, elapsed_s)
    # Requests are counted right after a look, tokens come at any time, and publish() looks once a second while they do:
    # so the refill comes first here, or ten idle minutes would pay for the tokens of the last second.
    tokens = last.tokens and look_at(last.tokens, tokens_rate, last.tokens.total, elapsed_s)
    tokens = look_at(tokens, tokens_rate, spent.tokens_total, 0.0)
    return Look(max(now, last.at), last.number + 1, requests, tokens)


class KeyUsage(NamedTuple):
    """The counts of a key over all workers, and the rest of its limits; None where there is no limit."""

    streams_now: int
    requests_total: int
    tokens_total: int
    requests_left: int | None  # of this minute
    tokens_left: int | None  # below 0: a debt
    wait_s: float  # until the next request is let in


def usage_of(key: Key, spent: Spent, last: Look | None, now: float) -> KeyUsage:
    """The usage of a key by the spending of all workers and the newest look of any. Changes nothing."""
    rates = (key.requests_per_minute, key.tokens_per_minute)
    look = look_again(last or Look(now, 0, None, None), rates, spent, now)
    left = [
        None if bucket is None or rate is None else math.floor(bucket.level + LEVEL_SLACK)
        for bucket, rate in zip((look.requests, look.tokens), rates, strict=True)
    ]
    wait_s = max(_wait_s(look.requests, rates[0]), _wait_s(look.tokens, rates[1]))
    return KeyUsage(spent.streams_now, spent.requests_total, spent.tokens_total, left[0], left[1], wait_s)


class SharedAccount(Protocol):
    """What the workers show each other of a key (daemon/shared.py)."""

    def publish(self, spent: Spent) -> None:
        """Show this worker's counts."""

    def keep(self, look: Look) -> None:
        """Show this worker's look at the buckets."""

    def seen(self) -> tuple[Spent, Look | None]:
        """The sum of all other workers' and nodes' counts, and the newest look of any worker of this node."""

    def sharers(self) -> int:
        """The number of nodes that each have a share of the key's limits, because they can't ask each other; else 1."""


class SpendingBoard(Protocol):
    """Shared memory in which workers see each other's counts, by the key's id."""

    def account_of(self, key_id: str) -> SharedAccount | None:
        """The key's place; None if the board is full."""

    def usage_in_all(self, key_id: str) -> tuple[Spent, Look | None]:
        """The sum of all workers' and nodes' counts, and the newest look of any worker. Makes no place."""

    def spent_elsewhere(self, key_id: str) -> Spent:
        """The counts of other nodes in these sums."""


class _Alone:
    """The place of a key that no other worker sees."""

    __slots__ = ("_look",)

    def __init__(self) -> None:
        self._look: Look | None = None

    def publish(self, spent: Spent) -> None:
        pass

    def keep(self, look: Look) -> None:
        self._look = look

    def seen(self) -> tuple[Spent, Look | None]:
        return NOTHING, self._look

    def sharers(self) -> int:
        return 1


class AccountState(NamedTuple):
    """An Account of a worker without others, for another process. Streams are counted as they arrive there."""

    requests_total: int
    tokens_total: int
    look: Look | None


class Account:
    """The counters of a key in this worker. A running stream keeps its account, even if the key is revoked."""

    __slots__ = ("_published", "_rates", "_shared", "requests_total", "streams_now", "tokens_total")

    def __init__(self, shared: SharedAccount | None = None) -> None:
        self._shared = shared or _Alone()
        self._published = NOTHING
        # Requests and tokens a minute, as the key had them last. None: not seen in this worker yet, so it doesn't look.
        self._rates: tuple[int | None, int | None] | None = None
        self.requests_total = 0
        self.tokens_total = 0
        self.streams_now = 0

    def state(self) -> AccountState:
        """What go_on_from() takes."""
        return AccountState(self.requests_total, self.tokens_total, self._shared.seen()[1])

    def go_on_from(self, state: AccountState) -> None:
        """Add what another process has counted, and go on from its look at the buckets, which has that in it.

        Where workers share the buckets, these have the newest look already.
        """
        here = self._shared.seen()[1]
        self.requests_total = min(TOTAL_MAX, self.requests_total + state.requests_total)
        self.tokens_total = min(TOTAL_MAX, self.tokens_total + state.tokens_total)
        if state.look is not None and (here is None or here.at < state.look.at):
            self._shared.keep(state.look)
        self._show()

    def spent(self) -> Spent:
        """The counts that this worker publishes for the others."""
        return Spent(self.requests_total, self.tokens_total, self.streams_now)

    def publish(self, now: float) -> None:
        """Show counts that have changed to the other workers, after a look: a refill doesn't pay for later spending.

        For the sweep, once a second. Changes of requests and streams are shown at once.
        """
        if self._published != self.spent():
            if self._rates is not None:
                self._look(self._rates, now)
            self._show()

    def _show(self) -> None:
        self._published = self.spent()
        self._shared.publish(self._published)

    def _look(self, rates: tuple[int | None, int | None], now: float) -> tuple[Bucket | None, Bucket | None]:
        elsewhere, last = self._shared.seen()
        if last is None:
            if rates == (None, None):
                return None, None
            last = Look(now, 0, None, None)
        look = look_again(last, rates, _both(self.spent(), elsewhere), now)
        self._shared.keep(look)
        return look.requests, look.tokens

    def usage(self, key: Key, now: float) -> KeyUsage:
        """The usage of the key over all workers."""
        elsewhere, last = self._shared.seen()
        return usage_of(key, _both(self.spent(), elsewhere), last, now)

    def refresh(self, key: Key, now: float) -> KeyLevels:
        """Bring the buckets up to date, and return their levels. A refill must not pay for later spending, so this is
        due whenever other nodes' spending is heard of.
        """
        sharers = self._shared.sharers()
        self._rates = (_share(key.requests_per_minute, sharers), _share(key.tokens_per_minute, sharers))
        requests, tokens = self._look(self._rates, now)
        return KeyLevels(requests and requests.level, tokens and tokens.level)

    def lower(self, key: Key, levels: KeyLevels, now: float) -> None:
        """Another node has found these levels, before this one counted: go on from them where they are lower."""
        self.refresh(key, now)
        _, look = self._shared.seen()
        if look is not None:
            requests, tokens = _lowered(look.requests, levels.requests), _lowered(look.tokens, levels.tokens)
            self._shared.keep(look._replace(number=look.number + 1, requests=requests, tokens=tokens))

    # -- requests

    def refuse_request(self, key: Key, now: float) -> Refusal | None:
        """The refusal (429) of a request, None if it may go upstream. Counts nothing."""
        sharers = self._shared.sharers()
        requests_rate, tokens_rate = _share(key.requests_per_minute, sharers), _share(key.tokens_per_minute, sharers)
        self._rates = (requests_rate, tokens_rate)
        requests, tokens = self._look(self._rates, now)
        requests_wait_s, tokens_wait_s = _wait_s(requests, requests_rate), _wait_s(tokens, tokens_rate)
        if not requests_wait_s and not tokens_wait_s:
            return None
        if requests_wait_s >= tokens_wait_s:
            return _refuse(f"{key.requests_per_minute} requests per minute", requests_wait_s, sharers)
        return _refuse(f"{key.tokens_per_minute} tokens per minute", tokens_wait_s, sharers)

    def count_request(self) -> None:
        """A request goes upstream."""
        self.requests_total = min(TOTAL_MAX, self.requests_total + 1)
        self._show()

    def give_back_request(self) -> None:
        """A counted request didn't get there."""
        self.requests_total = max(0, self.requests_total - 1)
        self._show()

    # -- streams

    def open_stream(self, key: Key, *, replacing: int = 0) -> Refusal | None:
        """Count a stream that begins and return None, or return the refusal (429). `close_stream` gives it back.

        `replacing`: streams of this account that end when the new one has begun.
        """
        if key.streams_max is not None:
            (elsewhere, _), sharers = self._shared.seen(), self._shared.sharers()
            if self.streams_now + elsewhere.streams_now - replacing >= -(-key.streams_max // sharers):
                return _refuse(f"{key.streams_max} streams at once", STREAMS_RETRY_AFTER_S, sharers)
        self.streams_now += 1
        self._show()
        return None

    def adopt_stream(self) -> None:
        """Count a stream that another process has let in; `close_stream` gives it back."""
        self.streams_now += 1
        self._show()

    def close_stream(self) -> None:
        """Undo `open_stream`: the stream has ended."""
        assert self.streams_now > 0
        self.streams_now -= 1
        self._show()

    # -- tokens. The other workers see them with the next publish().

    def count_tokens(self, count: int) -> None:
        """Text events came; or an answer that is no stream says how many tokens it has."""
        self.tokens_total = min(TOTAL_MAX, self.tokens_total + count)

    def settle(self, counted: int, tokens: int) -> None:
        """Replace a stream's counted text events by its tokens. The total never falls below 0."""
        self.tokens_total = max(0, min(TOTAL_MAX, self.tokens_total - counted + tokens))


class Accounts:
    """The accounts of all keys. Only an authenticated key gets an account, so there are at most as many as keys.

    Accounts of keys that have left the file are kept as long as there is room, KEYS_MAX: a key that comes back (the
    file was read while an editor wrote it) has no new bucket, and its streams that still run are counted.
    """

    __slots__ = ("_by_id", "_gone", "board")

    def __init__(self) -> None:
        self._by_id: dict[str, Account] = {}
        self._gone: dict[str, Account] = {}  # the longest gone first
        self.board: SpendingBoard | None = None  # None if there are no other workers

    def __len__(self) -> int:
        return len(self._by_id)

    def of(self, key: Key) -> Account:
        """The account of an authenticated key, made at its first request."""
        account = self._by_id.get(key.id)
        if account is None:
            assert len(self._by_id) < KEYS_MAX, "retain() follows each reload"
            account = self._gone.pop(key.id, None)
            if account is None:
                account = Account(self.board.account_of(key.id) if self.board is not None else None)
            self._by_id[key.id] = account
        return account

    def usage(self, key: Key, now: float) -> KeyUsage:
        """The usage of a key: the counts of this node, over all workers, and the rest of its limits, over all nodes.

        Makes no account for a key that this worker has not seen.
        """
        account, board = self._by_id.get(key.id), self.board
        if account is not None:
            usage = account.usage(key, now)
        else:
            spent, last = board.usage_in_all(key.id) if board is not None else (NOTHING, None)
            usage = usage_of(key, spent, last, now)
        elsewhere = board.spent_elsewhere(key.id) if board is not None else NOTHING
        return usage._replace(
            streams_now=max(0, usage.streams_now - elsewhere.streams_now),
            requests_total=usage.requests_total - elsewhere.requests_total,
            tokens_total=usage.tokens_total - elsewhere.tokens_total,
        )

    def publish(self, now: float) -> None:
        """Show all counts to the other workers, tokens above all. For the sweep, once a second."""
        for account in (*self._by_id.values(), *self._gone.values()):
            account.publish(now)

    def states(self) -> tuple[tuple[str, AccountState], ...]:
        """The accounts by their keys' ids."""
        return tuple([(key_id, account.state()) for key_id, account in self._by_id.items()])

    def retain(self, ids: Container[str]) -> None:
        """Put the accounts of keys that are gone aside: call it with the new Keys after each reload."""
        for key_id in [key_id for key_id in self._by_id if key_id not in ids]:
            self._gone[key_id] = self._by_id.pop(key_id)
        for key_id in list(self._gone)[: max(0, len(self._gone) - KEYS_MAX)]:
            del self._gone[key_id]


def _both(here: Spent, elsewhere: Spent) -> Spent:
    return Spent(
        here.requests_total + elsewhere.requests_total,
        here.tokens_total + elsewhere.tokens_total,
        here.streams_now + elsewhere.streams_now,
    )


def _wait_s(bucket: Bucket | None, per_minute: int | None) -> float:
    """The seconds until the level is 1; 0 if it is already, or without a limit."""
    if per_minute is None or bucket is None or bucket.level >= 1 - LEVEL_SLACK:
        return 0.0
    return (1 - bucket.level) * 60 / per_minute


def _share(per_minute: int | None, sharers: int) -> int | None:
    """A node's share of a rate, rounded up: nobody is locked out."""
    return per_minute and -(-per_minute // sharers)


def _lowered(bucket: Bucket | None, level: float | None) -> Bucket | None:
    return bucket if bucket is None or level is None else bucket._replace(level=min(bucket.level, level))


def _refuse(limit: str, wait_s: float, sharers: int) -> Refusal:
    text = f"This API key is limited to {limit}"
    if sharers > 1:
        text += f", and this node, which can't ask the others, to a share of 1/{sharers}"
    text += ". Try again later."
    return Refusal(CloseReason.RATE_LIMITED, "rate_limit_exceeded", text, min(wait_s, RETRY_AFTER_S_MAX))
