"""The words of a filter."""

from __future__ import annotations

from typing import Any

import pytest

from streamd.top.filter import Filter

ROW: dict[str, Any] = {
    "id": "r_1",
    "request": "req_77",
    "key": "q7Xw",
    "key_name": "alice",
    "state": "paused",
    "peer": "10.0.0.7:5",
}


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("", True),
        ("ALI", True),
        ("alice 10.0", True),
        ("alice bob", False),
        ("req_77", True),  # a member without a column
        ("key=alice", True),
        ("key=q7Xw", True),
        ("key=ali", False),
        ("state=paused alice", True),
        ("state=live", False),
        ("model=m", True),  # this table has no models
        ("key=", False),  # an unfinished word is looked for like any other
        ("a=b", False),
    ],
)
def test_a_row_has_all_words(text: str, passes: bool) -> None:
    assert Filter.parse(text).has(ROW, ["alice", "10.0.0.7:5", "paused"], ()) is passes


def test_the_daemon_is_asked_for_the_filters_that_it_knows_and_not_checked() -> None:
    wanted = Filter.parse("key=alice stream=s_1 fast")
    assert wanted.query(("key", "model")) == {"key": "alice"}
    assert wanted.has({"key": "h-1", "id": "fast"}, [], ("key", "stream")), (
        "it knows the name of the key, a row doesn't"
    )
