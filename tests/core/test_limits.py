import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamd.core.auth import Key, Refusal
from streamd.core.limits import RETRY_AFTER_S_MAX, Account, Accounts, Bucket, Spent


def key(key_id: str = "k1", **limits: int | None) -> Key:
    return Key(id=key_id, name="alice", salt=b"", digest=b"", **limits)  # type: ignore[arg-type]


def test_without_limits_nothing_is_refused() -> None:
    account = Account()
    for _ in range(1000):
        assert account.admit_request(key(), 0.0) is None
        assert account.open_stream(key()) is None
    account.tokens_total += 10**9
    assert account.admit_request(key(), 0.0) is None


def test_requests_pass_as_a_burst_and_then_at_an_even_rate() -> None:
    limited, account = key(requests_per_minute=60), Account()
    assert [account.admit_request(limited, 100.0) for _ in range(60)] == [None] * 60
    refusal = account.admit_request(limited, 100.0)
    assert refusal is not None
    assert (refusal.status, refusal.code) == (429, "rate_limit_exceeded")
    assert "60 requests per minute" in refusal.message
    assert refusal.retry_after_s == pytest.approx(1.0)
    assert account.admit_request(limited, 100.9) is not None
    assert account.admit_request(limited, 101.0) is None
    assert account.admit_request(limited, 101.0) is not None
    assert account.requests_total == 61  # refused ones aren't counted


def test_a_full_bucket_holds_one_minute() -> None:
    limited, account = key(requests_per_minute=3), Account()
    assert account.admit_request(limited, 0.0) is None
    assert [account.admit_request(limited, 10_000.0) is None for _ in range(5)] == [True, True, True, False, False]


def test_tokens_above_the_limit_are_a_debt_that_delays_the_next_request() -> None:
    limited, account = key(tokens_per_minute=600), Account()
    assert account.admit_request(limited, 0.0) is None
    account.tokens_total += 610  # 10 above the limit of 600
    refusal = account.admit_request(limited, 0.0)
    assert refusal is not None
    assert "600 tokens per minute" in refusal.message
    assert refusal.retry_after_s == pytest.approx(1.1)  # 11 tokens at 10 a second
    assert account.admit_request(limited, 1.1) is None


def test_usage_replaces_the_counted_tokens() -> None:
    limited, account = key(tokens_per_minute=100), Account()
    assert account.admit_request(limited, 0.0) is None
    account.tokens_total += 150
    account.correct(counted=150, usage=20)
    assert account.tokens_total == 20
    assert account.admit_request(limited, 0.0) is None
    account.correct(counted=0, usage=200)
    assert account.admit_request(limited, 0.0) is not None


@pytest.mark.parametrize(("counted", "usage", "total"), [(30, 0, 0), (10, -5, 0), (10, 10, 10), (0, 5, 15)])
def test_a_total_never_falls_below_zero(counted: int, usage: int, total: int) -> None:
    account = Account()
    account.tokens_total = 10
    account.correct(counted, usage)
    assert account.tokens_total == total


def test_an_absurd_usage_locks_out_for_an_hour_at_most() -> None:
    limited, account = key(tokens_per_minute=60), Account()
    assert account.admit_request(limited, 0.0) is None
    account.correct(0, 10**15)
    refusal = account.admit_request(limited, 0.0)
    assert refusal is not None
    assert refusal.retry_after_s == RETRY_AFTER_S_MAX
    assert account.admit_request(limited, 3590.0) is not None
    assert account.admit_request(limited, 3601.0) is None


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
    limited, account = key(requests_per_minute=10, streams_max=3), Account()
    assert account.admit_request(limited, 0.0, Spent(1000, 0, 0)) is None  # spent before our first look: not counted
    assert account.admit_request(limited, 0.0, Spent(1008, 0, 0)) is None
    assert account.admit_request(limited, 0.0, Spent(1008, 0, 0)) is not None
    assert account.open_stream(limited, Spent(0, 0, 2)) is None
    assert account.open_stream(limited, Spent(0, 0, 2)) is not None
    assert account.spent() == Spent(2, 0, 1)


def test_two_workers_see_one_bucket() -> None:
    limited = key(requests_per_minute=100)
    workers = (Account(), Account())
    for worker, other in (workers, workers[::-1]):
        assert worker.admit_request(limited, 0.0, other.spent()) is None
    admitted = 2
    for turn in range(400):
        worker, other = workers[turn % 2], workers[1 - turn % 2]
        admitted += worker.admit_request(limited, 0.0, other.spent()) is None
    assert 100 <= admitted <= 101  # at most workers - 1 above the limit


def test_a_changed_limit_holds_at_once() -> None:
    account = Account()
    assert account.admit_request(key(requests_per_minute=1000), 0.0) is None
    assert account.admit_request(key(requests_per_minute=2), 0.0) is None
    assert account.admit_request(key(requests_per_minute=2), 0.0) is None
    assert account.admit_request(key(requests_per_minute=2), 0.0) is not None


def test_a_limit_set_later_forgives_earlier_spending() -> None:
    account = Account()
    assert account.admit_request(key(tokens_per_minute=10), 0.0) is None
    assert account.admit_request(key(), 0.0) is None
    account.tokens_total += 10**6
    assert account.admit_request(key(tokens_per_minute=10), 0.0) is None


def test_the_longer_of_two_waits_is_told() -> None:
    limited, account = key(requests_per_minute=1, tokens_per_minute=60), Account()
    assert account.admit_request(limited, 0.0) is None
    account.tokens_total += 100
    refusal = account.admit_request(limited, 0.0)
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
            account.admit_request(limited, now)
    assert account.requests_total <= per_minute + now * per_minute / 60 + 1


@given(st.integers(1, 10**6), st.integers(0, 10**9), st.floats(0, 10**6))
def test_a_client_that_waits_as_told_is_admitted(per_minute: int, spent: int, now: float) -> None:
    limited, account = key(tokens_per_minute=per_minute), Account()
    assert account.admit_request(limited, now) is None
    account.tokens_total += spent
    refusal: Refusal | None = account.admit_request(limited, now)
    for _ in range(61):
        if refusal is None:
            break
        assert 0 < refusal.retry_after_s <= RETRY_AFTER_S_MAX
        now += refusal.retry_after_s
        refusal = account.admit_request(limited, now)
    assert refusal is None


@given(st.lists(st.tuples(st.integers(-1000, 1000), st.floats(0, 100)), max_size=30), st.integers(1, 100))
def test_a_level_stays_within_its_bounds(steps: list[tuple[int, float]], per_minute: int) -> None:
    bucket, total, now = Bucket(per_minute, 0, 0.0), 0, 0.0
    for more, wait_s in steps:
        total, now = total + more, now + wait_s
        assert -60 * per_minute <= bucket.look(per_minute, total, now) <= per_minute


def test_an_account_lives_as_long_as_its_key() -> None:
    accounts = Accounts()
    first = accounts.of(key("k1"))
    assert accounts.of(key("k1")) is first
    assert first.open_stream(key("k1")) is None
    accounts.of(key("k2"))
    assert len(accounts) == 2
    accounts.retain({"k2"})
    assert len(accounts) == 1
    first.close_stream()  # its stream ends later
    assert accounts.of(key("k1")) is not first


def test_other_workers_see_each_request_and_each_stream_at_once() -> None:
    entry = [0, 0, 0]
    account = Account(entry)
    account.admit_request(key(requests_per_minute=10), 0.0)
    account.open_stream(key(streams_max=2))
    assert entry == [1, 0, 1]
    account.close_stream()
    assert entry == [1, 0, 0]
