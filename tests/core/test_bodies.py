"""BodyShares: nobody holds so much that others find no room."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamd.core.admission import MIB, Admission, Budget, Demands, Limits, Prices, Resources
from streamd.core.bodies import BodyShares
from streamd.core.body_charge import BodyCharge

ALL_BYTES = 64 * MIB


def admission(body_bytes_max: int = MIB) -> Admission:
    resources = Resources(memory_bytes=1 << 40, memory_source="test", descriptors_per_worker=1000)
    budget = Budget.compute(resources, Demands(bodies_bytes_max=ALL_BYTES), Prices())
    return Admission(budget, Limits(body_bytes_max=body_bytes_max))


def filled(books: Admission, *holders: str) -> list[BodyCharge]:
    """Bodies of a MiB until one is refused."""
    charges = []
    while True:
        charge = BodyCharge(books, holders)
        if charge.resize(MIB) is not None:
            return charges
        charges.append(charge)


def test_greedy_holders_leave_as_much_free_as_each_of_them_has() -> None:
    books = admission()
    counts = [len(filled(books, name)) for name in ("a", "b", "c", "d")]
    assert counts == [32, 16, 8, 4]
    assert BodyCharge(books, ("e",)).resize(MIB) is None


def test_a_body_counts_for_its_principal_and_for_its_address() -> None:
    books = admission()
    filled(books, "principal a", "address 1")
    assert BodyCharge(books, ("principal a", "address 2")).resize(2 * MIB) is not None
    assert BodyCharge(books, ("principal b", "address 1")).resize(2 * MIB) is not None
    assert BodyCharge(books, ("principal b", "address 2")).resize(2 * MIB) is None


def test_one_body_of_the_largest_size_always_fits_in_an_empty_budget() -> None:
    books = admission(body_bytes_max=ALL_BYTES)
    charge = BodyCharge(books, ("a",))
    assert charge.resize(ALL_BYTES) is None
    charge.release()
    assert BodyCharge(admission(), ("a",)).resize(ALL_BYTES) is not None


def test_without_a_holder_only_the_sum_is_bounded() -> None:
    assert len(filled(admission())) == 64


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.integers(0, 40)), max_size=40))
def test_the_books_hold_what_the_charges_hold(steps: list[tuple[str, int, int]]) -> None:
    books = admission()
    charges = {(name, k): BodyCharge(books, (name, f"address {k}")) for name in "abc" for k in range(4)}
    for name, k, size in steps:
        before = charges[name, k].held_bytes
        if charges[name, k].resize(size * MIB) is not None:
            assert size * MIB > before == charges[name, k].held_bytes
        held = sum(charge.held_bytes for charge in charges.values())
        assert books.bodies_bytes == held <= ALL_BYTES
    for charge in charges.values():
        charge.release()
    assert books.bodies_bytes == 0 and len(books._shares) == 0


def test_a_holder_without_bytes_takes_no_room() -> None:
    shares = BodyShares()
    shares.take(("a", "b"), 2)
    shares.give_back(("a",), 2)
    shares.give_back(("b",), 1)
    assert len(shares) == 1
