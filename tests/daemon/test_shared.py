"""The memory that all workers share: sums that never fall, ledgers of keys, liveness."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import pytest

from streamd.core.auth import Key
from streamd.core.keys import KEYS_MAX
from streamd.core.limits import NOTHING, Accounts, Spent
from streamd.counters import Counters
from streamd.daemon import shared as shared_module
from streamd.daemon.shared import BEAT_STALE_S, VERSION, Shared, create
from streamd.net import totals
from streamd.net.totals import CounterRow, Totals

WORKERS = 3


@pytest.fixture
def fd() -> Iterator[int]:
    made = create(WORKERS)
    yield made
    os.close(made)


def worker(fd: int, slot: int) -> Shared:
    return Shared(fd, WORKERS, ["up"], slot)


def key(**limits: int) -> Key:
    return Key(id="k1", name="alice", salt=b"", digest=b"", **limits)  # type: ignore[arg-type]


def accounts_of(fd: int, slot: int) -> Accounts:
    accounts = Accounts()
    accounts.board = worker(fd, slot)
    return accounts


def test_every_worker_sees_the_sums_of_all_workers(fd: int) -> None:
    for slot in range(WORKERS):
        counters = Counters()
        counters.requests = 10 ** (slot + 1)
        worker(fd, slot).publish(Totals(counters, gauges={"connections": slot}))
    assert {worker(fd, slot).add_up().counters.requests for slot in range(WORKERS)} == {1110}
    shown = Shared(fd, WORKERS, []).each()
    assert [each["connections"] for each in shown] == [0, 1, 2]
    assert {each["pid"] for each in shown} == {os.getpid()}
    worker(fd, 0).claim(12.5)
    assert worker(fd, 1).started_at == 12.5


def test_a_sum_never_falls_while_a_worker_is_buried(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    burier, reader, writer = Shared(fd, WORKERS, ["up"]), worker(fd, 0), worker(fd, 1)
    counters = Counters()
    counters.requests = 1000
    writer.publish(Totals(counters))
    add_up, looks = totals.add_up, 0

    def torn(rows: Sequence[CounterRow], names: Sequence[str]) -> Totals:
        """The first attempt reads the base row, then the worker is buried, then it reads the other rows."""
        nonlocal looks
        looks += 1
        base = list(rows[0])
        if looks == 1:
            burier.bury(1, 0)
        return add_up([base, *rows[1:]], names)

    monkeypatch.setattr(totals, "add_up", torn)
    assert reader.add_up().counters.requests == 1000
    assert looks == 2


def test_the_counts_of_a_dead_worker_are_folded_once(fd: int) -> None:
    counters = Counters()
    counters.requests = 1000
    successor, other = worker(fd, 1), worker(fd, 0)
    worker(fd, 1).publish(Totals(counters, gauges={"connections": 5}))
    successor.claim(1.0)
    summed = other.add_up()
    assert (summed.counters.requests, summed.gauges["connections"]) == (1000, 0)
    successor.publish(Totals(Counters(), gauges={"connections": 7}))
    other.bury(1, os.getpid() + 1)  # an order that comes late
    assert other.add_up().gauges["connections"] == 7
    other.bury(1, os.getpid())
    other.bury(1, os.getpid())
    summed = other.add_up()
    assert (summed.counters.requests, summed.gauges["connections"]) == (1000, 0)


def test_after_a_torn_fold_the_next_fold_makes_the_sum_whole(fd: int) -> None:
    one = worker(fd, 0)
    one._head[VERSION] = 3  # a worker died in the middle of it
    one.bury(1, 0)
    assert one._head[VERSION] == 4


def test_the_first_worker_lays_the_mapping_out() -> None:
    fd = os.memfd_create("empty")
    worker(fd, 0).publish(Totals(Counters(), gauges={"connections": 7}))
    assert worker(fd, 1).add_up().gauges["connections"] == 7
    os.close(fd)


def test_a_worker_that_was_killed_while_it_folded_counts_stops_no_sum(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_module, "LOOK_AGAIN_S", 0)
    reader = worker(fd, 0)
    reader._head[VERSION] = 1
    assert reader.add_up().counters.requests == 0


def test_requests_in_flight_at_other_workers_are_known(fd: int) -> None:
    one, two = worker(fd, 0), worker(fd, 1)
    one.set_in_flight("up", 3)
    two.set_in_flight("up", 4)
    two.set_in_flight("not in the list yet", 9)
    assert (one.in_flight_elsewhere("up"), two.in_flight_elsewhere("up")) == (4, 3)
    assert worker(fd, 2).in_flight_elsewhere("up") == 7
    Shared(fd, WORKERS, ["up"]).bury(1, 0)
    assert one.in_flight_elsewhere("up") == 0


def test_a_worker_lives_while_its_beat_is_fresh(fd: int) -> None:
    one, two = worker(fd, 0), worker(fd, 1)
    assert not one.alive(1, 1000.0)
    two.beat(1000.0)
    assert one.alive(1, 1000.0) and one.alive(1, 1000.0 + BEAT_STALE_S - 0.1)
    assert not one.alive(1, 1000.0 + BEAT_STALE_S)
    Shared(fd, WORKERS, []).bury(1, 0)
    assert not one.alive(1, 1000.0)


# -- limits of keys


def test_a_limit_holds_for_all_workers_together(fd: int) -> None:
    every = [accounts_of(fd, slot) for slot in range(WORKERS)]
    limited = key(requests_per_minute=10, streams_max=4)
    admitted = [
        accounts.of(limited).admit_request(limited, 100.0, accounts.elsewhere(limited)) is None
        for _ in range(5)
        for accounts in every
    ]
    # A worker's bucket begins when it first sees the key: it overshoots once, by earlier requests at other workers.
    assert sum(admitted) <= 10 + WORKERS
    opened = [
        accounts.of(limited).open_stream(limited, accounts.elsewhere(limited)) is None
        for _ in range(3)
        for accounts in every
    ]
    assert sum(opened) == 4
    every[0].of(limited).close_stream()
    assert every[2].of(limited).open_stream(limited, every[2].elsewhere(limited)) is None


def test_other_workers_see_tokens_after_the_sweep(fd: int) -> None:
    one, two = accounts_of(fd, 0), accounts_of(fd, 1)
    limited = key(tokens_per_minute=100)
    for accounts in (one, two):
        assert accounts.of(limited).admit_request(limited, 0.0, accounts.elsewhere(limited)) is None
    one.of(limited).tokens_total += 500
    one.publish()
    assert two.of(limited).admit_request(limited, 0.0, two.elsewhere(limited)) is not None


def test_the_spending_of_a_dead_worker_still_counts(fd: int) -> None:
    burier = Shared(fd, WORKERS, [])
    one, two = accounts_of(fd, 0), accounts_of(fd, 1)
    limited = key()
    account = two.of(limited)
    account.requests_total, account.tokens_total = 7, 900
    assert account.open_stream(limited) is None
    assert one.elsewhere(limited) == Spent(7, 900, 1)
    burier.bury(1, 0)
    assert one.elsewhere(limited) == Spent(7, 900, 0)
    successor = accounts_of(fd, 1)
    assert successor.elsewhere(limited) == Spent(7, 900, 0)
    other = Key(id="k2", name="bob", salt=b"", digest=b"")
    assert successor.of(other).admit_request(other, 0.0) is None  # takes the entry that k1 had
    assert successor.of(limited).admit_request(limited, 0.0) is None
    assert one.elsewhere(limited) == Spent(8, 900, 0) and one.elsewhere(other) == Spent(1, 0, 0)
    burier.bury(1, 0)
    assert one.elsewhere(limited) == Spent(8, 900, 0) and one.elsewhere(other) == Spent(1, 0, 0)


def test_a_full_ledger_takes_no_further_key_and_goes_on(fd: int) -> None:
    one, two = worker(fd, 0), worker(fd, 1)
    for k in range(KEYS_MAX):
        entry = one.entry_of(f"key-{k}")
        assert entry is not None
        entry[0] = k
    assert one.entry_of("one more") is None
    assert two.spent_elsewhere("key-9999") == Spent(9999, 0, 0)
    assert two.spent_elsewhere("one more") == NOTHING
    accounts = Accounts()
    accounts.board = one
    more = Key(id="one more", name="", salt=b"", digest=b"", requests_per_minute=1)
    assert accounts.of(more).admit_request(more, 0.0, accounts.elsewhere(more)) is None
    assert accounts.of(more).admit_request(more, 0.0, accounts.elsewhere(more)) is not None
