"""Routes of the admin surface only: tables of readers, streams and keys, their ends, drain, log level, snapshots."""

from __future__ import annotations

from collections.abc import Callable

from streamd.api.ending import Ended, Ending
from streamd.api.live import Live
from streamd.api.streams import JSON
from streamd.api.tables import Table
from streamd.net.answer import Answer
from streamd.net.application import Plan
from streamd.net.http_error import HttpError

# The paths below which an operator ends an object by its id.
ENDING_BELOW = tuple(f"/{ended.value}/" for ended in Ended)


class Admin:
    """Routes of the admin socket, in addition to those of all listeners. `tables` are by the first word of a path."""

    def __init__(
        self,
        *,
        tables: dict[str, Table],
        ending: Ending,
        drain: Callable[[Callable[[], None]], None],
        take_back: Callable[[Callable[[HttpError | None], None]], None],
        log_level: dict[str, Plan],
        live: Live,
    ) -> None:
        self._drain = drain
        self.live = live
        self._take_back = take_back
        self._routes = {
            "/drain": {"POST": Plan(answer=self.drain), "DELETE": Plan(answer=self.take_back)},
            "/log-level": log_level,
            "/live": {"GET": Plan(answer=live.open)},
            **{f"/{name}": {"GET": Plan(answer=table.show)} for name, table in tables.items()},
        }
        self._ends = {"DELETE": Plan(answer=ending.end)}

    def routes(self, answer: Answer) -> dict[str, Plan] | None:
        """The methods of a path of the admin surface; None on any other listener, or for any other path."""
        if answer.origin.listener != "admin":
            return None
        path = answer.request.path
        if path.startswith(ENDING_BELOW) and path not in ENDING_BELOW:
            return self._ends
        return self._routes.get(path)

    def drain(self, answer: Answer) -> None:
        """Drain, as SIGTERM does; a second request ends the drain at once."""
        self._drain(lambda: answer.settle(lambda: answer.send(202, b'{"state":"draining"}\n', [JSON])))

    def take_back(self, answer: Answer) -> None:
        """Take a drain back whose listeners are still open. Raises HttpError 409."""

        def respond(error: HttpError | None) -> None:
            if error is not None:
                raise error
            answer.send(200, b'{"state":"serving"}\n', [JSON])

        self._take_back(lambda error: answer.settle(lambda: respond(error)))
