"""Runtime: the gates with their refusals as answers, the waits in answers, the date, a reload, bugs."""

from __future__ import annotations

import asyncio
import errno
import random
import ssl
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from fakes import FakeLoop

from streamd.config import Settings
from streamd.core.admission import Admission, Budget, Demands, Gate, Limits, Prices, Resources
from streamd.core.body_charge import BodyCharge
from streamd.core.hub import Hub
from streamd.core.refusal import Refusal, Retry
from streamd.net.http_error import HttpError
from streamd.net.runtime import ROOM_S_MAX, ROOM_S_MIN, WORKER_BUSY, Runtime, reason_of
from streamd.reasons import CloseReason
from streamd.wire.http1 import HeadLimits

GIB = 1 << 30
SMALL = Demands(bodies_bytes_max=1 << 20)


def small() -> Admission:
    """Room for some thousand streams and a mebibyte of request bodies."""
    resources = Resources(memory_bytes=GIB, memory_source="setting", descriptors_per_worker=20_000)
    return Admission(Budget.compute(resources, SMALL, Prices()), Limits(loop_lag_max_s=0.5))


class Made:
    """Runtimes on a shared loop, with a clock of their own."""

    def __init__(self) -> None:
        self.loop = FakeLoop()
        self.unix_now = 1_000_000_000.0
        self.bugs: list[tuple[str, BaseException]] = []

    def runtime(self, *, admission: Admission | None = None, **settings: Any) -> Runtime:
        rng = random.Random(1)
        hub = Hub(
            log_bytes_max=1 << 20, stream_log_bytes_max=1 << 16, stream_log_events_max=100, detached_max=1, slot=0
        )
        return Runtime(
            self.loop,
            Settings(**settings),
            hub,
            admission=admission,
            rng=rng,
            unix_time=lambda: self.unix_now,
            on_bug=lambda where, error: self.bugs.append((where, error)),
        )


@pytest.fixture
def m() -> Iterator[Made]:
    made = Made()
    yield made
    made.loop.close()


def in_use(runtime: Runtime) -> dict[str, int]:
    return cast(dict[str, int], runtime.admission.status()["in_use"])


Admit = Callable[..., None]
BOTH_WAYS = pytest.mark.parametrize("admit", [Runtime.admit_stream, Runtime.admit_relay], ids=["stream", "relay"])


@BOTH_WAYS
def test_admission_charges_admitted_streams_and_no_refused_streams(m: Made, admit: Admit) -> None:
    runtime = m.runtime(admission=small())
    admit(runtime)
    assert in_use(runtime)["streams"] == 1 and in_use(runtime)["upstream"] == (admit is Runtime.admit_relay)
    before = in_use(runtime)
    runtime.admission.note_resident(GIB + 1)
    with pytest.raises(HttpError) as caught:
        admit(runtime)
    problem = caught.value
    assert (problem.status, problem.code, problem.reason) == (503, "over_capacity", CloseReason.OVER_BUDGET)
    assert problem.should_retry and ROOM_S_MIN < (problem.retry_after_s or 0) <= ROOM_S_MAX
    assert not problem.close, "the connection may ask again"
    assert in_use(runtime) == before
    assert runtime.admission.refused() == {gate.value: int(gate is Gate.MEMORY) for gate in Gate}
    runtime.admission.note_resident(0)
    admit(runtime)
    assert in_use(runtime)["streams"] == 2


@BOTH_WAYS
def test_only_a_request_with_an_owner_takes_the_place_of_another_principals_stream(
    m: Made, admit: Admit, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Demands(bodies_bytes_max=1 << 20, conns_max=4, streams_max=1)
    resources = Resources(memory_bytes=GIB, memory_source="setting", descriptors_per_worker=20_000)
    runtime = m.runtime(admission=Admission(Budget.compute(resources, places, Prices()), Limits()))
    asked: list[tuple[str, bool]] = []

    def make_place(hub: Hub, owner: str, now: float, *, relayed: bool) -> bool:
        asked.append((owner, relayed))
        return False

    monkeypatch.setattr(Hub, "make_place", make_place)
    admit(runtime)
    for owner in ("", "alice"):
        with pytest.raises(HttpError):
            admit(runtime, owner)
    assert asked == [("alice", admit is Runtime.admit_relay)]


@BOTH_WAYS
def test_a_drain_refuses_before_admission_is_asked(m: Made, admit: Admit) -> None:
    runtime = m.runtime(admission=small(), retry_min_s=3.0, retry_max_s=3.0)
    runtime.draining = True
    with pytest.raises(HttpError) as caught:
        admit(runtime)
    problem = caught.value
    assert (problem.status, problem.code, problem.reason) == (503, "draining", CloseReason.DRAINING)
    assert problem.should_retry and problem.retry_after_s == 3.0
    assert in_use(runtime)["streams"] == 0 and not any(runtime.admission.refused().values())


def test_request_bodies_are_held_up_to_their_budget(m: Made) -> None:
    runtime = m.runtime(admission=small())
    charge, other = BodyCharge(runtime.admission, ()), BodyCharge(runtime.admission, ())
    runtime.hold_body(charge, SMALL.bodies_bytes_max - 1)
    with pytest.raises(HttpError) as caught:
        runtime.hold_body(other, 2)
    problem = caught.value
    assert (problem.status, problem.code, problem.reason) == (503, "bodies_over_budget", CloseReason.OVER_BUDGET)
    assert problem.should_retry and problem.retry_after_s
    assert runtime.bodies_bytes == SMALL.bodies_bytes_max - 1, "the refused bytes aren't held"
    runtime.hold_body(other, 1)
    charge.release()
    charge.release()
    other.release()
    assert runtime.bodies_bytes == 0


def test_without_a_measured_machine_connections_and_streams_are_never_refused(m: Made) -> None:
    runtime = m.runtime()
    runtime.admission.note_lag(1e9)
    for _ in range(20_000):
        runtime.admit_relay()
        assert runtime.admission.admit_connection(1 << 20) is None
    assert not any(runtime.admission.refused().values())


@pytest.mark.parametrize("close", [True, False])
def test_a_refusal_becomes_an_answer_with_the_same_text(m: Made, close: bool) -> None:
    refusal = Refusal(CloseReason.RATE_LIMITED, "too_many_connections", "Too many.", 7.0, Retry.WITH_ROOM)
    problem = m.runtime().refused(refusal, close=close)
    assert (problem.status, problem.code, problem.message) == (429, "too_many_connections", "Too many.")
    assert (problem.reason, problem.close) == (CloseReason.RATE_LIMITED, close)
    assert problem.response_headers() == [(b"retry-after", b"7"), (b"x-should-retry", b"true")]


def test_a_wait_that_is_known_exactly_is_told_exactly(m: Made) -> None:
    problem = m.runtime().refused(Refusal(CloseReason.RATE_LIMITED, "rate_limit_exceeded", "Slow down.", 7.0))
    assert problem.retry_after_s == 7.0 and problem.should_retry is None


def test_a_refusal_that_waiting_does_not_mend_has_no_retry_after(m: Made) -> None:
    fields = m.runtime().refused(Refusal(CloseReason.UNAUTHORIZED, "api_key_required", "A key.")).response_headers()
    assert [name for name, _ in fields] == [b"www-authenticate"]


def test_the_answer_of_a_busy_worker_has_a_retry_after(m: Made) -> None:
    problem = m.runtime(retry_min_s=2.0, retry_max_s=2.0).refused(WORKER_BUSY)
    assert (problem.status, problem.code, problem.reason) == (503, "worker_busy", CloseReason.OVER_BUDGET)
    assert problem.response_headers() == [(b"retry-after", b"2"), (b"x-should-retry", b"true")]


@pytest.mark.parametrize(
    ("readers", "among", "longest_ms"),
    [
        (0, None, 100),
        (1, None, 101),
        (1250, None, 1100),
        (2500, None, 2100),
        (1_000_000, None, 4000),
        (1_000_000, 1, 101),
        (0, 2500, 2100),
    ],
)
def test_the_window_of_returns_grows_with_the_readers_up_to_its_bound(
    m: Made, readers: int, among: int | None, longest_ms: int
) -> None:
    runtime = m.runtime(retry_min_s=0.1, retry_max_s=4.0)
    runtime.readers = readers
    waits_ms = [runtime.retry_ms(among) for _ in range(1000)]
    assert all(100 <= wait <= longest_ms for wait in waits_ms)
    assert min(waits_ms) - 100 <= 0.1 * (longest_ms - 100) and longest_ms - max(waits_ms) <= 0.1 * (longest_ms - 100)


def test_retry_after_is_spread_over_its_range_and_at_least_1(m: Made) -> None:
    runtime = m.runtime(retry_min_s=0.1, retry_max_s=4.0)
    assert {runtime.retry_after_s(Retry.SOON) for _ in range(1000)} == {1.0, 2.0, 3.0, 4.0}
    with_room = {runtime.retry_after_s(Retry.WITH_ROOM) for _ in range(1000)}
    assert with_room == set(range(ROOM_S_MIN + 1, ROOM_S_MAX + 1)), "others have to leave first"
    assert runtime.retry_after_s(Retry.NEVER) is None


def test_the_date_is_made_anew_once_a_second_of_the_loop(m: Made) -> None:
    runtime = m.runtime()
    now = [50.0]
    runtime.time = lambda: now[0]
    first = runtime.date()
    assert first == b"Sun, 09 Sep 2001 01:46:40 GMT"
    m.unix_now += 60
    now[0] += 0.999
    assert runtime.date() is first
    now[0] += 0.001
    assert runtime.date() == b"Sun, 09 Sep 2001 01:47:40 GMT"


def test_a_reload_changes_the_limits_of_requests(m: Made) -> None:
    runtime = m.runtime(headers_max=10)
    assert not runtime.cors.origins and runtime.gates.enter("192.0.2.1") == ("", "")
    settings = Settings(
        head_bytes_max=1000,
        headers_max=20,
        target_bytes_max=500,
        cors_origins=("https://app.test",),
        conns_per_address_max=1,
    )
    runtime.reload(settings)
    assert runtime.settings is settings
    assert runtime.limits == HeadLimits(1000, 20, 500)
    assert b"https://app.test" in runtime.cors.origins
    assert runtime.gates.enter("192.0.2.1") != ("", "")
    assert isinstance(runtime.gates.enter("192.0.2.1"), Refusal)


def test_a_bug_is_counted_and_reported(m: Made) -> None:
    runtime, error = m.runtime(), ZeroDivisionError()
    runtime.bug("here", error)
    runtime.bug("there", error)
    assert runtime.counters.bugs == 2 and m.bugs == [("here", error), ("there", error)]


@pytest.mark.parametrize(
    ("error", "counter", "told", "reason", "status"),
    [
        (ZeroDivisionError(), "bugs", True, CloseReason.INTERNAL, 500),
        (MemoryError(), "no_memory", True, CloseReason.OVER_BUDGET, 503),
        (ssl.SSLWantReadError(), "tls_refused", False, CloseReason.TLS_FAILED, 500),
        (BrokenPipeError(), "transport_refused", False, CloseReason.NETWORK_LOST, 500),
        (OSError(errno.EIO, "I/O error"), "transport_refused", True, CloseReason.NETWORK_LOST, 500),
    ],
)
def test_an_error_is_counted_by_its_fault(
    m: Made, error: Exception, counter: str, told: bool, reason: CloseReason, status: int
) -> None:
    runtime = m.runtime()
    with runtime.guard:
        raise error
    counts = {name: getattr(runtime.counters, name) for name in ("bugs", "no_memory", "tls_refused")}
    counts["transport_refused"] = runtime.counters.transport_refused
    assert counts == dict.fromkeys(counts, 0) | {counter: 1}
    assert [found for _, found in m.bugs] == [error] * told
    assert reason_of(error) is reason and runtime.problem_of(error).status == status


def test_a_guard_lets_a_cancellation_pass(m: Made) -> None:
    with pytest.raises(asyncio.CancelledError), m.runtime().guard:
        raise asyncio.CancelledError


def test_a_runtime_without_a_worker_has_no_routes_and_reports_nothing(m: Made) -> None:
    runtime = Runtime(m.loop, Settings(), m.runtime().hub)
    runtime.bug("here", ZeroDivisionError())
    assert runtime.counters.bugs == 1
