"""The tables of members: their levels, their judgement, and their copy in PROTOCOL.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from streamd.wire.dialect import Dialect
from streamd.wire.dialects.merging import Merge, Merging, merges

PROTOCOL = Path(__file__).parents[2] / "docs" / "PROTOCOL.md"
TABLE = Merging(
    {
        "id": Merge.EQUAL,
        "at": Merge.FIRST,
        "pad": Merge.LAST,
        "usage": Merge.COUNT,
        "list[].name": Merge.REPEATED,
        "list[].inner.text": Merge.TEXT,
        "list[].inner.ids": Merge.APART,
    },
    listed="list",
)


def test_a_table_is_taken_apart_into_levels() -> None:
    assert TABLE.top["list"] is Merge.INSIDE and TABLE.top["id"] is Merge.EQUAL
    assert TABLE.at("list[]") == {"name": Merge.REPEATED, "inner": Merge.INSIDE}
    assert TABLE.at("list[].inner") == {"text": Merge.TEXT, "ids": Merge.APART}
    assert TABLE.counted == ("usage",) and TABLE.last == ("usage", "pad")
    assert TABLE.compared_not == {"at", "pad", "list"}


@pytest.mark.parametrize(
    ("members", "verdict"),
    [
        ({}, True),
        ({"text": "a"}, True),
        ({"text": "a", "ids": None}, True),
        ({"text": "a", "ids": []}, True),
        ({"text": "a", "ids": ""}, True),
        ({"text": "a", "ids": {}}, True),
        ({"text": "a", "ids": 0}, None),
        ({"text": "a", "ids": False}, None),
        ({"text": "a", "ids": [1]}, None),
        ({"text": "a", "unheard_of": None}, True),
        ({"text": "a", "unheard_of": []}, None),
    ],
)
def test_only_members_that_are_safe_or_add_nothing_let_an_event_be_merged(members: Any, verdict: bool | None) -> None:
    assert merges(members, TABLE.at("list[].inner")) is verdict


def test_a_member_that_repeats_keeps_its_event_unmerged_but_not_out_of_a_template() -> None:
    assert merges({"name": "a"}, TABLE.at("list[]")) is False
    assert merges({"name": "", "inner": {"ids": [1]}}, TABLE.at("list[]")) is True


def test_the_protocol_lists_each_member_with_its_rule() -> None:
    rows = re.findall(r"^ *\| (\w+) \| ([a-z][^|]+) \| ([^|]+) \|$", PROTOCOL.read_text(), re.MULTILINE)
    written = {(api, path): rule for api, rule, paths in rows for path in re.findall("`([^`]+)`", paths)}
    held = {
        ("published" if dialect is Dialect.UNKNOWN else dialect.value, path): rule.value
        for dialect in Dialect
        if dialect is not Dialect.COMPLETIONS  # it has chat's table
        for path, rule in dialect.api.merging.table.items()
    }
    assert Dialect.COMPLETIONS.api.merging is Dialect.CHAT.api.merging
    assert {key: rule for key, rule in written.items() if key[0] in {api for api, _ in held}} == held
