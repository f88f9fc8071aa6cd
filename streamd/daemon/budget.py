"""Makes the admission gates: feeds core/admission.py with the settings and with the limits of this machine."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence

from streamd.addresses import parse_address
from streamd.config import Settings
from streamd.core.admission import Admission, Budget, Demands, Limits, Prices, Resources
from streamd.daemon import machine
from streamd.daemon.listen import DUPS
from streamd.net.peers import DESCRIPTORS_MAX

# Descriptors of a worker for neither connections, listeners nor peers: epoll, pipes, the loop's own, standard streams,
# the mapping, files of a reload and of a certificate, name look-ups.
OTHER_DESCRIPTORS = 32

# Memory reserved for the parent process: 10 to 13 MiB of PSS (make bench-start), with some room.
PARENT_BYTES = 16 * 1024 * 1024


# Memory reserved in each worker where a collector gets spans: the packages 12 MiB, and 2,048 spans that wait, of 4 KB.
OTEL_BYTES = 20 * 1024 * 1024


def prices_of(settings: Settings) -> Prices:
    """The memory prices of connections and streams under these settings."""
    return Prices(
        notsent_lowat_bytes=settings.notsent_lowat_bytes,
        ring_slots=settings.ring_slots,
        ring_bytes_max=settings.ring_bytes_max,
        head_bytes_max=settings.head_bytes_max,
        catchup_bytes_max=settings.catchup_bytes_max,
    )


def budget_of(settings: Settings) -> Budget:
    """The budget of the whole daemon. Raises BudgetError if the machine's limits are too small for the settings."""
    memory_bytes, source = machine.memory_limit(settings.memory_limit_bytes)
    resources = Resources(
        memory_bytes=memory_bytes,
        memory_source=source,
        descriptors_per_worker=machine.raise_descriptors(),
        workers=settings.workers,
        tcp_memory_bytes=machine.tcp_memory(),
    )
    demands = Demands(
        process_bytes=Demands().process_bytes + (OTEL_BYTES if settings.otlp_endpoint else 0),
        parent_bytes=PARENT_BYTES,
        bodies_bytes_max=settings.bodies_bytes_max,
        logs_bytes_max=settings.logs_bytes_max,
        conns_max=settings.conns_max,
        streams_max=settings.streams_max,
        descriptors_base=descriptors_base(settings),
    )
    prices = prices_of(settings)
    return Budget.compute(resources, demands, prices, max(price_of(settings, each) for each in settings.listen))


def descriptors_base(settings: Settings) -> int:
    """Descriptors of a worker that aren't connections: listeners with their dups, peers, and OTHER_DESCRIPTORS."""
    listeners = len(settings.listen) * (1 + DUPS) + 2 * bool(settings.admin) + 2 * bool(settings.metrics_listen)
    # Two connections to each server of the engine, and one to a sentinel of it, and as many that are being made.
    listeners += 6 * len(settings.engine)
    # An outlet to each worker, the inbox, and the descriptors that wait to be sent.
    peers = settings.workers + 1 + DESCRIPTORS_MAX if settings.workers > 1 else 0
    return OTHER_DESCRIPTORS + listeners + peers


def price_of(settings: Settings, address: str) -> int:
    """The memory that a connection of this listener is charged."""
    prices = prices_of(settings)
    if parse_address(address).is_unix:
        return prices.unix_bytes
    return prices.tls_tcp_bytes if settings.tls_cert else prices.tcp_bytes


def admission_of(
    settings: Settings,
    budget: Budget,
    row: MutableSequence[int] | None = None,
    peer_rows: Sequence[Sequence[int]] = (),
) -> Admission:
    """The admission gates of a worker."""
    return Admission(budget, limits_of(settings), row, peer_rows)


def limits_of(settings: Settings) -> Limits:
    """The limits that come from settings and not from the budget."""
    return Limits(
        conns_per_address_max=settings.conns_per_address_max,
        loop_lag_max_s=settings.loop_lag_max_s,
        body_bytes_max=settings.body_bytes_max,
    )
