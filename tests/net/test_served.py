"""The pairs of upstream and model under which requests are counted: bounded, whatever clients write."""

from __future__ import annotations

import pytest

from streamd.net.served import MODELS_MAX, NAME_BYTES_MAX, OTHER, OTHERS_MIN, PAIRS_MAX, Served, ServedPairs


def test_a_model_without_a_name_in_settings_or_lists_is_other() -> None:
    pairs = ServedPairs()
    assert pairs.of("up", "big", is_named=True) == ("up", "big")
    for model in ("", "of-a-client", "x" * 10_000):
        assert pairs.of("up", model, is_named=False) == ("up", OTHER)
    assert pairs.board.pairs() == [("up", "big"), ("up", OTHER)]


@pytest.mark.parametrize("model", ["x" * (NAME_BYTES_MAX + 1), "ä" * NAME_BYTES_MAX, ""])
def test_a_name_that_is_too_long_for_its_place_is_other(model: str) -> None:
    assert ServedPairs().of("up", model, is_named=True) == ("up", OTHER)


def test_beyond_a_hundred_models_each_further_one_is_other() -> None:
    pairs = ServedPairs()
    found = [pairs.of("up", f"m{k}", is_named=True) for k in range(MODELS_MAX + 5)]
    assert [each.model for each in found[-6:]] == [f"m{MODELS_MAX - 1}", *[OTHER] * 5]
    assert pairs.of("second", "m0", is_named=True) == ("second", "m0"), "a known model at another upstream"


def test_pairs_of_named_models_leave_places_for_the_others_of_each_upstream() -> None:
    pairs = ServedPairs()
    for upstream in range(9):
        for model in range(50):
            pairs.of(f"up{upstream}", f"m{model}", is_named=True)
    assert sum(each.model != OTHER for each in pairs.board.pairs()) == PAIRS_MAX - OTHERS_MIN
    assert pairs.of("up63", "x", is_named=False) == ("up63", OTHER)


def test_a_full_list_grows_no_more() -> None:
    pairs = ServedPairs()
    for upstream in range(2 * PAIRS_MAX):
        pairs.of(f"up{upstream}", "x", is_named=False)
    assert len(pairs.board.pairs()) == PAIRS_MAX
    assert pairs.of("up-new", "x", is_named=False) in pairs.board.pairs()
    assert pairs.of("up0", "x", is_named=False) == Served("up0", OTHER)
