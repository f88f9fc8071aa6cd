from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.core.shares import Shares


def shares(**counts: int) -> Shares[str]:
    made: Shares[str] = Shares()
    for owner, count in counts.items():
        for k in range(count):
            made.add(owner, f"{owner}{k}")
    return made


def anything(thing: str) -> bool:
    return True


@pytest.mark.parametrize(
    ("counts", "owner", "yields"),
    [
        ({}, "a", None),
        ({"a": 8}, "a", None),  # the principal with the most is refused itself
        ({"a": 8}, "b", "a0"),
        ({"a": 2}, "b", "a0"),
        ({"a": 1}, "b", None),  # afterwards `a` would have less than `b`
        ({"a": 3, "b": 1}, "b", "a0"),
        ({"a": 2, "b": 1}, "b", None),
        ({"a": 3, "b": 5, "c": 4}, "d", "b0"),
    ],
)
def test_the_oldest_of_the_largest_holder_gives_way(counts: dict[str, int], owner: str, yields: str | None) -> None:
    assert shares(**counts).yielding(owner, anything) == yields


def test_where_the_largest_holder_has_nothing_to_give_the_next_does() -> None:
    held = shares(a=5, b=3, c=2)
    assert held.yielding("d", lambda thing: not thing.startswith("a")) == "b0"
    assert held.yielding("d", lambda thing: thing == "a3") == "a3"
    assert held.yielding("d", lambda thing: False) is None


owners = st.sampled_from("abcd")
steps = st.lists(st.tuples(owners, st.integers(0, 9), st.booleans()))


@given(steps, owners, st.integers(1, 12))
def test_nothing_is_counted_twice_and_a_place_never_goes_to_a_larger_holder(
    steps: list[tuple[str, int, bool]], owner: str, modulus: int
) -> None:
    made: Shares[str] = Shares()
    held: dict[str, dict[str, None]] = {each: {} for each in "abcd"}
    for each, number, adds in steps:
        thing = f"{each}{number}"
        if adds:
            made.add(each, thing)
            held[each][thing] = None
        else:
            made.discard(each, thing)
            held[each].pop(thing, None)
    assert made.total == sum(map(len, held.values()))
    assert len(made._held) == sum(map(bool, held.values())), "a principal with nothing takes no room"
    assert all(made.count(each) == len(held[each]) for each in held)
    may: Callable[[str], bool] = lambda thing: int(thing[1:]) % modulus == 0  # noqa: E731
    found = made.yielding(owner, may)
    able = [each for each in held if len(held[each]) - 1 >= len(held[owner]) + 1 and any(map(may, held[each]))]
    assert (found is not None) == bool(able)
    if found is not None:
        assert len(held[found[0]]) == max(len(held[each]) for each in able)
        assert found == next(filter(may, held[found[0]]))
