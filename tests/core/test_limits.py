import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamd.core.auth import Key, Refusal
from streamd.core.keys import KEYS_MAX
from streamd.core.limits import (
    DEBT_MINUTES_MAX,
    NOTHING,
    RETRY_AFTER_S_MAX,
    TOTAL_MAX,
    Account,
    Accounts,
    Bucket,
    Look,
    Spent,
    look_at,
)


def key(key_id: str = "k1", **limits: int | None) -> Key:
    return Key(id=key_id, name="alice", salt=b"", digest=b"", **limits)  # type: ignore[arg-type]


def admit(account: Account, limited: Key, now: float) -> Refusal | None:
    """Let a request in and count it, or refuse it."""
    refusal = account.refuse_request(limited, now)
    if refusal is None:
        account.count_request()
    return refusal


class Board:
    """What several accounts of the same key show each other, in Python's own numbers."""

    def __init__(self) -> None:
        self.places: list[Place] = []

    def account(self) -> Account:
        self.places.append(Place(self))
        return Account(self.places[-1])


class Place:
    """A worker's numbers for the key."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.spent = NOTHING
        self.look: Look | None = None

    def publish(self, spent: Spent) -> None:
        self.spent = spent

    def keep(self, look: Look) -> None:
        self.look = look

    def seen(self) -> tuple[Spent, Look | None]:
        others = [place.spent for place in self.board.places if place is not self]
        looks = [place.look for place in self.board.places if place.look is not None]
        summed = Spent(*map(sum, zip(NOTHING, *others, strict=True)))
        return summed, max(looks, key=lambda look: look[:2], default=None)

    def sharers(self) -> int:
        return 1


def test_without_limits_nothing_is_refused() -> None:
    account = Account()
    for _ in range(1000):
        assert admit(account, key(), 0.0) is None
        assert account.open_stream(key()) is None
    account.count_tokens(10**9)
    assert admit(account, key(), 0.0) is None


def test_requests_pass_as_a_burst_and_then_at_an_even_rate() -> None:
    limited, account = key(requests_per_minute=60), Account()
    assert [admit(account, limited, 100.0) for _ in range(60)] == [None] * 60
    refusal = admit(account, limited, 100.0)
    assert refusal is not None
    assert (refusal.status, refusal.code) == (429, "rate_limit_exceeded")
    assert "60 requests per minute" in refusal.message
    assert refusal.retry_after_s == pytest.approx(1.0)
    assert admit(account, limited, 100.9) is not None
    assert admit(account, limited, 101.0) is None
    assert admit(account, limited, 101.0) is not None
    assert account.requests_total == 61  # refused ones aren't counted


def test_a_full_bucket_holds_one_minute() -> None:
    limited, account = key(requests_per_minute=3), Account()
    assert admit(account, limited, 0.0) is None
    assert [admit(account, limited, 10_000.0) is None for _ in range(5)] == [True, True, True, False, False]


def test_tokens_above_the_limit_are_a_debt_that_delays_the_next_request() -> None:
    limited, account = key(tokens_per_minute=600), Account()
    assert admit(account, limited, 0.0) is None
    account.count_tokens(610)  # 10 above the limit of 600
    refusal = admit(account, limited, 0.0)
    assert refusal is not None
    assert "600 tokens per minute" in refusal.message
    assert refusal.retry_after_s == pytest.approx(1.1)  # 11 tokens at 10 a second
    assert admit(account, limited, 1.1) is None


def test_usage_replaces_the_counted_tokens() -> None:
    limited, account = key(tokens_per_minute=100), Account()
    assert admit(account, limited, 0.0) is None
    account.count_tokens(150)
    account.settle(counted=150, tokens=20)
    assert account.tokens_total == 20
    assert admit(account, limited, 0.0) is None
    account.settle(counted=0, tokens=200)
    assert admit(account, limited, 0.0) is not None


@pytest.mark.parametrize(("counted", "usage", "total"), [(30, 0, 0), (10, 0, 0), (10, 10, 10), (0, 5, 15)])
def test_a_total_never_falls_below_zero(counted: int, usage: int, total: int) -> None:
    account = Account()
    account.tokens_total = 10
    account.settle(counted, usage)
    assert account.tokens_total == total


def test_an_absurd_usage_locks_out_for_an_hour_at_most() -> None:
    limited, account = key(tokens_per_minute=60), Account()
    assert admit(account, limited, 0.0) is None
    account.settle(0, 10**15)
    refusal = admit(account, limited, 0.0)
    assert refusal is not None
    assert refusal.retry_after_s == RETRY_AFTER_S_MAX
    assert admit(account, limited, 3590.0) is not None
    assert admit(account, limited, 3601.0) is None


def test_streams_above_streams_max_are_refused() -> None:
    limited, account = key(streams_max=2), Account()
    assert account.open_stream(limited) is None
    assert account.open_stream(limited) is None
    refusal = account.open_stream(limited)
    assert refusal is not None
    assert refusal.status == 429
    assert "2 streams at once" in refusal.message
    assert 0 < refusal.retry_after_s <= RETRY_AFTER_S_MAX
    account.close_stream()
    assert account.open_stream(limited) is None
    assert account.streams_now == 2


def test_closing_more_than_was_opened_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        Account().close_stream()


def test_the_spending_of_other_workers_counts() -> None:
    limited, board = key(requests_per_minute=10, streams_max=3), Board()
    account, other = board.account(), board.account()
    other.requests_total = 1000
    other.publish(0.0)
    assert admit(account, limited, 0.0) is None  # spent before the first look of all: not counted
    other.requests_total += 9
    other.publish(0.0)
    assert admit(account, limited, 0.0) is not None
    assert [other.open_stream(limited) for _ in range(2)] == [None, None]
    assert account.open_stream(limited) is None
    assert account.open_stream(limited) is not None
    assert account.open_stream(limited, replacing=1) is None
    assert account.spent() == Spent(1, 0, 2)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("idle_s", [0.0, 600.0])
def test_a_burst_finds_the_same_bucket_in_every_worker(workers: int, idle_s: float) -> None:
    """Whether a worker has seen the key before or not, and however long ago."""
    limited, board = key(requests_per_minute=30), Board()
    accounts = [board.account() for _ in range(workers)]
    if idle_s:
        assert all(admit(account, limited, 0.0) is None for account in accounts)
    by_worker = [sum(admit(account, limited, idle_s) is None for _ in range(40)) for account in accounts]
    assert by_worker == [30] + [0] * (workers - 1)


def test_looks_at_the_same_moment_overshoot_by_one_for_each_other_worker() -> None:
    limited, board = key(requests_per_minute=30), Board()
    accounts = [board.account() for _ in range(4)]
    let_in = 0
    for _ in range(20):
        able = [account for account in accounts if account.refuse_request(limited, 5.0) is None]
        for account in able:  # each has looked before any has counted
            account.count_request()
        let_in += len(able)
    assert 30 <= let_in <= 33


@settings(max_examples=100)
@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 3), st.floats(0, 100), st.integers(0, 60)), max_size=60))
@example(2, [(0, 0.0, 0), (1, 0.0, 60), (0, 30.0, 0), (1, 100.0, 50), (0, 0.0, 20), (1, 3.0, 0)])
def test_several_workers_let_in_what_a_single_worker_would(workers: int, steps: list[tuple[int, float, int]]) -> None:
    limited, board, alone, now = key(requests_per_minute=20, tokens_per_minute=50), Board(), Account(), 0.0
    accounts = [board.account() for _ in range(workers)]
    for which, wait_s, tokens in steps:
        now += wait_s
        account = accounts[which % workers]
        assert (admit(account, limited, now) is None) == (admit(alone, limited, now) is None)
        account.count_tokens(tokens)
        alone.count_tokens(tokens)
        account.publish(now)
        alone.publish(now)


def test_a_refill_does_not_pay_for_tokens_that_came_after_the_bucket_was_full() -> None:
    limited, account = key(tokens_per_minute=60), Account()
    assert admit(account, limited, 0.0) is None
    account.publish(0.0)
    account.count_tokens(100)  # after ten minutes in which nothing came
    account.publish(600.0)
    assert [admit(account, limited, now) is None for now in (600.0, 640.9, 641.0)] == [False, False, True]


@pytest.mark.parametrize("counted", [0, 1_000, 100_000])
def test_a_credit_gives_back_no_more_than_was_taken(counted: int) -> None:
    """Text events beyond the floor of the debt, then a usage of none for them: the earlier debt is as it was."""
    limited, account = key(tokens_per_minute=100), Account()
    assert admit(account, limited, 0.0) is None
    account.settle(0, 3000)
    assert admit(account, limited, 0.0) is not None
    account.count_tokens(counted)
    assert admit(account, limited, 0.0) is not None
    account.settle(counted, 0)
    assert admit(account, limited, 1700.0) is not None
    assert admit(account, limited, 1760.0) is None


def test_a_bucket_that_is_full_has_forgotten_its_debt() -> None:
    deep = look_at(Bucket(0.0, 0.0, 0), 10, 1000, 0.0)
    assert deep is not None and (deep.level, deep.forgiven) == (-10.0 * DEBT_MINUTES_MAX, 400.0)
    full = look_at(deep, 10, 1000, 3700.0)
    assert full == Bucket(10.0, 0.0, 1000)


def test_a_refusal_counts_nothing_and_a_request_that_is_given_back_is_free() -> None:
    limited, account = key(requests_per_minute=2), Account()
    assert [account.refuse_request(limited, 0.0) for _ in range(50)] == [None] * 50
    for _ in range(20):
        assert admit(account, limited, 0.0) is None
        account.give_back_request()
    assert [admit(account, limited, 0.0) is None for _ in range(3)] == [True, True, False]


def test_sums_saturate() -> None:
    account = Account()
    account.requests_total = account.tokens_total = TOTAL_MAX
    account.count_request()
    account.count_tokens(5)
    account.settle(0, TOTAL_MAX)
    assert account.spent() == Spent(TOTAL_MAX, TOTAL_MAX, 0)


def test_a_changed_limit_holds_at_once() -> None:
    account = Account()
    assert admit(account, key(requests_per_minute=1000), 0.0) is None
    assert admit(account, key(requests_per_minute=2), 0.0) is None
    assert admit(account, key(requests_per_minute=2), 0.0) is None
    assert admit(account, key(requests_per_minute=2), 0.0) is not None


def test_a_limit_set_later_forgives_earlier_spending() -> None:
    account = Account()
    assert admit(account, key(tokens_per_minute=10), 0.0) is None
    assert admit(account, key(), 0.0) is None
    account.count_tokens(10**6)
    account.publish(0.0)
    assert admit(account, key(tokens_per_minute=10), 0.0) is None


def test_the_longer_of_two_waits_is_told() -> None:
    limited, account = key(requests_per_minute=1, tokens_per_minute=60), Account()
    assert admit(account, limited, 0.0) is None
    account.count_tokens(100)
    refusal = admit(account, limited, 0.0)
    assert refusal is not None
    assert "1 requests per minute" in refusal.message
    assert refusal.retry_after_s == pytest.approx(60.0)


@settings(max_examples=60)
@given(st.integers(1, 500), st.lists(st.floats(0, 30), min_size=1, max_size=200))
def test_no_minute_has_more_than_twice_the_limit_and_the_average_holds(per_minute: int, waits_s: list[float]) -> None:
    limited, account, now = key(requests_per_minute=per_minute), Account(), 0.0
    for wait_s in waits_s:
        now += wait_s
        for _ in range(3):
            admit(account, limited, now)
    assert account.requests_total <= per_minute + now * per_minute / 60 + 1


@given(st.integers(1, 10**6), st.integers(0, 10**9), st.floats(0, 10**6))
def test_a_client_that_waits_as_told_is_admitted(per_minute: int, spent: int, now: float) -> None:
    limited, account = key(tokens_per_minute=per_minute), Account()
    assert admit(account, limited, now) is None
    account.count_tokens(spent)
    refusal: Refusal | None = admit(account, limited, now)
    for _ in range(61):
        if refusal is None:
            break
        assert 0 < refusal.retry_after_s <= RETRY_AFTER_S_MAX
        now += refusal.retry_after_s
        refusal = admit(account, limited, now)
    assert refusal is None


@given(st.lists(st.tuples(st.integers(-1000, 1000), st.floats(0, 100)), max_size=30), st.integers(1, 100))
def test_a_level_stays_within_its_bounds(steps: list[tuple[int, float]], per_minute: int) -> None:
    bucket, total = look_at(None, per_minute, 0, 0.0), 0
    for more, wait_s in steps:
        total += more
        bucket = look_at(bucket, per_minute, total, wait_s)
        assert bucket is not None
        assert -60 * per_minute <= bucket.level <= per_minute and bucket.forgiven >= 0


def test_a_key_that_leaves_the_file_and_comes_back_has_the_same_bucket() -> None:
    accounts, limited = Accounts(), key("k1", requests_per_minute=1, streams_max=1)
    first = accounts.of(limited)
    assert first.open_stream(limited) is None
    assert admit(first, limited, 0.0) is None
    accounts.of(key("k2"))
    assert len(accounts) == 2
    accounts.retain({"k2"})
    assert len(accounts) == 1
    assert accounts.of(limited) is first
    assert admit(first, limited, 0.0) is not None
    assert first.open_stream(limited) is not None


def test_accounts_of_keys_that_are_gone_are_bounded() -> None:
    accounts = Accounts()
    first = accounts.of(key("first"))
    accounts.retain(())
    for k in range(KEYS_MAX):
        accounts.of(key(f"k{k}"))
    accounts.retain(())
    assert len(accounts) == 0
    assert accounts.of(key("first")) is not first
    assert len(accounts._gone) == KEYS_MAX


def test_other_workers_see_each_request_and_each_stream_at_once_and_tokens_after_the_sweep() -> None:
    board = Board()
    account, limited = board.account(), key(requests_per_minute=10, streams_max=2)
    (place,) = board.places
    admit(account, limited, 0.0)
    account.open_stream(limited)
    account.count_tokens(7)
    assert place.spent == Spent(1, 0, 1)
    account.publish(1.0)
    assert place.spent == Spent(1, 7, 1)
    account.close_stream()
    assert place.spent == Spent(1, 7, 0)
