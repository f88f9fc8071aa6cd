"""A look: the requests that it makes of the daemon."""

from __future__ import annotations

from typing import Any, cast

import pytest

from streamd.daemon.admin_client import AdminClient, AdminRefusedError
from streamd.top.filter import Filter
from streamd.top.look import ROWS, ROWS_MAX, TableWish, look
from streamd.top.views import VIEWS


class Client:
    """Answers from a table, and notes the requests."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.asked: list[tuple[str, Any]] = []

    def ask(self, method: str, path: str, query: Any = None) -> Any:
        self.asked.append((path, query))
        return self.answers[path.strip("/")]


def wish(view: str, head: str, text: str = "", *, is_reversed: bool = False) -> TableWish:
    return TableWish(VIEWS[view], head, is_reversed, Filter.parse(text))


def test_the_daemon_sorts_where_it_can_and_else_sends_all_that_it_may() -> None:
    assert wish("readers", "PAUSED").query() == {"limit": str(ROWS), "sort": "paused"}
    assert wish("readers", "PAUSED", is_reversed=True).query() == {"limit": str(ROWS_MAX), "sort": "paused"}
    assert wish("readers", "UNSENT").query() == {"limit": str(ROWS_MAX)}
    assert wish("readers", "LAG", "alice").query() == {"limit": str(ROWS_MAX), "sort": "lag"}
    keyed = {"sort": "lag", "key": "alice"}
    assert wish("readers", "LAG", "key=alice").query() == {"limit": str(ROWS), **keyed}
    assert wish("readers", "LAG", "key=alice state=paused").query() == {"limit": str(ROWS_MAX), **keyed}


def test_upstreams_come_from_the_status_alone() -> None:
    client = Client(status={"upstreams": {"gpu1": {"state": "up"}, "gpu2": {"state": "out"}}})
    found = look(cast(AdminClient, client), wish("upstreams", "STATE"))
    assert client.asked == [("/status", None)] and found.total == 2
    assert [row["name"] for row in found.rows] == ["gpu1", "gpu2"]


def test_a_table_says_how_many_rows_and_workers_are_missing() -> None:
    client = Client(status={"upstreams": {}}, readers={"data": [{"id": "r_1"}], "total": 7, "workers_missing": 1})
    found = look(cast(AdminClient, client), wish("readers", "LAG"))
    assert (len(found.rows), found.total, found.workers_missing) == (1, 7, 1)


@pytest.mark.parametrize("status", [[], {}, {"upstreams": 5}, None])
def test_an_answer_of_something_else_is_said(status: Any) -> None:
    with pytest.raises(AdminRefusedError, match="isn't streamd's"):
        look(cast(AdminClient, Client(status=status)), wish("readers", "LAG"))
