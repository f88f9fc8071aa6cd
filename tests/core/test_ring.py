"""The ring of one reader."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.core.ring import RING_SLOTS_MAX, RING_SLOTS_MIN, SLOT_BYTES, Ring


@pytest.mark.parametrize("slots", [0, 1, RING_SLOTS_MIN - 1, RING_SLOTS_MAX + 1])
def test_the_number_of_slots_is_bounded(slots: int) -> None:
    with pytest.raises(ValueError, match="32 to 128"):
        Ring(slots, 1000)


def test_frames_leave_in_their_order_across_the_end_of_the_array() -> None:
    ring = Ring(32, 1000)
    for lap in range(5):
        for size in range(20):
            assert ring.push(lap + size)
        assert [ring.drop_oldest() for _ in range(20)] == [lap + size for size in range(20)]


def test_a_ring_is_full_at_its_slots() -> None:
    ring = Ring(32, 1000)
    assert all(ring.push(1) for _ in range(32))
    assert not ring.push(1)
    assert (ring.held, ring.bytes_held, ring.slots) == (32, 32, 32)
    ring.drop_oldest()
    assert ring.push(1)


def test_a_ring_is_full_at_its_bytes() -> None:
    ring = Ring(32, bytes_max=10)
    assert ring.push(7)
    assert not ring.push(4)
    assert ring.push(3)
    assert not ring.push(1)
    assert (ring.held, ring.bytes_held) == (2, 10)


def test_one_frame_always_fits() -> None:
    ring = Ring(32, bytes_max=10)
    assert ring.push(1 << 20)
    assert not ring.push(1)
    assert ring.drop_oldest() == 1 << 20


def test_dropping_from_an_empty_ring_is_an_error() -> None:
    with pytest.raises(IndexError):
        Ring(32, 1000).drop_oldest()


def test_a_cleared_ring_takes_as_many_frames_as_a_new_one() -> None:
    ring = Ring(32, 1000)
    for _ in range(5):
        ring.push(3)
    ring.drop_oldest()
    ring.clear()
    assert (ring.held, ring.bytes_held) == (0, 0)
    assert all(ring.push(1) for _ in range(32))


def test_a_full_ring_takes_as_much_memory_as_an_empty_one() -> None:
    ring = Ring(64, 1 << 20)
    empty = sys.getsizeof(ring._sizes)
    for _ in range(64):
        ring.push(300)
    assert sys.getsizeof(ring._sizes) == empty
    assert empty + sys.getsizeof(ring) < 600


def test_a_slot_takes_as_many_bytes_as_admission_charges() -> None:
    small, large = Ring(RING_SLOTS_MIN, 1), Ring(RING_SLOTS_MAX, 1)
    grown = sys.getsizeof(large._sizes) - sys.getsizeof(small._sizes)
    assert grown == SLOT_BYTES * (RING_SLOTS_MAX - RING_SLOTS_MIN)


@given(
    st.lists(st.one_of(st.integers(1, 40), st.sampled_from(["drop", "clear"])), max_size=200),
    st.integers(32, 40),
    st.integers(1, 200),
)
def test_a_ring_behaves_like_a_bounded_list(steps: list[int | str], slots: int, bytes_max: int) -> None:
    ring, model = Ring(slots, bytes_max), list[int]()
    for step in steps:
        if isinstance(step, int):
            fits = not model or (len(model) < slots and sum(model) + step <= bytes_max)
            assert ring.push(step) is fits
            if fits:
                model.append(step)
        elif step == "drop" and model:
            assert ring.drop_oldest() == model.pop(0)
        elif step == "clear":
            ring.clear()
            model.clear()
        assert (ring.held, ring.bytes_held) == (len(model), sum(model))
