"""Routes of the admin surface only: drain, log level, streams by lag."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

import orjson

from streamd.api.gather import Gathered, all_others, gather
from streamd.api.streams import JSON, state_of
from streamd.net.answer import Answer
from streamd.net.application import Plan
from streamd.net.http_error import HttpError
from streamd.net.runtime import Runtime

WORST = "worst"  # the kind of question to other workers
LEVELS = ("debug", "info", "warning", "error")

# An operator looks for the worst; /v1/streams pages through all.
STREAMS_SHOWN_MAX = 100


class Admin:
    """Routes of the admin socket, in addition to those of all listeners."""

    def __init__(self, runtime: Runtime, *, drain: Callable[[], None], set_level: Callable[[str], None]) -> None:
        self._runtime = runtime
        self._drain = drain
        self._set_level = set_level
        self._routes = {
            "/drain": {"POST": Plan(answer=self.drain)},
            "/streams": {"GET": Plan(answer=self.streams)},
            "/log-level": {"PUT": Plan(answer=self.log_level, keeps_body=True, body_bytes_max=64)},
        }

    def routes(self, answer: Answer) -> dict[str, Plan] | None:
        return self._routes.get(answer.request.path) if answer.origin.listener == "admin" else None

    def drain(self, answer: Answer) -> None:
        """Drain, as SIGTERM does; a second request ends the drain at once."""
        self._drain()
        answer.send(202, b'{"state":"draining"}\n', [JSON])

    def streams(self, answer: Answer) -> None:
        """The streams with the largest lags of their readers, worst first."""

        def finish(others: Gathered) -> None:
            states = self._worst()
            for each in others.answers:
                states += orjson.loads(each)
            states.sort(key=lambda state: -state["lag_max"])
            fields: dict[str, Any] = {"data": states[:STREAMS_SHOWN_MAX]}
            if others.missing:
                fields["workers_missing"] = len(others.missing)
            answer.send(200, orjson.dumps(fields, option=orjson.OPT_INDENT_2) + b"\n", [JSON])

        gather(self._runtime, answer, WORST, all_others(self._runtime), finish)

    def answer_worst(self, question: bytes) -> bytes:
        """Answer another worker's question: the worst streams of this worker."""
        return orjson.dumps(self._worst())

    def _worst(self) -> list[dict[str, Any]]:
        states = (state_of(stream, self._runtime) for stream in self._runtime.hub)
        return heapq.nsmallest(STREAMS_SHOWN_MAX, states, key=lambda state: -state["lag_max"])

    def log_level(self, answer: Answer) -> None:
        """PUT /log-level with the level as body; holds until the next reload or restart."""
        word = answer.request.body.decode("ascii", "replace").strip()
        if word not in LEVELS:
            raise HttpError(400, f"The log level has to be one of {', '.join(LEVELS)}.", code="bad_log_level")
        self._set_level(word)
        answer.send(204)
