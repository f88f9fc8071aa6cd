"""Admission: whether a connection, a stream or a body may still come in, decided before anything is built for it.

The promise: streamd never ends a connection or a stream with a reader that it has admitted. So it lets one in only when
its whole price, the most that it can come to cost, still fits. Three parts, in the order in which a start goes through
them:

1. `Prices`, measured constants: the cost of a connection and of a stream, user space and kernel together.
2. `Budget`, their sum against a limit: memory, the kernel's TCP memory, file descriptors. It says, once, at start, how
   many connections and how many streams there may be.
3. `Admission`, the gates: integers that are compared and bumped on each arrival, and given back when it ends.

Why connections are limited to pairs. Nearly every connection carries a relayed stream, and it connects before it
asks. If connections alone could fill the memory (or the descriptors), a wave of them would take the room of the
streams that they came for. So a connection is admitted where a connection *and* its stream fit; only a
`streams_max` set lower by the operator (fan-out: many readers, few streams) frees the rest for connections.

Why logs have a budget of their own. A replay log is charged as it grows, but it grows after its stream was admitted.
The memory left when every pair has been paid for (at least `log_expected_bytes` for each), or `logs_bytes_max` if the
operator has set it, belongs to all logs together. The hub trims them to that, so growing logs never take the room of
admitted streams.

Several workers share a budget. Each bumps only its own row of a shared mapping and sums all of them: workers that each
let in the last connection at the same instant overshoot by workers - 1, which the reserve covers. Descriptors and loop
lag are a process's own.

A bound for all must not be one principal's. Where a stream finds no place, the caller's `give_way` may end a stream
without a reader, of the principal that holds most (core/hub.py), and its place is given again. And where strangers hold
every connection and the whole reserve, the operator's own listener still has connections that no other can use.

Rejected: taking measured memory alone for the gate (it lags behind an arrival by the seconds in which rings and logs
fill); a lock or a message to the parent on each arrival (a round trip for an error of one).
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Final

from streamd.choice import Choice
from streamd.core.bodies import BodyShares, Holders
from streamd.core.refusal import Refusal, Retry
from streamd.core.ring import SLOT_BYTES
from streamd.reasons import CloseReason

KIB: Final = 1024
MIB: Final = 1024 * 1024

# A sample of loop lag weighs one half, so one pause of twice the limit isn't enough but two in a row are.
LAG_WEIGHT: Final = 0.5

# Wait that the load puts on tokens (core/write_interval.py) from which a worker takes no new streams: five times the
# wait of a worker that is full and keeps up. Readers that are here already see their text come four times a second.
HELD_S_MAX: Final = 0.25

# Connections of the admin listener beyond all gates: a few operators with a page, a scraper and a shell each. No public
# listener can use them.
OPERATOR_CONNECTIONS_MAX: Final = 16

# Connections beyond the reserve that are told so, and linger for close_timeout: their descriptors are the process's
# base. A connection above this number is closed without a word.
TURNED_AWAY_MAX: Final = 16

# Bodies take at most an eighth of the memory, so a small machine with the default of 256 MiB still has room for
# readers.
BODIES_SHARE: Final = 8


class BudgetError(ValueError):
    """The limits are too small for the settings: a reason not to start. The text says which of them to change."""


@dataclass(frozen=True, slots=True)
class Prices:
    """Cost of a connection and a stream, in bytes; measured on Linux 6.18, CPython 3.11, uvloop 0.23; see loadtest/."""

    # Kernel, any socket: struct sock 2,368, inode and dentry 832 + 192, file 192, epoll item 128, binding and timers:
    # 4.1 KB of slab seen per socket over 10,000 idle ones.
    socket_bytes: int = 4_300

    # Kernel, send queue of a stalled reader (`ss -m`, w and f together): TCP_NOTSENT_LOWAT of unsent bytes, plus those
    # sent but not acknowledged when the peer's window closed. With 290 B frames at 1 to 20 ms, 230 of 240 readers took
    # 5 or 6 pages of 4 KiB, whatever their receive buffer (4 KB to the default), and none over 13; with frames of 60 B
    # to 32 KB it was 4 to 40 KB.
    notsent_lowat_bytes: int = 16 * KIB
    in_flight_bytes: int = 8 * KIB
    # A set SO_SNDBUF bounds the queue's true size at twice its value; 0: not set.
    sndbuf_bytes: int = 0
    # Unix-domain listeners have an SO_SNDBUF of 16 KiB instead: a true size of 32 KiB, where small frames count double.
    unix_queue_bytes: int = 32 * KIB

    # User space, per connection: protocol, uvloop's transport and handle, an idle request's state (5,000 measured).
    conn_user_bytes: int = 1_600
    # The bytes that a connection may hold, one kind at a time: a head that has begun, a full ring, or the piece of its
    # catch-up that the kernel didn't take.
    head_bytes_max: int = 16 * KIB
    catchup_bytes_max: int = 16 * KIB
    # A full ring: its slots' frames, never more than ring_bytes_max. Held until a coalescing reader lets its ring go.
    ring_slots: int = 64
    ring_bytes_max: int = 32 * KIB
    frame_bytes: int = 300  # a chat chunk of 200-250 B, its id line and chunk framing, and 33 B of a bytes object
    # TLS in process: OpenSSL's state and buffers, 17.7 KB after a handshake, 19.5 after large bodies, 22.3 with half a
    # record of a hostile client (loadtest/tls_price.py).
    tls_bytes: int = 24 * KIB

    # User space, per relayed stream: upstream protocol and transport, exchange, stream, subscriber, an empty ring, the
    # hub's entry, a log's template; with its connection 7.4 to 7.7 KB over 1,000 streams, 7.0 KB over 5,000.
    stream_user_bytes: int = 5_900
    # Kernel: the upstream's receive queue; read at once, so two frames' skbs at most times.
    upstream_queue_bytes: int = 2_000

    # A replay log of 500 tokens: the size kept free for each log. A log is charged as it really grows.
    log_expected_bytes: int = 5_632

    @property
    def send_queue_bytes(self) -> int:
        """Kernel memory of a stalled TCP reader's send queue."""
        unbounded = self.notsent_lowat_bytes + self.in_flight_bytes
        return min(unbounded, 2 * self.sndbuf_bytes) if self.sndbuf_bytes else unbounded

    @property
    def ring_bytes(self) -> int:
        """A full ring: its frames and its slots."""
        return min(self.ring_slots * self.frame_bytes, self.ring_bytes_max) + SLOT_BYTES * self.ring_slots

    @property
    def held_bytes(self) -> int:
        """The most that a connection holds of its client's or its stream's bytes."""
        return max(self.ring_bytes, self.head_bytes_max, self.catchup_bytes_max)

    @property
    def tcp_bytes(self) -> int:
        """Price of a connection of a TCP listener."""
        return self.conn_user_bytes + self.held_bytes + self.socket_bytes + self.send_queue_bytes

    @property
    def tls_tcp_bytes(self) -> int:
        """Price of a connection of a TLS listener."""
        return self.tcp_bytes + self.tls_bytes

    @property
    def unix_bytes(self) -> int:
        """Price of a connection of a Unix-domain listener."""
        return self.conn_user_bytes + self.held_bytes + self.socket_bytes + self.unix_queue_bytes

    @property
    def stream_bytes(self) -> int:
        """Price of a relayed stream without its log."""
        return self.stream_user_bytes + self.socket_bytes + self.upstream_queue_bytes


@dataclass(frozen=True, slots=True)
class Resources:
    """The limits that a budget is computed against."""

    memory_bytes: int
    memory_source: str  # "setting", "cgroup", "machine": for the start-up line
    descriptors_per_worker: int  # RLIMIT_NOFILE after it was raised
    workers: int = 1
    tcp_memory_bytes: int | None = None  # the middle of tcp_mem, where it can be read


@dataclass(frozen=True, slots=True)
class Demands:
    """Memory and descriptors taken off before the first connection, and the operator's own bounds (0: derive)."""

    process_bytes: int = 48 * MIB  # a worker at start: interpreter, uvloop, orjson, tables; 35-45 MiB of PSS seen
    parent_bytes: int = 0  # the process that starts the workers
    bodies_bytes_max: int = 256 * MIB  # request bodies being read, all together; at most an eighth of the memory
    logs_bytes_max: int = 0  # all logs together
    reserve_connections: int = 128  # health, metrics, DELETE and polite refusals, beyond the gates
    # listeners with their dups, epoll, pipes, log, files of a reload: 64; and the operator's, and those turned away
    descriptors_base: int = 64 + OPERATOR_CONNECTIONS_MAX + TURNED_AWAY_MAX
    conns_max: int = 0
    streams_max: int = 0


@dataclass(frozen=True, slots=True)
class Budget:
    """The sum: how many connections and streams fit, and by which bound. Made by `compute`, never changed."""

    resources: Resources
    demands: Demands
    prices: Prices
    connection_bytes: int  # the price of the dearest kind of connection that is listened for
    fixed: tuple[tuple[str, int], ...]  # bytes taken off before the first connection, by name
    available_bytes: int
    connections_max: int
    streams_max: int
    bodies_bytes_max: int
    logs_bytes_max: int  # all logs together; a worker's share is this divided by the number of workers
    limited_by: str

    @classmethod
    def compute(
        cls, resources: Resources, demands: Demands, prices: Prices, connection_bytes: int | None = None
    ) -> Budget:
        """The budget of these limits. `connection_bytes` is prices.tcp_bytes unless given.

        Raises BudgetError where no stream fits, or where the settings need more descriptors than the process may have.
        """
        price = prices.tcp_bytes if connection_bytes is None else connection_bytes
        bodies = min(demands.bodies_bytes_max, resources.memory_bytes // BODIES_SHARE)
        fixed = (
            (f"{resources.workers} worker(s)", resources.workers * demands.process_bytes),
            *([("parent", demands.parent_bytes)] if demands.parent_bytes else ()),
            ("request bodies", bodies),
            ("reserve", resources.workers * demands.reserve_connections * price),
        )
        available = resources.memory_bytes - sum(size for _, size in fixed)
        log = 0 if demands.logs_bytes_max else prices.log_expected_bytes
        fits = {
            "memory": _fit(available - demands.logs_bytes_max, price, prices.stream_bytes + log, demands.streams_max),
            "descriptors": _fit_descriptors(resources, demands),
        }
        if resources.tcp_memory_bytes is not None:
            fits["tcp_mem"] = _fit(
                resources.tcp_memory_bytes, prices.send_queue_bytes, prices.upstream_queue_bytes, demands.streams_max
            )
        if demands.conns_max:
            fits["conns_max"] = (demands.conns_max, demands.streams_max or demands.conns_max)
        limited_by = min(fits, key=lambda part: fits[part][0])
        connections, streams = (min(counts) for counts in zip(*fits.values(), strict=True))
        _check_fits(resources, demands, available, connections, streams, fits["descriptors"][0])
        return cls(
            resources=resources,
            demands=demands,
            prices=prices,
            connection_bytes=price,
            fixed=fixed,
            available_bytes=available,
            connections_max=connections,
            streams_max=streams,
            bodies_bytes_max=bodies,
            logs_bytes_max=demands.logs_bytes_max or available - connections * price - streams * prices.stream_bytes,
            limited_by=limited_by,
        )

    @property
    def descriptors_max(self) -> int:
        """Descriptors of one worker that connections and upstreams may use."""
        demands = self.demands
        return self.resources.descriptors_per_worker - demands.descriptors_base - demands.reserve_connections

    def describe(self) -> str:
        """The line of the start-up log, for people."""
        fixed = ", ".join(f"{name} {_size(size)}" for name, size in self.fixed)
        return (
            f"budget: memory {_size(self.resources.memory_bytes)} ({self.resources.memory_source})"
            f" less {fixed} leaves {_size(self.available_bytes)};"
            f" a connection costs {_size(self.connection_bytes)},"
            f" a stream {_size(self.prices.stream_bytes)} and its log as it grows;"
            f" at most {self.connections_max} connections and {self.streams_max} streams (by {self.limited_by}),"
            f" logs together {_size(self.logs_bytes_max)}"
        )

    def status(self) -> dict[str, object]:
        """The budget for /status. Sizes in bytes."""
        return {
            "memory_limit_bytes": self.resources.memory_bytes,
            "memory_limit_source": self.resources.memory_source,
            "subtracted_bytes": dict(self.fixed),
            "available_bytes": self.available_bytes,
            "connection_bytes": self.connection_bytes,
            "stream_bytes": self.prices.stream_bytes,
            "log_expected_bytes": self.prices.log_expected_bytes,
            "logs_bytes_max": self.logs_bytes_max,
            "connections_max": self.connections_max,
            "streams_max": self.streams_max,
            "descriptors_per_worker": self.descriptors_max,
            "limited_by": self.limited_by,
        }


def _fit(room: int, connection: int, stream: int, streams_max: int) -> tuple[int, int]:
    """Connections and streams that fit into `room` together, for pairs unless streams are bounded lower."""
    pairs = room // (connection + stream)
    if not streams_max or streams_max >= pairs:
        return pairs, pairs
    return (room - streams_max * stream) // connection, streams_max


def _fit_descriptors(resources: Resources, demands: Demands) -> tuple[int, int]:
    """Connections and streams that the descriptors of all workers suffice for: a pair takes two, with its upstream."""
    room = resources.descriptors_per_worker - demands.descriptors_base - demands.reserve_connections
    return _fit(room * resources.workers, 1, 1, demands.streams_max)


def _check_fits(
    resources: Resources, demands: Demands, available: int, connections: int, streams: int, by_descriptors: int
) -> None:
    """Raise BudgetError for limits too small to admit anything, and for a conns_max beyond the descriptors."""
    limit = resources.descriptors_per_worker
    if by_descriptors < max(1, demands.conns_max):
        raise BudgetError(
            f"RLIMIT_NOFILE is {limit}: room for {max(0, by_descriptors)} connections with a stream each"
            f" (two descriptors a pair, {demands.descriptors_base + demands.reserve_connections} kept back),"
            f" {max(1, demands.conns_max)} wanted; raise LimitNOFILE or lower conns_max"
        )
    if connections < 1 or streams < 1:
        raise BudgetError(
            f"the memory limit is {_size(resources.memory_bytes)} ({resources.memory_source}) and"
            f" {_size(resources.memory_bytes - available)} of it is taken before the first connection:"
            " raise memory_limit, or lower bodies_bytes_max or workers"
        )


def _size(size: int) -> str:
    """A size as people read it."""
    if abs(size) >= 1024 * MIB:
        return f"{size / (1024 * MIB):.1f} GiB"
    if abs(size) >= 10 * MIB:
        return f"{size / MIB:.0f} MiB"
    return f"{size / KIB:.1f} KiB"


class Gate(Choice):
    """The gate that refused: the label of refusals, and of saturation's parts."""

    CONNECTIONS = "connections"
    ADDRESS = "address"
    STREAMS = "streams"
    UPSTREAM = "upstream"
    MEMORY = "memory"
    BODIES = "bodies"
    DESCRIPTORS = "descriptors"
    LOOP_LAG = "loop_lag"


class SharedNumber(enum.IntEnum):
    """Index of each shared number in a worker's row: u64, written by that worker only."""

    CONNECTIONS = 0
    STREAMS = 1
    UPSTREAM = 2
    MEMORY = 3  # bytes charged: connections, streams, logs
    BODIES = 4


# Plain ints: an IntEnum member as an index costs 60 ns more.
_CONNECTIONS: Final = SharedNumber.CONNECTIONS.value
_STREAMS: Final = SharedNumber.STREAMS.value
_UPSTREAM: Final = SharedNumber.UPSTREAM.value
_MEMORY: Final = SharedNumber.MEMORY.value
_BODIES: Final = SharedNumber.BODIES.value


REFUSALS: Final = {
    Gate.CONNECTIONS: Refusal(
        CloseReason.OVER_BUDGET,
        "over_capacity",
        "The server has as many connections as its memory allows. Try again later.",
        retry=Retry.WITH_ROOM,
    ),
    Gate.ADDRESS: Refusal(
        CloseReason.RATE_LIMITED,
        "too_many_connections",
        "Too many connections from your address. Close some, or try again later.",
        retry=Retry.WITH_ROOM,
    ),
    Gate.STREAMS: Refusal(
        CloseReason.OVER_BUDGET,
        "over_capacity",
        "The server has as many streams as its memory allows. Try again later.",
        retry=Retry.WITH_ROOM,
    ),
    Gate.UPSTREAM: Refusal(
        CloseReason.OVER_BUDGET,
        "over_capacity",
        "As many requests as allowed are under way to the inference servers. Try again later.",
        retry=Retry.WITH_ROOM,
    ),
    Gate.MEMORY: Refusal(
        CloseReason.OVER_BUDGET,
        "over_capacity",
        "The server's memory budget is used up. Try again later.",
        retry=Retry.WITH_ROOM,
    ),
    Gate.BODIES: Refusal(
        CloseReason.OVER_BUDGET,
        "bodies_over_budget",
        "Too many large request bodies are being received. Try again later.",
        retry=Retry.WITH_ROOM,
    ),
    Gate.DESCRIPTORS: Refusal(
        CloseReason.OVER_BUDGET,
        "over_capacity",
        "The server has as many connections as its file limit allows. Try again later.",
        retry=Retry.WITH_ROOM,
    ),
    Gate.LOOP_LAG: Refusal(
        CloseReason.OVER_BUDGET,
        "over_capacity",
        "The server is overloaded. Try again later.",
        retry=Retry.WITH_ROOM,
    ),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """The gates that aren't computed. 0: off."""

    conns_per_address_max: int = 0
    upstream_in_flight_max: int = 0
    loop_lag_max_s: float = 1.0  # 20 tokens' time
    body_bytes_max: int = 0  # the largest body, which any client may send alone


def address_key(address: str) -> str:
    """The key that a client is counted by: its IPv4 address, or its IPv6 /64 (a customer's network, RFC 6177).

    An IPv4-mapped IPv6 address counts as its IPv4 address; a zone is left out. Raises ValueError for anything else.
    """
    if "." in address and ":" not in address:
        return address
    parsed = ipaddress.IPv6Address(address.partition("%")[0])
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return f"{ipaddress.IPv6Address(int(parsed) >> 64 << 64)}/64"


class AddressGate:
    """A count for each client address; an address whose count is 0 takes no room. Keys come from `address_key`."""

    __slots__ = ("_counts", "count_max")

    def __init__(self, count_max: int) -> None:
        self.count_max = count_max  # 0: off
        self._counts: dict[str, int] = {}  # at most one entry per connection

    def has_room(self, key: str) -> bool:
        """Whether `key` may have another."""
        return not self.count_max or self._counts.get(key, 0) < self.count_max

    def take(self, key: str) -> None:
        """Raise the count of `key` by 1."""
        self._counts[key] = self._counts.get(key, 0) + 1

    def give_back(self, key: str) -> None:
        """Lower the count of `key` by 1."""
        left = self._counts[key] - 1
        if left:
            self._counts[key] = left
        else:
            del self._counts[key]

    def __len__(self) -> int:
        return len(self._counts)


GiveWay = Callable[[bool], bool]
"""Frees a stream's place that another principal holds; True for a place of a relayed stream. Returns whether it did."""


def stands_firm(relayed: bool) -> bool:
    """Free no place."""
    return False


@dataclass(slots=True)
class _Own:
    """Counts of this process, which other workers don't see."""

    idle_upstreams: int = 0  # pooled connections: a descriptor each
    reserved: int = 0  # connections beyond the gates
    operators: int = 0  # of the admin listener, beyond the gates
    turned_away: int = 0  # connections beyond the reserve that linger
    held_bytes: int = 0  # charged beside the prices
    lag_s: float = 0.0
    held_s: float = 0.0  # how long tokens wait for the load's sake
    resident_bytes: int = 0  # measured over all workers; the latest value
    refused: dict[Gate, int] = field(default_factory=lambda: dict.fromkeys(Gate, 0))


class Admission:
    """The gates of one worker. Every admit has its release; both are O(1) and keep nothing for the admitted.

    `row` is this worker's numbers (len(SharedNumber) of them), `peer_rows` those of the others: lists in a single
    process, slices of the shared mapping else.
    """

    __slots__ = (
        "_budget",
        "_limits",
        "_own",
        "_peer_rows",
        "_row",
        "_shares",
        "_stream_bytes",
        "_upstream_max",
        "addresses",
        "head_bytes_max",
    )

    def __init__(
        self,
        budget: Budget,
        limits: Limits,
        row: MutableSequence[int] | None = None,
        peer_rows: Sequence[Sequence[int]] = (),
    ) -> None:
        # process
        self._budget = budget
        self._limits = limits
        self._row: MutableSequence[int] = [0] * len(SharedNumber) if row is None else row
        self._peer_rows = peer_rows
        self._upstream_max = limits.upstream_in_flight_max or budget.streams_max
        self._take_prices()
        self._own = _Own()
        self._shares = BodyShares()
        self.addresses = AddressGate(limits.conns_per_address_max)
        assert len(self._row) == len(SharedNumber)

    def reload(self, budget: Budget, limits: Limits) -> None:
        """Decide by these from now on. Admitted connections and streams stay, even more of them than now fit."""
        self._budget = budget
        self._limits = limits
        self._upstream_max = limits.upstream_in_flight_max or budget.streams_max
        self._take_prices()
        self.addresses.count_max = limits.conns_per_address_max

    def _take_prices(self) -> None:
        prices = self._budget.prices
        self._stream_bytes = prices.stream_bytes
        self.head_bytes_max = prices.held_bytes  # the part of a head that a connection's price covers

    # Connections

    def admit_connection(self, price_bytes: int) -> Refusal | None:
        """Count a connection of a listener whose price is `price_bytes`, or return the refusal."""
        if self._total(_CONNECTIONS) >= self._budget.connections_max:
            return self._refuse(Gate.CONNECTIONS)
        if self.descriptors >= self._budget.descriptors_max:
            return self._refuse(Gate.DESCRIPTORS)
        if not self._fits(price_bytes):
            return self._refuse(Gate.MEMORY)
        self._row[_CONNECTIONS] += 1
        self._row[_MEMORY] += price_bytes
        return None

    def release_connection(self, price_bytes: int) -> None:
        """Undo `admit_connection`, at the same price."""
        assert self._row[_CONNECTIONS] > 0
        self._row[_CONNECTIONS] -= 1
        self._row[_MEMORY] -= price_bytes

    def adopt_connection(self, price_bytes: int) -> None:
        """Count a connection that another worker admitted and handed over; that worker takes it off its own count."""
        self._row[_CONNECTIONS] += 1
        self._row[_MEMORY] += price_bytes

    def refuse_address(self) -> Refusal:
        """Count and return the refusal of a client whose address has no room in `addresses`, or in a gate like it."""
        return self._refuse(Gate.ADDRESS)

    def refuse_descriptors(self) -> Refusal:
        """Count and return the refusal of a connection for which the kernel has no descriptor left."""
        return self._refuse(Gate.DESCRIPTORS)

    def take_reserved(self) -> bool:
        """Take a place of the reserve for a connection that was refused.

        On it, the client may ask for health, metrics or DELETE, and gets a polite refusal for anything else. False: the
        reserve is used up, refuse without reading.
        """
        if self._own.reserved >= self._budget.demands.reserve_connections:
            return False
        self._own.reserved += 1
        return True

    def release_reserved(self) -> None:
        """Give a place of the reserve back."""
        assert self._own.reserved > 0
        self._own.reserved -= 1

    def take_operators(self) -> bool:
        """Take a place of the operator's for a connection of the admin listener that was refused."""
        if self._own.operators >= OPERATOR_CONNECTIONS_MAX:
            return False
        self._own.operators += 1
        return True

    def release_operators(self) -> None:
        """Give a place of the operator's back."""
        assert self._own.operators > 0
        self._own.operators -= 1

    def take_turned_away(self) -> bool:
        """Take a place for a connection beyond the reserve, until it is closed. False: close it without a word."""
        if self._own.turned_away >= TURNED_AWAY_MAX:
            return False
        self._own.turned_away += 1
        return True

    def release_turned_away(self) -> None:
        """Give a place of `take_turned_away` back."""
        assert self._own.turned_away > 0
        self._own.turned_away -= 1

    # Streams

    def admit_relay(self, give_way: GiveWay = stands_firm) -> Refusal | None:
        """Count a stream and its upstream connection, before the upstream is asked; or return the refusal.

        `give_way` may free a place that another holds.
        """
        if self._has_all_for_relay():
            self._row[_STREAMS] += 1
            self._row[_MEMORY] += self._stream_bytes
            self._row[_UPSTREAM] += 1
            return None
        if self._lacks_upstream() and not (give_way(True) and not self._lacks_upstream()):
            return self._refuse(Gate.UPSTREAM)
        if self._lacks_descriptors() and not (give_way(True) and not self._lacks_descriptors()):
            return self._refuse(Gate.DESCRIPTORS)
        refusal = self.admit_stream(give_way)
        if refusal is None:
            self._row[_UPSTREAM] += 1
        return refusal

    def release_relay(self) -> None:
        """Undo `admit_relay`: the upstream is done and the stream sealed. Its log stays charged."""
        assert self._row[_UPSTREAM] > 0
        self._row[_UPSTREAM] -= 1
        self.release_stream()

    def adopt_relay(self) -> None:
        """Count a request to an upstream that another process admitted, with its place for a stream."""
        self._row[_UPSTREAM] += 1
        self.adopt_stream()

    def _has_all_for_relay(self) -> bool:
        """Whether no gate is shut for a stream from an upstream, all of them looked at in a single pass."""
        row, own, budget = self._row, self._own, self._budget
        streams, upstreams, memory = row[_STREAMS], row[_UPSTREAM], row[_MEMORY]
        descriptors = row[_CONNECTIONS] + upstreams
        for other in self._peer_rows:
            streams += other[_STREAMS]
            upstreams += other[_UPSTREAM]
            memory += other[_MEMORY]
        return (
            upstreams < self._upstream_max
            and descriptors < budget.descriptors_max
            and streams < budget.streams_max
            and memory + self._stream_bytes <= budget.available_bytes
            and own.resident_bytes <= budget.resources.memory_bytes
            and self._lateness() <= 1
        )

    def _lacks_upstream(self) -> bool:
        return self._total(_UPSTREAM) >= self._upstream_max

    def _lacks_descriptors(self) -> bool:
        # The request takes a pooled connection, or closes it for a new connection: either way its descriptor is free.
        return self.descriptors - self._own.idle_upstreams >= self._budget.descriptors_max

    def _lacks_stream(self) -> bool:
        return self._total(_STREAMS) >= self._budget.streams_max

    def admit_stream(self, give_way: GiveWay = stands_firm) -> Refusal | None:
        """Count a published stream, which has no upstream, at the price of a stream; or return the refusal.

        `give_way` may free a place that another holds.
        """
        if self._lacks_stream() and not (give_way(False) and not self._lacks_stream()):
            return self._refuse(Gate.STREAMS)
        price_bytes = self._stream_bytes
        if not self._fits(price_bytes) and not (give_way(False) and self._fits(price_bytes)):
            return self._refuse(Gate.MEMORY)
        if self._lateness() > 1:
            return self._refuse(Gate.LOOP_LAG)
        self._row[_STREAMS] += 1
        self._row[_MEMORY] += price_bytes
        return None

    def adopt_stream(self) -> None:
        """Count a published stream that another process admitted."""
        self._row[_STREAMS] += 1
        self._row[_MEMORY] += self._stream_bytes

    def release_stream(self) -> None:
        """Undo `admit_stream`: the stream is sealed."""
        assert self._row[_STREAMS] > 0
        self._row[_STREAMS] -= 1
        self._row[_MEMORY] -= self._stream_bytes

    def charge_logs(self, delta_bytes: int) -> None:
        """Charge growth of the logs (negative: they shrank). Never refused: the hub keeps to `logs_bytes_max`."""
        self._row[_MEMORY] += delta_bytes

    def charge_held(self, delta_bytes: int) -> None:
        """Charge bytes that are held beside the prices: of heads and of events that have begun (negative: let go).

        Never refused, because a stream that was admitted goes on: a head has head_bytes_max, an event event_bytes_max.
        New arrivals are refused while they take the room, and the logs give way.
        """
        self._row[_MEMORY] += delta_bytes
        self._own.held_bytes += delta_bytes

    # Bodies

    def admit_body(self, size_bytes: int, holders: Holders = ()) -> Refusal | None:
        """Count `size_bytes` more of a request body for its holders, or return the refusal."""
        free_bytes = self._budget.bodies_bytes_max - self._total(_BODIES) - size_bytes
        most = self._limits.body_bytes_max
        if free_bytes < 0 or not self._shares.has_room(holders, size_bytes, free_bytes, most):
            return self._refuse(Gate.BODIES)
        self._row[_BODIES] += size_bytes
        self._shares.take(holders, size_bytes)
        return None

    def adopt_body(self, size_bytes: int, holders: Holders = ()) -> None:
        """Count bytes of a request body that another process admitted."""
        self._row[_BODIES] += size_bytes
        self._shares.take(holders, size_bytes)

    def release_body(self, size_bytes: int, holders: Holders = ()) -> None:
        """Give `size_bytes` of `admit_body` back."""
        assert self._row[_BODIES] >= size_bytes
        self._row[_BODIES] -= size_bytes
        self._shares.give_back(holders, size_bytes)

    # Measurements

    def note_idle_upstreams(self, count: int) -> None:
        """Note the number of open pooled upstream connections."""
        self._own.idle_upstreams = count

    def note_lag(self, late_s: float) -> None:
        """Note how late the loop ran a timer. Called by each sweep."""
        self._own.lag_s += (late_s - self._own.lag_s) * LAG_WEIGHT

    def note_held(self, held_s: float) -> None:
        """Note how long tokens wait for the load's sake. Called by each sweep."""
        self._own.held_s = held_s

    def note_resident(self, size_bytes: int) -> None:
        """Note the measured memory of all workers, as a second opinion: over the limit nothing new is let in."""
        self._own.resident_bytes = size_bytes

    # Reading

    @property
    def prices(self) -> Prices:
        """The prices of this budget."""
        return self._budget.prices

    @property
    def lag_s(self) -> float:
        """How late this worker's loop is, smoothed."""
        return self._own.lag_s

    @property
    def reserved(self) -> int:
        """This worker's connections beyond the gates."""
        return self._own.reserved

    @property
    def bodies_bytes(self) -> int:
        """Request bodies that this worker holds."""
        return self._row[_BODIES]

    @property
    def descriptors(self) -> int:
        """Descriptors in use by this worker for connections and upstreams."""
        return self._row[_CONNECTIONS] + self._row[_UPSTREAM] + self._own.idle_upstreams

    @property
    def waiters_max(self) -> int:
        """This worker's share of the readers that may wait for a name: they leave a quarter of all connections."""
        return max(1, self._budget.connections_max * 3 // 4 // self._budget.resources.workers)

    @property
    def logs_bytes_max(self) -> int:
        """This worker's share of the logs' budget, less the bytes held beside the prices; at least half of it."""
        share = self._budget.logs_bytes_max // self._budget.resources.workers
        return max(share // 2, share - self._own.held_bytes)

    def saturation(self) -> dict[str, float]:
        """How full each part is, 0…1."""
        budget, own = self._budget, self._own
        charged = self._total(_MEMORY) / budget.available_bytes
        measured = own.resident_bytes / budget.resources.memory_bytes
        parts = {
            Gate.CONNECTIONS: self._total(_CONNECTIONS) / budget.connections_max,
            Gate.STREAMS: self._total(_STREAMS) / budget.streams_max,
            Gate.UPSTREAM: self._total(_UPSTREAM) / self._upstream_max,
            Gate.MEMORY: max(charged, measured),
            Gate.BODIES: self._total(_BODIES) / budget.bodies_bytes_max,
            Gate.DESCRIPTORS: self.descriptors / budget.descriptors_max,
            Gate.LOOP_LAG: self._lateness(),
        }
        return {gate.value: min(1.0, max(0.0, part)) for gate, part in parts.items()}

    def saturation_highest(self) -> float:
        """The fullest part: the number for an autoscaler."""
        return max(self.saturation().values())

    def refused(self) -> dict[str, int]:
        """Refusals of this worker since it started, by gate."""
        return {gate.value: count for gate, count in self._own.refused.items()}

    def describe(self) -> str:
        """The start-up line: the budget's."""
        return self._budget.describe()

    def status(self) -> dict[str, object]:
        """The budget, its use by all workers, and this worker's refusals, for /status."""
        return {
            "budget": self._budget.status(),
            "in_use": {number.name.lower(): self._total(number.value) for number in SharedNumber},
            "resident_bytes": self._own.resident_bytes,
            "descriptors": self.descriptors,
            "reserved": self._own.reserved,
            "loop_lag_s": round(self._own.lag_s, 4),
            "saturation": self.saturation(),
            "refused": self.refused(),
        }

    def _lateness(self) -> float:
        """How late this worker and its tokens are, as a share of the limits; 0 while that gate is off."""
        limit_s, own = self._limits.loop_lag_max_s, self._own
        return max(own.lag_s / limit_s, own.held_s / HELD_S_MAX) if limit_s > 0 else 0.0

    def _total(self, slot: int) -> int:
        total = self._row[slot]
        for row in self._peer_rows:
            total += row[slot]
        return total

    def _fits(self, price_bytes: int) -> bool:
        budget = self._budget
        return (
            self._total(_MEMORY) + price_bytes <= budget.available_bytes
            and self._own.resident_bytes <= budget.resources.memory_bytes
        )

    def _refuse(self, gate: Gate) -> Refusal:
        self._own.refused[gate] += 1
        return REFUSALS[gate]
