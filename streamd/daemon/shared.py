"""Shared: the mapping in which all workers count: a row of unsigned 64-bit numbers and a ledger of keys each.

    head       the version, the daemon's start time, and for each row the pid of the worker that counts in it
    rows       the base row, then each worker's (the layout is net/totals.py's)
    ledgers    the base ledger, then each worker's: its counts for every API key that it has seen; then that of other
               nodes, which one of the workers writes (engine/key_limits.py)
    pairs      the upstreams and models that requests are counted under, by index (net/served.py)
    crossings  for each worker: how many connections it was sent by each other worker, and has taken from each

A worker writes its own row and ledger; every process reads all. Aligned 64-bit stores and loads are whole on x86-64 and
arm64, so a sum may be a moment old but never torn. When a worker dies, another worker folds its counts: it adds them to
the base row and ledger and clears the dead worker's. The successor folds them if no other worker is ready. The version
is odd during a fold, and a sum is taken again if the version was odd or has changed: so sums of counters never fall.
The parent makes the mapping and knows nothing of its layout.

Crossings outlast deaths: the successor of a dead worker takes the connections that were sent to it.

A ledger has room for KEYS_MAX keys, but only its pages in use exist. Its entries are only ever appended, by hash of the
key's id, so other workers can remember the position of a key's entry. Beside the counts an entry has the worker's last
look at the key's buckets (core/limits.py). It consists of several numbers, so it carries a check number: a look that is
being written doesn't add up and isn't taken.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import secrets
import time
from collections.abc import Iterator, MutableSequence, Sequence
from operator import mul
from typing import cast

from streamd.config import WORKERS_MAX
from streamd.core.admission import SharedNumber
from streamd.core.keys import KEYS_MAX
from streamd.core.limits import NOTHING, TOTAL_MAX, Bucket, Look, Spent
from streamd.net import totals
from streamd.net.served import NAME_BYTES_MAX, PAIRS_MAX, Served
from streamd.net.totals import BEAT_AT, RESIDENT_AT, CounterRow, Totals

BYTES_PER_NUMBER = 8

# The head: three numbers, then for each slot the pid of its owner, the worker that counts in the row. LIFE is drawn by
# the first worker: counts that other nodes see go on under it for as long as the mapping lives.
VERSION, STARTED_MS, LIFE, OWNERS = range(4)
HEAD_LEN = 3 + WORKERS_MAX

# A ledger: two numbers, then entries: the key's hash, three counts, and the look in the order of _packed.
GENERATION, COUNT = range(2)
LEDGER_HEAD_LEN = 2
HASH, REQUESTS, TOKENS, STREAMS, LOOK = range(5)
LOOK_LEN = 9
SHARERS = LOOK  # in the ledger of other nodes, which has no looks
ENTRY_LEN = LOOK + LOOK_LEN
LEDGER_LEN = LEDGER_HEAD_LEN + KEYS_MAX * ENTRY_LEN

# The list of pairs: their number, then for each the bytes of its text and the text, an upstream's name, LF, a model's.
PAIR_TEXT_BYTES_MAX = 2 * NAME_BYTES_MAX + 8
PAIR_LEN = 1 + PAIR_TEXT_BYTES_MAX // BYTES_PER_NUMBER
PAIRS_LEN = 1 + PAIRS_MAX * PAIR_LEN

# A worker's crossings: connections sent to it, by sender (each sender writes its own number), then connections that it
# took, by sender.
CROSSINGS_LEN = 2 * WORKERS_MAX

# A worker with an older beat counts as stuck, dead or not started yet: a loop turns at least four times a second.
BEAT_STALE_S = 2.0

# A number of warnings and its minute share a number of the row: counts up to here, ten times the warnings of a minute.
WARNED_MAX = 64

# Attempts at a sum while counts are folded, and the pause between them. Folding takes less than a millisecond. A worker
# that was killed in the middle of it must not stop the readers.
LOOKS_MAX = 100
LOOK_AGAIN_S = 0.0001


class KeyLedger:
    """The counts per API key of a worker, or of the base. The writer appends entries, readers find them by hash."""

    def __init__(self, numbers: memoryview[int]) -> None:
        self._numbers = numbers
        self._generation = numbers[GENERATION]
        self._places: dict[int, int] = {}  # hash -> where its entry begins
        self._seen = 0

    def place(self, key_hash: int) -> int | None:
        """The index where a key's entry begins; None if the key has no entry yet."""
        numbers = self._numbers
        if numbers[GENERATION] != self._generation:  # it was cleared; another worker writes it now
            self._generation = numbers[GENERATION]
            self._places.clear()
            self._seen = 0
        while self._seen < numbers[COUNT]:
            at = LEDGER_HEAD_LEN + self._seen * ENTRY_LEN
            self._places[numbers[at + HASH]] = at
            self._seen += 1
        return self._places.get(key_hash)

    def append(self, key_hash: int) -> int | None:
        """The index of a new entry; None if KEYS_MAX keys have entries already (keys were replaced again and again).

        The counts of a key without an entry aren't shared.
        """
        numbers = self._numbers
        count = numbers[COUNT]
        if count >= KEYS_MAX:
            return None
        at = LEDGER_HEAD_LEN + count * ENTRY_LEN
        numbers[at + HASH] = key_hash
        numbers[COUNT] = count + 1
        return at

    def entry(self, key_hash: int) -> MutableSequence[int] | None:
        """The numbers of a key, for their writer."""
        at = self.place(key_hash)
        if at is None:
            at = self.append(key_hash)
        return None if at is None else cast("MutableSequence[int]", self._numbers[at : at + ENTRY_LEN])

    def look(self, key_hash: int) -> Look | None:
        """This ledger's last look at a key's buckets."""
        at = self.place(key_hash)
        return None if at is None else _unpacked(self._numbers[at + LOOK : at + ENTRY_LEN].tolist())

    def spent(self, key_hash: int) -> Spent:
        at = self.place(key_hash)
        if at is None:
            return NOTHING
        numbers = self._numbers
        return Spent(numbers[at + REQUESTS], numbers[at + TOKENS], numbers[at + STREAMS])

    def sharers(self, key_hash: int) -> int:
        """In the ledger of other nodes: how many share the key's limits; 1 if they can ask each other."""
        at = self.place(key_hash)
        return 1 if at is None else max(1, self._numbers[at + SHARERS])

    def fold(self, other: KeyLedger) -> None:
        """Add the counts of a dead worker, except its running streams, which ended with it; take its look if newer."""
        numbers = other._numbers
        for k in range(numbers[COUNT]):
            at = LEDGER_HEAD_LEN + k * ENTRY_LEN
            entry = self.entry(numbers[at + HASH])
            if entry is None:
                continue
            for count in (REQUESTS, TOKENS):
                entry[count] = min(TOTAL_MAX, entry[count] + numbers[at + count])
            look, own = other.look(numbers[at + HASH]), self.look(numbers[at + HASH])
            if look is not None and (own is None or own[:2] < look[:2]):
                _write_look(entry, look)

    def clear(self) -> None:
        for k in range(COUNT, LEDGER_HEAD_LEN + self._numbers[COUNT] * ENTRY_LEN):
            self._numbers[k] = 0
        self._numbers[GENERATION] += 1


class KeySpending:
    """A key's numbers in the mapping (core/limits.py's SharedAccount): written here, read in all ledgers."""

    __slots__ = ("_entry", "_hash", "_ledgers", "_others")

    def __init__(self, key_hash: int, entry: MutableSequence[int], ledgers: Sequence[KeyLedger], own: int) -> None:
        """`entry` in the ledger of index `own` is this worker's; the last ledger is that of other nodes."""
        self._hash = key_hash
        self._entry = entry
        self._ledgers = ledgers
        self._others = [ledger for k, ledger in enumerate(ledgers) if k != own]

    def publish(self, spent: Spent) -> None:
        entry = self._entry
        entry[REQUESTS], entry[TOKENS], entry[STREAMS] = spent

    def keep(self, look: Look) -> None:
        _write_look(self._entry, look)

    def seen(self) -> tuple[Spent, Look | None]:
        """The counts of all other workers, including the dead, and of other nodes, and the newest look of any."""
        return _seen(self._hash, self._ledgers, self._others)

    def sharers(self) -> int:
        """The nodes that each have a share of the key's limits."""
        return self._ledgers[-1].sharers(self._hash)


def _seen(key_hash: int, looked_at: Sequence[KeyLedger], counted: Sequence[KeyLedger]) -> tuple[Spent, Look | None]:
    """The newest look of a key in some ledgers, and the sum of its counts in others."""
    requests = tokens = streams = 0
    newest: Look | None = None
    for ledger in looked_at:
        look = ledger.look(key_hash)
        if look is not None and (newest is None or look[:2] > newest[:2]):
            newest = look
    for ledger in counted:
        spent = ledger.spent(key_hash)
        requests, tokens, streams = requests + spent[0], tokens + spent[1], streams + spent[2]
    return Spent(requests, tokens, streams), newest


# Times are shared in microseconds, levels in millionths, both as unsigned numbers.
_MILLION = 1_000_000
_LEVEL_0 = 2**62  # the number of an empty bucket; debts lie below it
_NUMBER_MASK = 2**64 - 1
_WEIGHTS = range(1, LOOK_LEN)


def _packed(look: Look) -> list[int]:
    """A look as LOOK_LEN numbers: time, number; each bucket's level (0: none), forgiven debt, total; a check number."""
    numbers = [round(look.at * _MILLION), look.number]
    for bucket in (look.requests, look.tokens):
        if bucket is None:
            numbers += (0, 0, 0)
        else:
            forgiven = min(TOTAL_MAX, round(bucket.forgiven * _MILLION))
            numbers += (_LEVEL_0 + round(bucket.level * _MILLION), forgiven, min(TOTAL_MAX, bucket.total))
    return [*numbers, _check_number(numbers)]


def _check_number(numbers: Sequence[int]) -> int:
    total: int = 1 + sum(map(mul, numbers, _WEIGHTS))
    return total & _NUMBER_MASK


def _unpacked(numbers: Sequence[int]) -> Look | None:
    """The look that these numbers are; None if they are none, or are just being written."""
    if numbers[-1] != _check_number(numbers[:-1]):
        return None
    buckets = [
        Bucket((level - _LEVEL_0) / _MILLION, forgiven / _MILLION, total) if level else None
        for level, forgiven, total in (numbers[2:5], numbers[5:8])
    ]
    return Look(numbers[0] / _MILLION, numbers[1], *buckets)


def _write_look(entry: MutableSequence[int], look: Look) -> None:
    for k, number in enumerate(_packed(look), LOOK):
        entry[k] = number


class Shared:
    """The whole mapping. `slot` is this worker's; without a slot the mapping can only be read."""

    def __init__(self, fd: int, workers: int, names: Sequence[str], slot: int | None = None) -> None:
        if os.fstat(fd).st_size == 0:  # the first worker of the daemon; the others find the same size
            os.ftruncate(fd, size_bytes(workers))
        self._fd = fd
        self._map = mmap.mmap(fd, size_bytes(workers))
        numbers = memoryview(self._map).cast("Q")
        self._head: CounterRow = numbers[:HEAD_LEN]
        row_len = totals.LAYOUT.row_len
        rows_at, ledgers_at = HEAD_LEN, HEAD_LEN + (workers + 1) * row_len
        rows = [numbers[rows_at + k * row_len : rows_at + (k + 1) * row_len] for k in range(workers + 1)]
        self.base: CounterRow = rows[0]
        self.rows: list[CounterRow] = list(rows[1:])
        ledgers = [numbers[ledgers_at + k * LEDGER_LEN : ledgers_at + (k + 1) * LEDGER_LEN] for k in range(workers + 2)]
        self._ledgers = [KeyLedger(each) for each in ledgers]  # the base's first, that of other nodes last
        crossings_at = ledgers_at + (workers + 2) * LEDGER_LEN
        crossings = [numbers[crossings_at + k * CROSSINGS_LEN :][:CROSSINGS_LEN] for k in range(workers)]
        pairs_at = crossings_at + workers * CROSSINGS_LEN
        self._pairs_count = numbers[pairs_at : pairs_at + 1]
        self._pairs_bytes = numbers[pairs_at + 1 : pairs_at + PAIRS_LEN].cast("B")
        self._pairs: list[Served] = []  # as far as they were read
        self._sent = [each[:workers] for each in crossings]
        self._taken = [each[WORKERS_MAX:][:workers] for each in crossings]
        self.names = tuple(names)  # of upstreams, by index; only ever grows
        self._slot = slot

    @property
    def row(self) -> CounterRow:
        """This worker's row."""
        assert self._slot is not None
        return self.rows[self._slot]

    def publish(self, own: Totals) -> None:
        """Write this worker's numbers."""
        own.gauges["pid"] = os.getpid()
        totals.write(self.row, own, self.names, self.pairs())

    # -- live workers (net/peers.py's LivenessBoard)

    def beat(self, now: float) -> None:
        """This worker's loop has turned."""
        self.row[BEAT_AT] = int(now * 1000)

    def alive(self, slot: int, now: float) -> bool:
        return now * 1000 - self.rows[slot][BEAT_AT] < BEAT_STALE_S * 1000

    def connections(self, slot: int) -> int:
        return self.rows[slot][SharedNumber.CONNECTIONS.value] + sum(self._sent[slot]) - sum(self._taken[slot])

    def sent(self, slot: int) -> None:
        assert self._slot is not None
        self._sent[slot][self._slot] += 1

    def taken(self, sender: int) -> None:
        assert self._slot is not None
        self._taken[self._slot][sender] += 1

    # -- requests under way (net/upstream.py's InFlightBoard)

    def set_in_flight(self, upstream: str, count: int) -> None:
        """Publish the number of this worker's requests at an upstream: limits count the requests of all workers."""
        self.row[self._upstream_at("in_flight", upstream)] = count

    def in_flight_elsewhere(self, upstream: str) -> int:
        """The other workers' requests at an upstream. The sum may overshoot a limit by one request per worker."""
        at = self._upstream_at("in_flight", upstream)
        return sum(row[at] for slot, row in enumerate(self.rows) if slot != self._slot)

    def _upstream_at(self, gauge: str, upstream: str) -> int:
        index = self.names.index(upstream) if upstream in self.names else totals.UPSTREAMS_MAX - 1
        return totals.LAYOUT.at(gauge, min(index, totals.UPSTREAMS_MAX - 1))

    # -- warnings about servers (daemon/request_log.py's FaultBoard)

    def set_warned(self, upstream: str, minute: int, count: int) -> None:
        """Publish this worker's number of warnings in this minute."""
        self.row[self._upstream_at("warned", upstream)] = minute * WARNED_MAX + min(count, WARNED_MAX - 1)

    def warned_elsewhere(self, upstream: str, minute: int) -> int:
        """The other workers' warnings in this minute; the sum over all may overshoot by a warning per worker."""
        at = self._upstream_at("warned", upstream)
        counts = [divmod(row[at], WARNED_MAX) for slot, row in enumerate(self.rows) if slot != self._slot]
        return sum(count for when, count in counts if when == minute)

    # -- labels (net/served.py's ServedBoard)

    def pairs(self) -> list[Served]:
        """The pairs of upstream and model that requests are counted under, by index."""
        stride = PAIR_LEN * BYTES_PER_NUMBER
        while len(self._pairs) < self._pairs_count[0]:
            entry = self._pairs_bytes[len(self._pairs) * stride :][:stride]
            length = int.from_bytes(entry[:BYTES_PER_NUMBER], "little")
            text = bytes(entry[BYTES_PER_NUMBER : BYTES_PER_NUMBER + length]).decode()
            self._pairs.append(Served(*text.split("\n", 1)))
        return self._pairs

    def add_pair(self, pair: Served) -> bool:
        """Append a pair, unless another worker has done it. False: the list is full."""
        text = "\n".join(pair).encode()
        with self._alone():
            pairs = self.pairs()
            if pair in pairs:
                return True
            if len(pairs) >= PAIRS_MAX or len(text) > PAIR_TEXT_BYTES_MAX:
                return False
            at = len(pairs) * PAIR_LEN * BYTES_PER_NUMBER
            entry = len(text).to_bytes(BYTES_PER_NUMBER, "little") + text
            self._pairs_bytes[at : at + len(entry)] = entry
            self._pairs_count[0] = len(pairs) + 1
        return True

    # -- keys (core/limits.py's SpendingBoard)

    def account_of(self, key_id: str) -> KeySpending | None:
        """A key's place; None if this worker's ledger is full."""
        assert self._slot is not None
        key_hash, own = hash_of(key_id), 1 + self._slot
        entry = self._ledgers[own].entry(key_hash)
        return None if entry is None else KeySpending(key_hash, entry, self._ledgers, own)

    def usage_in_all(self, key_id: str) -> tuple[Spent, Look | None]:
        """The sum of all workers' and nodes' counts of a key, and the newest look of any worker."""
        return _seen(hash_of(key_id), self._ledgers, self._ledgers)

    def spent_elsewhere(self, key_id: str) -> Spent:
        """The counts of other nodes, as far as they are known here."""
        return self.heard_of(hash_of(key_id))

    # -- keys over all nodes (engine/key_limits.py's NodeBoard)

    @property
    def life(self) -> int:
        """A number that no other daemon's workers have."""
        if not self._head[LIFE]:
            with self._alone():
                self._head[LIFE] = self._head[LIFE] or 1 + secrets.randbits(62)
        return self._head[LIFE]

    def is_first(self, now: float) -> bool:
        """Whether no worker of a lower slot is ready: one worker speaks for all."""
        assert self._slot is not None
        return not any(self.alive(slot, now) for slot in range(self._slot))

    def spent_here(self, key_hash: int) -> Spent:
        """The sum of all workers' counts of a key."""
        return _seen(key_hash, (), self._ledgers[:-1])[0]

    def heard_of(self, key_hash: int) -> Spent:
        """The counts of other nodes that were shown last."""
        return self._ledgers[-1].spent(key_hash)

    def set_elsewhere(self, key_hash: int, spent: Spent, sharers: int) -> None:
        """Show the workers the counts of other nodes, and how many share the key's limits (1: none)."""
        entry = self._ledgers[-1].entry(key_hash)
        if entry is not None:
            entry[REQUESTS], entry[TOKENS], entry[STREAMS] = spent
            entry[SHARERS] = sharers

    # -- sums

    @property
    def started_at(self) -> float:
        """When the daemon started, in seconds of the clock that all its loops share."""
        return self._head[STARTED_MS] / 1000

    @started_at.setter
    def started_at(self, now: float) -> None:
        self._head[STARTED_MS] = int(now * 1000)

    def add_up(self) -> Totals:
        """The daemon's totals."""
        for _ in range(LOOKS_MAX):
            version = self._head[VERSION]
            if version % 2 == 0:
                summed = totals.add_up([self.base, *self.rows], self.names, self.pairs())
                if self._head[VERSION] == version:
                    return summed
            time.sleep(LOOK_AGAIN_S)
        return totals.add_up([self.base, *self.rows], self.names, self.pairs())

    def resident_bytes(self) -> int:
        """The measured memory of all workers."""
        return sum(row[RESIDENT_AT] for row in self.rows)

    def each(self) -> list[dict[str, int]]:
        """Every worker's gauges, for /status."""
        places = [(place.measure.name, place.at) for place in totals.LAYOUT.gauges]
        shown = [(name, at) for name, at in places if not name.endswith(("_ppm", "_ms"))]
        return [{name: row[at] for name, at in shown} for row in self.rows]

    def claim(self, started_at: float) -> None:
        """Begin in this worker's slot: fold the counts of its predecessor, unless another worker has done it."""
        self.started_at = started_at
        with self._folding():
            assert self._slot is not None
            self._fold(self._slot)
            self._head[OWNERS + self._slot] = os.getpid()

    def bury(self, slot: int, pid: int) -> None:
        """Fold the counts of the worker that has died in this slot, unless its successor has claimed the slot."""
        with self._folding():
            if self._head[OWNERS + slot] == pid:
                self._fold(slot)

    @contextlib.contextmanager
    def _folding(self) -> Iterator[None]:
        """Let a single process fold at a time."""
        with self._alone():
            self._head[VERSION] |= 1
            try:
                yield
            finally:
                self._head[VERSION] += 1

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Let a single process at a time change what belongs to all. The kernel takes the lock from one that dies."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def _fold(self, slot: int) -> None:
        base, ledger = self._ledgers[0], self._ledgers[1 + slot]
        totals.fold(self.base, self.rows[slot])
        base.fold(ledger)  # before clearing it: a limit may count it twice for a moment, and never misses it
        ledger.clear()
        self._head[OWNERS + slot] = 0


def hash_of(key_id: str) -> int:
    """The number of a key in the ledgers."""
    return int.from_bytes(hashlib.blake2b(key_id.encode(), digest_size=8).digest(), "little")


def size_bytes(workers: int) -> int:
    """The size of the mapping: the head; rows and ledgers of the base and of each worker; the ledger of other nodes;
    crossings; pairs.
    """
    rows_len, ledgers_len = (workers + 1) * totals.LAYOUT.row_len, (workers + 2) * LEDGER_LEN
    return (HEAD_LEN + rows_len + ledgers_len + workers * CROSSINGS_LEN + PAIRS_LEN) * BYTES_PER_NUMBER


def shared_alone() -> Shared:
    """A mapping of its own for the only worker of a daemon, in which it counts keys over all nodes."""
    return Shared(create(1), 1, (), 0)


def create(workers: int) -> int:
    """A new mapping, all zero: its descriptor."""
    fd = os.memfd_create("streamd-counters")
    os.ftruncate(fd, size_bytes(workers))
    return fd
