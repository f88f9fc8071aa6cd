"""The table of `make coverage`: its modules exist, and a figure below a row's number is reported."""

from __future__ import annotations

import pytest
from own_coverage import BRANCHES_PERCENT_MIN, Measured, falls_short, measured_in, mirror_of, source_of


@pytest.mark.parametrize("module", BRANCHES_PERCENT_MIN)
def test_every_module_of_the_table_has_tests_of_its_own_and_at_least_nine_tenths(module: str) -> None:
    assert source_of(module).is_file() and mirror_of(module).is_file()
    assert 90 <= BRANCHES_PERCENT_MIN[module] <= 100


def test_a_branch_less_than_the_number_falls_short() -> None:
    assert BRANCHES_PERCENT_MIN["net/tunnel"] == 96
    assert not falls_short("net/tunnel", Measured(50, 48))
    assert falls_short("net/tunnel", Measured(50, 47))


def test_lines_do_not_make_up_for_branches() -> None:
    totals = {"num_statements": 1000, "covered_lines": 1000, "num_branches": 10, "covered_branches": 8}
    assert measured_in({"totals": totals}).percent == 80


def test_a_module_without_branches_is_covered() -> None:
    assert Measured(0, 0).percent == 100
