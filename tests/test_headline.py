"""The headline's own arithmetic: a scenario that takes a miss for a hit would prove nothing."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "loadtest"))
figures: Any = importlib.import_module("figures")
memory: Any = importlib.import_module("memory")


class TestQuantile:
    @pytest.mark.parametrize(
        ("values", "q", "expected"),
        [
            ([3.0, 1.0, 2.0], 0.5, 2.0),
            ([4.0, 1.0, 2.0, 3.0], 0.5, 2.0),
            ([float(k) for k in range(1, 101)], 0.99, 99.0),
            ([float(k) for k in range(1, 1001)], 0.99, 990.0),
            ([5.0], 0.99, 5.0),
            ([1.0, 2.0], 1.0, 2.0),
            ([], 0.5, None),
        ],
    )
    def test_quantiles_of_known_values_are_right(self, values: list[float], q: float, expected: float | None) -> None:
        assert figures.quantile(values, q) == expected

    @given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
    def test_at_least_a_share_q_is_at_or_below_the_quantile(self, values: list[float], q: float) -> None:
        found = figures.quantile(values, q)
        assert found in values
        assert sum(value <= found for value in values) >= q * len(values) - 1e-6
        assert sum(value < found for value in values) < q * len(values) + 1e-6


class TestReport:
    def test_a_missed_target_is_reported_as_missed(self, capsys: pytest.CaptureFixture[str]) -> None:
        report = figures.Report("trial")
        report.tell("seen", 3)
        report.at_most("low", 1.0, 1.0)
        report.at_least("high", 2.0, 2.0)
        report.between("middle", 5, 4, 5)
        report.exactly("count", 7, 7)
        assert report.all_hold
        report.at_most("too_high", 1.1, 1.0)
        report.at_least("too_low", 1.9, 2.0)
        report.between("outside", 6, 4, 5)
        report.exactly("one_off", 8, 7)
        report.at_most("nothing", None, 1.0)
        said = json.loads(report.line(took_s=1))
        assert said["missed"] == ["too_high", "too_low", "outside", "one_off", "nothing"]
        assert (said["holds"], said["took_s"], said["figures"]["seen"]) == (False, 1, 3)
        assert capsys.readouterr().out.count("FAILED") == 5


@pytest.mark.parametrize(("connections", "workers"), [(100, 1), (8000, 2)])
def test_the_search_finds_the_least_memory_limit_for_a_number_of_connections(connections: int, workers: int) -> None:
    """Descriptors of the machine may allow fewer: then no memory is enough, and the search returns its bound."""
    limit = memory.memory_limit_for(connections, workers)
    if limit == memory.LIMIT_MOST_BYTES:
        pytest.skip("the file limit is too low here")
    assert memory.admitted(limit, workers) == connections
    assert memory.admitted(limit - 1, workers) < connections
