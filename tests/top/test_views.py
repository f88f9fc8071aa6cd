"""The tables: sorts, and the things that a row names."""

from __future__ import annotations

from typing import Any

import pytest

from streamd.daemon.admin_cli import KINDS, TABLES
from streamd.top.views import VIEWS

READERS = VIEWS["readers"]


def arranged(head: str, rows: list[dict[str, Any]], *, is_reversed: bool = False) -> list[Any]:
    return [row["id"] for row in READERS.arranged(rows, head, is_reversed=is_reversed)]


def test_numbers_come_from_the_highest_words_from_a_and_nothing_last() -> None:
    rows = [
        {"id": "r_b", "first_s": 0.2, "model": None},
        {"id": "r_d", "first_s": None, "model": "alpha"},
        {"id": "r_c", "first_s": 1.5, "model": "Beta"},
        {"id": "r_a", "first_s": 0.2, "model": "gamma"},
    ]
    assert arranged("FIRST", rows) == ["r_c", "r_a", "r_b", "r_d"], "of equal rows the ids decide: no row jumps"
    assert arranged("FIRST", rows, is_reversed=True) == ["r_a", "r_b", "r_c", "r_d"]
    assert arranged("MODEL", rows) == ["r_d", "r_c", "r_a", "r_b"]


@pytest.mark.parametrize("view", VIEWS.values(), ids=lambda view: view.name)
def test_every_sort_is_a_column_and_one_of_the_daemons(view: Any) -> None:
    heads = [column.head for column in view.columns]
    assert view.sorted_by in heads and set(view.sorts) <= set(heads)
    of_daemon = {table.path: table.sorts for table in TABLES.values()}
    assert set(view.sorts.values()) <= set(of_daemon.get(view.path, ()))


@pytest.mark.parametrize("view", [VIEWS["streams"], VIEWS["readers"], VIEWS["keys"]], ids=lambda view: view.name)
def test_no_column_of_the_commands_is_missing(view: Any) -> None:
    (table,) = [each for each in TABLES.values() if each.path == view.path]
    assert {column.head for column in view.columns} == {column.head for column in table.columns}


def test_a_row_names_the_things_that_can_be_ended() -> None:
    reader = {"id": "r_1", "peer": "10.0.0.7:5", "stream": "s_1", "key": "q7", "key_name": "alice"}
    assert [(each.kind, each.id) for each in READERS.targets(reader)] == [
        ("reader", "r_1"),
        ("stream", "s_1"),
        ("key", "q7"),
    ]
    assert "alice (q7)" in READERS.targets(reader)[2].text
    assert [each.kind for each in READERS.targets({**reader, "key": None})] == ["reader", "stream"]
    assert [each.kind for each in VIEWS["streams"].targets({"id": "s_1", "key": "h-x"})] == ["stream", "key"]
    assert [each.kind for each in VIEWS["keys"].targets({"key": "h-x", "key_name": None})] == ["key"]
    assert VIEWS["upstreams"].targets({"name": "gpu1"}) == []
    assert {each.kind for each in READERS.targets(reader)} == set(KINDS)
