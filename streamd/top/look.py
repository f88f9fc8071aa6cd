"""A look at the daemon: /status, and the rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from streamd.daemon.admin_client import AdminClient, AdminRefusedError
from streamd.top.filter import Filter
from streamd.top.views import View

# Rows asked for. Where the daemon ranks all its rows by the wanted column, the highest are enough; words and other
# columns are looked for in the most that a reply can have. A row costs the daemon 15 us.
ROWS: Final = 200
ROWS_MAX: Final = 1000


class TableWish(NamedTuple):
    """The table that is wanted."""

    view: View
    sorted_by: str
    is_reversed: bool
    filter: Filter

    def query(self) -> dict[str, str]:
        """The query of the table's request."""
        word = self.view.sorts.get(self.sorted_by)
        of_daemon = self.filter.query(self.view.filters)
        is_whole = not self.filter.words and len(of_daemon) == len(self.filter.exact)
        is_ranked = word is not None and not self.is_reversed and is_whole
        wanted = {"limit": str(ROWS if is_ranked else ROWS_MAX), **of_daemon}
        return {**wanted, "sort": word} if word is not None else wanted


class Sight(NamedTuple):
    """What the daemon answered."""

    wish: TableWish
    status: Mapping[str, Any]
    rows: list[Mapping[str, Any]]
    total: int  # rows that the daemon has
    workers_missing: int


def look(client: AdminClient, wish: TableWish) -> Sight:
    """Ask the daemon; waits for it. Raises AdminUnreachableError and AdminRefusedError."""
    status = client.ask("GET", "/status")
    try:
        upstreams = [{"name": name, **upstream} for name, upstream in status["upstreams"].items()]
        if not wish.view.path:
            return Sight(wish, status, list(upstreams), len(upstreams), 0)
        found = client.ask("GET", wish.view.path, wish.query())
        return Sight(wish, status, found["data"], found["total"], found.get("workers_missing", 0))
    except (TypeError, LookupError, AttributeError):
        raise AdminRefusedError(200, "", "an answer from something that isn't streamd's admin surface") from None
