"""The memory that all workers share: sums that never fall, ledgers of keys, liveness."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.core.auth import Key
from streamd.core.keys import KEYS_MAX
from streamd.core.limits import TOTAL_MAX, Account, Accounts, Bucket, Look, Spent
from streamd.counters import Counters
from streamd.daemon import shared as shared_module
from streamd.daemon.shared import BEAT_STALE_S, LOOK, VERSION, KeySpending, Shared, create
from streamd.net import totals
from streamd.net.served import NAME_BYTES_MAX, PAIRS_MAX, Served
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

    def torn(rows: Sequence[CounterRow], names: Sequence[str], pairs: Sequence[Served]) -> Totals:
        """The first attempt reads the base row, then the worker is buried, then it reads the other rows."""
        nonlocal looks
        looks += 1
        base = list(rows[0])
        if looks == 1:
            burier.bury(1, 0)
        return add_up([base, *rows[1:]], names, pairs)

    monkeypatch.setattr(totals, "add_up", torn)
    assert reader.add_up().counters.requests == 1000
    assert looks == 2


def test_workers_name_the_same_pairs_by_the_same_places(fd: int) -> None:
    one, two, longest = worker(fd, 0), worker(fd, 1), Served("u" * 128, "ä" * (NAME_BYTES_MAX // 2))
    assert one.add_pair(Served("up", "big")) and two.add_pair(Served("up", "other"))
    assert two.add_pair(Served("up", "big")) and one.add_pair(longest)
    assert one.pairs() == two.pairs() == [Served("up", "big"), Served("up", "other"), longest]
    for each, made in ((one, 3), (two, 4)):
        counters = Counters()
        counters.generation_tokens[Served("up", "other")] = made
        each.publish(Totals(counters))
    assert worker(fd, 2).add_up().counters.generation_tokens == {("up", "other"): 7}
    two.bury(0, 0)
    assert worker(fd, 2).add_up().counters.generation_tokens == {("up", "other"): 7}
    assert all(one.add_pair(Served("up", f"m{k}")) for k in range(PAIRS_MAX - 3))
    assert not two.add_pair(Served("up", "one too many")) and len(two.pairs()) == PAIRS_MAX


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


def admit(account: Account, limited: Key, now: float) -> bool:
    """Let a request in and count it, or refuse it."""
    if account.refuse_request(limited, now) is not None:
        return False
    account.count_request()
    return True


def spent_elsewhere(accounts: Accounts, limited: Key) -> Spent:
    board = accounts.board
    assert board is not None
    place = board.account_of(limited.id)
    assert place is not None
    return place.seen()[0]


def test_a_limit_holds_for_all_workers_together(fd: int) -> None:
    every = [accounts_of(fd, slot) for slot in range(WORKERS)]
    limited = key(requests_per_minute=10, streams_max=4)
    assert [sum(admit(accounts.of(limited), limited, 100.0) for _ in range(20)) for accounts in every] == [10, 0, 0]
    assert [admit(accounts.of(limited), limited, 100.0 + 6.1) for accounts in every] == [True, False, False]
    opened = [accounts.of(limited).open_stream(limited) is None for _ in range(3) for accounts in every]
    assert sum(opened) == 4
    every[0].of(limited).close_stream()
    assert every[2].of(limited).open_stream(limited) is None


def test_other_workers_see_tokens_after_the_sweep(fd: int) -> None:
    one, two = accounts_of(fd, 0), accounts_of(fd, 1)
    limited = key(tokens_per_minute=100)
    for accounts in (one, two):
        assert admit(accounts.of(limited), limited, 0.0)
    one.of(limited).count_tokens(500)
    assert two.of(limited).refuse_request(limited, 0.0) is None
    one.publish(0.0)
    assert two.of(limited).refuse_request(limited, 0.0) is not None


@pytest.mark.parametrize("by_successor", [False, True])
def test_the_spending_of_a_dead_worker_still_counts(fd: int, by_successor: bool) -> None:
    one, two = accounts_of(fd, 0), accounts_of(fd, 1)
    limited = key(requests_per_minute=5, tokens_per_minute=1000)
    account = two.of(limited)
    assert [admit(account, limited, 10.0) for _ in range(6)] == [True] * 5 + [False]
    account.count_tokens(900)
    two.publish(10.0)
    assert account.open_stream(limited) is None
    assert spent_elsewhere(one, limited) == Spent(5, 900, 1)
    if by_successor:
        worker(fd, 1).claim(1.0)
    else:
        Shared(fd, WORKERS, []).bury(1, 0)
    assert spent_elsewhere(one, limited) == Spent(5, 900, 0)
    successor = accounts_of(fd, 1)
    for accounts in (one, successor):  # the dead worker was the only one that had looked at the bucket
        assert not admit(accounts.of(limited), limited, 10.0)
    other = Key(id="k2", name="bob", salt=b"", digest=b"")
    assert admit(successor.of(other), other, 10.0)
    assert admit(successor.of(limited), limited, 22.1)
    assert spent_elsewhere(one, limited) == Spent(6, 900, 0) and spent_elsewhere(one, other) == Spent(1, 0, 0)
    Shared(fd, WORKERS, []).bury(1, os.getpid() if by_successor else 0)
    assert spent_elsewhere(one, limited) == Spent(6, 900, 0) and spent_elsewhere(one, other) == Spent(1, 0, 0)
    assert not admit(one.of(limited), limited, 22.1)


def test_the_newest_look_outlasts_the_worker_that_made_it(fd: int) -> None:
    one, two = (worker(fd, slot).account_of("k1") for slot in (0, 1))
    assert one is not None and two is not None
    older, newer = Look(5.0, 8, Bucket(1.0, 0.0, 5), None), Look(5.0, 9, Bucket(0.5, 0.0, 6), None)
    one.keep(newer)
    two.keep(older)
    Shared(fd, WORKERS, []).bury(0, 0)
    Shared(fd, WORKERS, []).bury(1, 0)
    place = worker(fd, 2).account_of("k1")
    assert place is not None and place.seen()[1] == newer


levels = st.floats(-6e10, 1e9).map(lambda level: round(level * 1e6) / 1e6)
buckets = st.none() | st.builds(Bucket, levels, st.floats(0, 1e12), st.integers(0, TOTAL_MAX))


@given(st.floats(0, 1e9), buckets, buckets)
def test_a_look_is_read_as_it_was_written_and_never_half(
    at: float, requests: Bucket | None, tokens: Bucket | None
) -> None:
    made = create(1)
    writer, reader = (Shared(made, 1, [], 0).account_of("k") for _ in range(2))
    assert isinstance(writer, KeySpending) and reader is not None
    assert reader.seen() == (Spent(0, 0, 0), None)
    writer.keep(Look(1.0, 1, Bucket(3.0, 0.0, 7), Bucket(4.0, 1.0, 8)))
    before = list(writer._entry)
    writer.keep(Look(at, 2, requests, tokens))
    _, look = reader.seen()
    assert look is not None and look.number == 2 and look.at == pytest.approx(at, abs=1e-6)
    for found, expected in ((look.requests, requests), (look.tokens, tokens)):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert found.total == expected.total
            assert found.level == pytest.approx(expected.level, rel=1e-9, abs=1e-6)
            assert found.forgiven == pytest.approx(expected.forgiven, rel=1e-9, abs=1e-6)
    after = list(writer._entry)
    for written in range(LOOK + 1, len(after)):  # a reader in another process looks in between
        writer._entry[written] = before[written]
        if list(writer._entry) not in (before, after):
            assert reader.seen()[1] is None
    os.close(made)


def test_sums_saturate_in_the_mapping(fd: int) -> None:
    for slot in (0, 1):
        place = worker(fd, slot).account_of("k1")
        assert place is not None
        place.publish(Spent(TOTAL_MAX, TOTAL_MAX, 1))
        Shared(fd, WORKERS, []).bury(slot, 0)
    base = Shared(fd, WORKERS, [])._ledgers[0]
    assert base.spent(shared_module.hash_of("k1")) == Spent(TOTAL_MAX, TOTAL_MAX, 0)
    limited = key(requests_per_minute=5)
    assert admit(accounts_of(fd, 2).of(limited), limited, 0.0)


def test_a_full_ledger_takes_no_further_key_and_goes_on(fd: int) -> None:
    one, two = worker(fd, 0), worker(fd, 1)
    for k in range(KEYS_MAX):
        place = one.account_of(f"key-{k}")
        assert place is not None
        place.publish(Spent(k, 0, 0))
    assert one.account_of("one more") is None
    there = two.account_of("key-9999")
    assert there is not None and there.seen()[0] == Spent(9999, 0, 0)
    accounts = Accounts()
    accounts.board = one
    more = Key(id="one more", name="", salt=b"", digest=b"", requests_per_minute=1)
    assert [admit(accounts.of(more), more, 0.0) for _ in range(2)] == [True, False]


def test_a_worker_that_has_not_seen_a_key_shows_its_usage_and_makes_no_place(fd: int) -> None:
    limited = key(requests_per_minute=60, tokens_per_minute=1000, streams_max=5)
    for slot in (0, 1):
        accounts = accounts_of(fd, slot)
        assert admit(accounts.of(limited), limited, 100.0)
        assert accounts.of(limited).open_stream(limited) is None
        accounts.of(limited).count_tokens(300)
        accounts.publish(100.0)
    stranger = accounts_of(fd, 2)
    seen = stranger.usage(limited, 100.0)
    assert (seen.streams_now, seen.requests_total, seen.tokens_total) == (2, 2, 600)
    assert (seen.requests_left, seen.tokens_left, seen.wait_s) == (58, 400, 0.0)
    assert stranger.usage(limited, 160.0).requests_left == 60
    assert len(stranger) == 0
    assert accounts.usage(limited, 100.0) == seen, "the worker that counts sees the same"
