"""The comparison of books and memory: its arithmetic, its list of states, and a state from beginning to end."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from tools import needs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "loadtest"))
books: Any = importlib.import_module("books")
states: Any = importlib.import_module("book_states")

MIB = 1024 * 1024


@pytest.mark.parametrize(
    ("grown_bytes", "counted_bytes", "ratio"),
    [
        (30 * MIB, 20 * MIB, 1.5),
        (30 * MIB, 0, float("inf")),
        (30 * MIB, -MIB, float("inf")),
        (1000, 0, 0.0),  # less than a look can tell
    ],
)
def test_memory_that_nothing_counts_has_no_finite_ratio(grown_bytes: int, counted_bytes: int, ratio: float) -> None:
    assert books.Row("a state", 1, books.Look(grown_bytes, counted_bytes, 0)).ratio == ratio


def test_each_state_has_a_name_of_its_own() -> None:
    names = [state.name for state in states.STATES]
    assert len(set(names)) == len(names)


@needs("ss")
@pytest.mark.parametrize("name", ["half events, upstream", "logs, whole events"])
def test_memory_is_counted_as_it_is_held(name: str) -> None:
    """Less than the bound: events of a kilobyte once left a hole behind each of them, a ratio of 1.45."""
    (state,) = (state for state in states.STATES if state.name == name)
    row = books.measure(state)
    assert row.grown.counted_bytes > 64 * MIB
    assert 0.5 < row.ratio <= 1.25
