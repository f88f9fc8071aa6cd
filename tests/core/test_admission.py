"""The gates: arithmetic of the budget, each refusal, symmetry, and agreement with a model of plain counts."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from streamd.core.admission import (
    HELD_S_MAX,
    KIB,
    MIB,
    OPERATOR_CONNECTIONS_MAX,
    REFUSALS,
    TURNED_AWAY_MAX,
    AddressGate,
    Admission,
    Budget,
    BudgetError,
    Demands,
    Gate,
    Limits,
    Prices,
    Resources,
    SharedNumber,
    address_key,
)
from streamd.core.refusal import Refusal, Retry
from streamd.core.ring import SLOT_BYTES
from streamd.reasons import CloseReason

GIB = 1024 * MIB
PRICES = Prices()
DEMANDS = Demands(process_bytes=10 * MIB, bodies_bytes_max=MIB, reserve_connections=2, descriptors_base=10)


def budget_for(pairs: int, *, prices: Prices = PRICES, demands: Demands = DEMANDS, workers: int = 1) -> Budget:
    """A budget whose memory fits exactly `pairs` connections with a stream each."""
    fixed = workers * demands.process_bytes + demands.bodies_bytes_max
    fixed += workers * demands.reserve_connections * prices.tcp_bytes
    pair = prices.tcp_bytes + prices.stream_bytes + prices.log_expected_bytes
    resources = Resources(fixed + pairs * pair, "setting", 20_000, workers)
    return Budget.compute(resources, demands, prices)


def gate_of(refusal: Refusal) -> Gate:
    """The gate that refused."""
    return next(gate for gate, each in REFUSALS.items() if each is refusal)


def admission_for(pairs: int, limits: Limits | None = None, demands: Demands = DEMANDS) -> Admission:
    return Admission(budget_for(pairs, demands=demands), limits or Limits())


class TestPrices:
    def test_a_connection_is_user_space_and_kernel_together(self) -> None:
        assert PRICES.tcp_bytes == (
            PRICES.conn_user_bytes + PRICES.held_bytes + PRICES.socket_bytes + PRICES.send_queue_bytes
        )

    @pytest.mark.parametrize("bound", ["head_bytes_max", "catchup_bytes_max"])
    def test_a_connection_is_priced_for_the_largest_of_what_the_settings_let_it_hold(self, bound: str) -> None:
        assert PRICES.held_bytes == PRICES.ring_bytes
        dear = replace(PRICES, **{bound: MIB})  # type: ignore[arg-type]
        for price, of_default in ((dear.tcp_bytes, PRICES.tcp_bytes), (dear.unix_bytes, PRICES.unix_bytes)):
            assert price == of_default - PRICES.ring_bytes + MIB

    def test_a_stalled_readers_send_queue_keeps_to_40_kib(self) -> None:
        assert PRICES.send_queue_bytes <= 40 * KIB

    def test_a_set_sndbuf_bounds_the_queue_at_twice_its_value(self) -> None:
        assert replace(PRICES, sndbuf_bytes=8 * KIB).send_queue_bytes == 16 * KIB
        assert replace(PRICES, sndbuf_bytes=4 * MIB).send_queue_bytes == PRICES.send_queue_bytes

    def test_the_ring_is_bounded_by_slots_and_by_bytes(self) -> None:
        assert replace(PRICES, ring_slots=32).ring_bytes == 32 * PRICES.frame_bytes + SLOT_BYTES * 32
        assert replace(PRICES, ring_slots=128).ring_bytes == 32 * KIB + SLOT_BYTES * 128

    def test_tls_is_dearer_and_a_unix_socket_has_its_own_price(self) -> None:
        assert PRICES.tls_tcp_bytes == PRICES.tcp_bytes + PRICES.tls_bytes
        assert replace(PRICES, notsent_lowat_bytes=MIB).unix_bytes == PRICES.unix_bytes

    def test_user_space_of_a_live_relayed_stream_is_within_13_kb(self) -> None:
        assert PRICES.conn_user_bytes + PRICES.stream_user_bytes + PRICES.log_expected_bytes <= 13 * KIB + 300


class TestBudget:
    def test_memory_divided_by_the_price_of_a_pair_bounds_connections_and_streams(self) -> None:
        budget = budget_for(8_000)
        assert (budget.connections_max, budget.streams_max, budget.limited_by) == (8_000, 8_000, "memory")

    def test_one_byte_less_of_memory_is_a_pair_less(self) -> None:
        full = budget_for(50)
        resources = replace(full.resources, memory_bytes=full.resources.memory_bytes - 1)
        assert Budget.compute(resources, DEMANDS, PRICES).connections_max == 49

    def test_logs_get_the_memory_that_the_pairs_leave(self) -> None:
        budget = budget_for(100)
        assert budget.logs_bytes_max == 100 * PRICES.log_expected_bytes

    def test_the_operator_may_set_the_budget_of_the_logs(self) -> None:
        default = budget_for(100)
        budget = Budget.compute(default.resources, replace(DEMANDS, logs_bytes_max=3 * MIB), PRICES)
        assert budget.logs_bytes_max == 3 * MIB
        spent = budget.connections_max * PRICES.tcp_bytes + budget.streams_max * PRICES.stream_bytes
        assert spent + 3 * MIB <= budget.available_bytes
        assert budget.connections_max < 100

    def test_bodies_take_an_eighth_of_a_small_machine(self) -> None:
        demands = replace(DEMANDS, bodies_bytes_max=256 * MIB)
        assert Budget.compute(Resources(256 * MIB, "cgroup", 20_000), demands, PRICES).bodies_bytes_max == 32 * MIB
        assert Budget.compute(Resources(8 * GIB, "machine", 20_000), demands, PRICES).bodies_bytes_max == 256 * MIB

    @given(
        memory=st.integers(64 * MIB, 64 * GIB),
        descriptors=st.integers(200, 1_000_000),
        workers=st.integers(1, 8),
        streams_max=st.integers(0, 20_000),
        tcp_memory=st.none() | st.integers(MIB, 8 * GIB),
    )
    @settings(max_examples=200)
    def test_the_admitted_connections_and_streams_always_fit_the_budget(
        self, memory: int, descriptors: int, workers: int, streams_max: int, tcp_memory: int | None
    ) -> None:
        demands = replace(DEMANDS, streams_max=streams_max)
        resources = Resources(memory, "machine", descriptors, workers, tcp_memory)
        try:
            budget = Budget.compute(resources, demands, PRICES)
        except BudgetError:
            return
        spent = budget.connections_max * PRICES.tcp_bytes + budget.streams_max * PRICES.stream_bytes
        assert spent + budget.streams_max * PRICES.log_expected_bytes <= budget.available_bytes
        assert budget.logs_bytes_max >= budget.streams_max * PRICES.log_expected_bytes
        assert budget.connections_max + budget.streams_max <= budget.descriptors_max * workers
        assert not streams_max or budget.streams_max <= streams_max
        assert budget.connections_max >= budget.streams_max >= 1

    def test_few_streams_leave_room_for_readers(self) -> None:
        demands = replace(DEMANDS, streams_max=10)
        pairs = budget_for(1_000)
        fan_out = Budget.compute(pairs.resources, demands, PRICES)
        assert fan_out.streams_max == 10
        assert fan_out.connections_max > 1_000

    def test_descriptors_count_twice_a_pair_and_per_worker(self) -> None:
        rich = Resources(64 * GIB, "machine", 20_000, workers=2)
        budget = Budget.compute(rich, DEMANDS, PRICES)
        assert budget.limited_by == "descriptors"
        assert budget.connections_max == 2 * (20_000 - 10 - 2) // 2

    def test_tcp_mem_bounds_the_queues(self) -> None:
        resources = Resources(64 * GIB, "machine", 20_000, tcp_memory_bytes=100 * MIB)
        budget = Budget.compute(resources, DEMANDS, PRICES)
        assert budget.limited_by == "tcp_mem"
        assert budget.connections_max * (PRICES.send_queue_bytes + PRICES.upstream_queue_bytes) <= 100 * MIB

    def test_a_setting_below_the_other_limits_holds(self) -> None:
        budget = budget_for(100, demands=replace(DEMANDS, conns_max=7))
        assert (budget.connections_max, budget.limited_by) == (7, "conns_max")

    def test_too_few_descriptors_for_the_setting_is_a_reason_not_to_start(self) -> None:
        demands = replace(DEMANDS, conns_max=1_000)
        with pytest.raises(BudgetError, match=r"RLIMIT_NOFILE is 1024: room for 506 connections.*1000 wanted"):
            Budget.compute(Resources(GIB, "machine", 1024), demands, PRICES)

    def test_a_budget_without_descriptors_is_refused_with_rlimit_nofile(self) -> None:
        with pytest.raises(BudgetError, match="RLIMIT_NOFILE is 12: room for 0"):
            Budget.compute(Resources(GIB, "machine", 12), DEMANDS, PRICES)

    def test_too_little_memory_says_what_to_change(self) -> None:
        with pytest.raises(BudgetError, match="raise memory_limit"):
            Budget.compute(Resources(8 * MIB, "cgroup", 20_000), DEMANDS, PRICES)

    def test_the_startup_line_names_the_limit_subtractions_prices_and_bounds(self) -> None:
        line = budget_for(8_000).describe()
        assert "\n" not in line
        for word in ("(setting)", "1 worker(s) 10 MiB", "a connection costs", "8000 connections", "by memory"):
            assert word in line

    def test_the_subtractions_and_the_available_bytes_of_the_status_add_up_to_the_limit(self) -> None:
        status = budget_for(100).status()
        subtracted = status["subtracted_bytes"]
        assert isinstance(subtracted, dict)
        assert status["memory_limit_bytes"] == sum(subtracted.values()) + status["available_bytes"]  # type: ignore[operator]


class TestConnections:
    def test_a_connection_above_the_limit_is_refused_until_a_connection_ends(self) -> None:
        admission = admission_for(3)
        assert [admission.admit_connection(PRICES.tcp_bytes) for _ in range(3)] == [None] * 3
        refusal = admission.admit_connection(PRICES.tcp_bytes)
        assert refusal is not None
        assert (gate_of(refusal), refusal.status, refusal.reason) == (Gate.CONNECTIONS, 503, CloseReason.OVER_BUDGET)
        admission.release_connection(PRICES.tcp_bytes)
        assert admission.admit_connection(PRICES.tcp_bytes) is None

    def test_a_wave_of_connections_leaves_room_for_their_streams(self) -> None:
        admission = admission_for(100)
        while admission.admit_connection(PRICES.tcp_bytes) is None:
            pass
        assert [admission.admit_relay() for _ in range(100)] == [None] * 100

    def test_a_dearer_connection_is_refused_by_memory(self) -> None:
        admission = admission_for(1)
        refusal = admission.admit_connection(10 * PRICES.tls_tcp_bytes)
        assert refusal is not None
        assert gate_of(refusal) is Gate.MEMORY

    def test_an_address_without_room_gets_429_and_is_counted(self) -> None:
        admission = admission_for(10)
        refusal = admission.refuse_address()
        assert (gate_of(refusal), refusal.status) == (Gate.ADDRESS, 429)
        assert admission.refused()["address"] == 1

    def test_a_refused_connection_took_nothing(self) -> None:
        admission = admission_for(1)
        admission.admit_connection(1)
        before = admission.status()["in_use"]
        assert admission.admit_connection(1) is not None
        assert admission.status()["in_use"] == before

    def test_descriptors_are_counted_with_the_idle_upstreams(self) -> None:
        budget = Budget.compute(Resources(GIB, "machine", 12 + 10), DEMANDS, PRICES)
        admission = Admission(budget, Limits())
        admission.note_idle_upstreams(9)
        assert admission.admit_connection(1) is None
        refusal = admission.admit_connection(1)
        assert refusal is not None
        assert gate_of(refusal) is Gate.DESCRIPTORS
        # A pooled connection is used for the relay, so it takes no further descriptor.
        assert admission.admit_relay() is None

    def test_the_reserve_is_small_and_given_back(self) -> None:
        admission = admission_for(1)
        assert [admission.take_reserved() for _ in range(3)] == [True, True, False]
        admission.release_reserved()
        assert admission.take_reserved()

    def test_the_operators_places_are_beside_the_reserve(self) -> None:
        admission = admission_for(1)
        assert admission.take_reserved() and admission.take_reserved() and not admission.take_reserved()
        assert [admission.take_operators() for _ in range(OPERATOR_CONNECTIONS_MAX)] == [
            True
        ] * OPERATOR_CONNECTIONS_MAX
        assert not admission.take_operators() and not admission.take_reserved()
        admission.release_operators()
        assert admission.take_operators()

    def test_the_connections_that_are_turned_away_are_bounded(self) -> None:
        admission = admission_for(1)
        assert [admission.take_turned_away() for _ in range(TURNED_AWAY_MAX)] == [True] * TURNED_AWAY_MAX
        assert not admission.take_turned_away()
        admission.release_turned_away()
        assert admission.take_turned_away()

    def test_an_adopted_connection_is_counted_even_over_the_limit(self) -> None:
        admission = admission_for(1)
        admission.admit_connection(5)
        admission.adopt_connection(5)
        assert admission.status()["in_use"]["connections"] == 2  # type: ignore[index]
        admission.release_connection(5)
        admission.release_connection(5)
        assert admission.status()["in_use"]["connections"] == 0  # type: ignore[index]


class TestStreams:
    def test_a_place_that_gave_way_is_given_again(self) -> None:
        admission = admission_for(2)
        for _ in range(2):
            assert admission.admit_relay() is None
        kinds: list[bool] = []

        def give_way(relayed: bool) -> bool:
            kinds.append(relayed)
            admission.release_relay()
            return True

        assert admission.admit_relay(give_way) is None
        assert kinds == [True], "a place at an upstream is wanted first"
        assert admission.refused()["upstream"] == 0
        assert admission.admit_relay(lambda relayed: False) is not None
        assert admission.admit_relay(lambda relayed: True) is not None, "nothing was freed after all"
        assert admission.refused()["upstream"] == 2

    def test_a_stream_above_the_limit_is_refused(self) -> None:
        admission = admission_for(2)
        assert [admission.admit_stream() for _ in range(2)] == [None, None]
        refusal = admission.admit_stream()
        assert refusal is not None
        assert (gate_of(refusal), refusal.code) == (Gate.STREAMS, "over_capacity")

    def test_a_relay_above_the_limit_in_flight_is_refused(self) -> None:
        admission = admission_for(10, Limits(upstream_in_flight_max=1))
        assert admission.admit_relay() is None
        refusal = admission.admit_relay()
        assert refusal is not None
        assert gate_of(refusal) is Gate.UPSTREAM
        assert admission.admit_stream() is None
        admission.release_relay()
        assert admission.admit_relay() is None

    def test_a_refused_relay_took_nothing(self) -> None:
        admission = admission_for(2)
        for _ in range(2):
            assert admission.admit_stream() is None
        before = admission.status()["in_use"]
        refusal = admission.admit_relay()
        assert refusal is not None
        assert gate_of(refusal) is Gate.STREAMS
        assert admission.status()["in_use"] == before

    def test_the_release_of_a_relay_gives_back_all_that_it_took(self) -> None:
        admission = admission_for(2)
        before = admission.status()["in_use"]
        assert admission.admit_relay() is None
        assert admission.status()["in_use"] != before
        admission.release_relay()
        assert admission.status()["in_use"] == before

    def test_logs_are_charged_as_they_grow(self) -> None:
        admission = admission_for(10)
        admission.charge_logs(budget_for(10).available_bytes)
        refusal = admission.admit_stream()
        assert refusal is not None
        assert gate_of(refusal) is Gate.MEMORY
        admission.charge_logs(-PRICES.stream_bytes)
        assert admission.admit_stream() is None

    def test_a_late_loop_refuses_streams_and_no_connections(self) -> None:
        admission = admission_for(10, Limits(loop_lag_max_s=0.5))
        admission.note_lag(0.9)
        assert admission.admit_stream() is None
        admission.note_lag(0.9)
        refusal = admission.admit_relay()
        assert refusal is not None
        assert gate_of(refusal) is Gate.LOOP_LAG
        assert admission.admit_connection(1) is None
        admission.note_lag(0.0)
        assert admission.admit_relay() is None

    def test_tokens_that_wait_for_the_loads_sake_refuse_streams(self) -> None:
        admission = admission_for(10)
        admission.note_held(HELD_S_MAX)
        assert admission.admit_relay() is None
        admission.note_held(1.2 * HELD_S_MAX)
        refusal = admission.admit_relay()
        assert refusal is not None
        assert gate_of(refusal) is Gate.LOOP_LAG
        assert admission.saturation()["loop_lag"] == 1.0
        admission.note_held(0.05)
        assert admission.admit_relay() is None
        assert admission.saturation()["loop_lag"] == pytest.approx(0.2)

    def test_measured_memory_above_the_limit_refuses_too(self) -> None:
        admission = admission_for(10)
        admission.note_resident(budget_for(10).resources.memory_bytes + 1)
        refusal = admission.admit_stream()
        assert refusal is not None
        assert gate_of(refusal) is Gate.MEMORY


class TestBodies:
    def test_all_bodies_together_have_a_limit(self) -> None:
        admission = admission_for(1)
        assert admission.admit_body(MIB - 1) is None
        refusal = admission.admit_body(2)
        assert refusal is not None
        assert gate_of(refusal) is Gate.BODIES
        admission.release_body(MIB - 1)
        assert admission.admit_body(MIB) is None


class TestWorkers:
    def test_a_worker_counts_all_rows_and_writes_only_its_own(self) -> None:
        budget = budget_for(3, workers=2)
        rows = [[0] * len(SharedNumber), [0] * len(SharedNumber)]
        first = Admission(budget, Limits(), rows[0], [rows[1]])
        second = Admission(budget, Limits(), rows[1], [rows[0]])
        assert first.admit_connection(1) is None
        assert second.admit_connection(1) is None
        assert first.admit_connection(1) is None
        assert second.admit_connection(1) is not None
        assert [row[SharedNumber.CONNECTIONS] for row in rows] == [2, 1]
        assert first.saturation()["connections"] == second.saturation()["connections"] == 1.0

    def test_the_budget_of_the_logs_is_split_over_the_workers(self) -> None:
        budget = budget_for(10, workers=2)
        assert Admission(budget, Limits()).logs_bytes_max == budget.logs_bytes_max // 2

    def test_the_logs_give_way_to_events_that_have_begun(self) -> None:
        budget = budget_for(1000)
        admission, whole = Admission(budget, Limits()), budget.logs_bytes_max
        admission.charge_held(1000)
        assert admission.logs_bytes_max == whole - 1000
        admission.charge_held(2 * whole)
        assert admission.logs_bytes_max == whole // 2
        admission.charge_held(-1000 - 2 * whole)
        assert admission.logs_bytes_max == whole


class TestRefusal:
    def test_it_may_be_tried_again_when_others_have_left(self) -> None:
        admission = admission_for(1)
        admission.admit_stream()
        refusal = admission.admit_stream()
        assert refusal is not None and refusal.retry is Retry.WITH_ROOM

    def test_every_gates_refusal_is_counted(self) -> None:
        admission = admission_for(1)
        admission.admit_stream()
        admission.admit_stream()
        assert admission.refused() == {gate.value: int(gate is Gate.STREAMS) for gate in Gate}


class TestSaturation:
    def test_saturation_is_0_when_empty_and_1_when_full(self) -> None:
        admission = admission_for(4)
        assert set(admission.saturation().values()) == {0.0}
        while admission.admit_connection(PRICES.tcp_bytes) is None:
            assert admission.admit_relay() is None
        parts = admission.saturation()
        assert parts["connections"] == parts["streams"] == parts["upstream"] == 1.0
        assert 0.8 < parts["memory"] < 1.0
        assert admission.saturation_highest() == 1.0

    def test_saturation_is_never_above_1(self) -> None:
        admission = admission_for(4, Limits(loop_lag_max_s=0.1))
        admission.note_lag(50)
        assert admission.saturation()["loop_lag"] == 1.0

    def test_saturation_of_a_lag_gate_that_is_off_is_0(self) -> None:
        admission = admission_for(4, Limits(loop_lag_max_s=0))
        admission.note_lag(50)
        admission.note_held(1)
        assert admission.saturation()["loop_lag"] == 0.0
        assert admission.admit_stream() is None


class TestAddresses:
    @pytest.mark.parametrize(
        ("address", "key"),
        [
            ("192.0.2.7", "192.0.2.7"),
            ("::ffff:192.0.2.7", "192.0.2.7"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
            ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
            ("fe80::1%eth0", "fe80::/64"),
        ],
    )
    def test_a_client_is_counted_by_its_ipv4_address_or_ipv6_network(self, address: str, key: str) -> None:
        assert address_key(address) == key

    def test_a_text_that_is_no_address_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="nonsense"):
            address_key("nonsense")

    def test_an_address_without_connections_has_no_entry(self) -> None:
        gate = AddressGate(2)
        gate.take("a")
        gate.take("a")
        assert not gate.has_room("a")
        gate.give_back("a")
        gate.give_back("a")
        assert len(gate) == 0


class Gates(RuleBasedStateMachine):
    """Any order of arrivals and ends against plain counts: the sums agree, and after all releases nothing is in use."""

    def __init__(self) -> None:
        super().__init__()
        self.admission = admission_for(5)
        self.connections: list[int] = []
        self.relays = self.streams = self.logs = self.bodies = 0

    @rule(price=st.sampled_from([PRICES.tcp_bytes, PRICES.unix_bytes]))
    def connect(self, price: int) -> None:
        if self.admission.admit_connection(price) is None:
            self.connections.append(price)

    @precondition(lambda self: self.connections)
    @rule(pick=st.randoms(use_true_random=False))
    def disconnect(self, pick: random.Random) -> None:
        self.admission.release_connection(self.connections.pop(pick.randrange(len(self.connections))))

    @rule()
    def relay(self) -> None:
        self.relays += self.admission.admit_relay() is None

    @precondition(lambda self: self.relays)
    @rule()
    def end_relay(self) -> None:
        self.admission.release_relay()
        self.relays -= 1

    @rule()
    def publish(self) -> None:
        self.streams += self.admission.admit_stream() is None

    @precondition(lambda self: self.streams)
    @rule()
    def seal(self) -> None:
        self.admission.release_stream()
        self.streams -= 1

    @rule(size=st.integers(-4_000, 4_000))
    def log(self, size: int) -> None:
        size = max(size, -self.logs)
        self.admission.charge_logs(size)
        self.logs += size

    @rule(size=st.integers(1, MIB))
    def body(self, size: int) -> None:
        if self.admission.admit_body(size) is None:
            self.bodies += size

    @precondition(lambda self: self.bodies)
    @rule()
    def body_read(self) -> None:
        self.admission.release_body(self.bodies)
        self.bodies = 0

    @invariant()
    def sums_agree(self) -> None:
        streams = self.relays + self.streams
        assert self.admission.status()["in_use"] == {
            "connections": len(self.connections),
            "streams": streams,
            "upstream": self.relays,
            "memory": sum(self.connections) + streams * PRICES.stream_bytes + self.logs,
            "bodies": self.bodies,
        }
        assert len(self.connections) <= 5
        assert streams <= 5

    def teardown(self) -> None:
        while self.connections:
            self.admission.release_connection(self.connections.pop())
        for _ in range(self.relays):
            self.admission.release_relay()
        for _ in range(self.streams):
            self.admission.release_stream()
        self.admission.charge_logs(-self.logs)
        self.admission.release_body(self.bodies)
        assert set(self.admission.saturation().values()) == {0.0}


TestGates = Gates.TestCase
TestGates.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
