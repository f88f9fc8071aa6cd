"""GET /live: the state of the daemon once a second as Server-Sent Events, for the operations page.

    GET /live?table=readers&sort=lag&key=alice

Each event is a snapshot: the numbers of /status, and the table that the page shows. Pages that show the same table with
the same sort and filters share a snapshot, so ten operators in an incident cost as much as one page. Without a page
nothing is computed.

Bounds. A worker has VIEWERS_MAX pages, and a snapshot ROWS rows of a table and as many upstreams: 60 KB. Tables are
made in slices (api/tables.py), one after the other, and then there is a rest of REST times the time that they took: at
most a tenth of the time goes into them. With 4,500 streams of a reader each the numbers take 3.5 ms in a turn of the
loop, and a table 14 to 20 ms in slices of 0.2 to 1.3. A page that doesn't take its last snapshot gets none until it
has: only the newest is of use, and a stalled page is closed as every other client.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import orjson

from streamd.api.streams import query_of
from streamd.api.tables import ROWS, Shown, Table, TableQuery, collect
from streamd.net.answer import STREAM_CACHING, STREAM_TYPE, Answer, Pending
from streamd.net.http_error import HttpError
from streamd.net.in_turns import SlowWork
from streamd.net.runtime import Runtime
from streamd.reasons import CloseReason
from streamd.wire.answer_fields import Fields
from streamd.wire.http1 import Framing, ResponseHead

# Pages of a worker: more than there are operators. Each may hold a snapshot in user space: 1 MB in all.
VIEWERS_MAX: Final = 16

# Interval between two snapshots.
EVERY_S: Final = 1.0
# Least time from one snapshot to the next when a page has just come, or has chosen another table.
FRESH_S: Final = 0.25
REST: Final = 9

_HEAD: Final = ResponseHead(200, b"OK", (), Framing.CHUNKED, 0, True, {})
_FIELDS: Final[Fields] = [STREAM_TYPE, STREAM_CACHING, (b"x-accel-buffering", b"no")]
# Where the page's connection breaks, the browser comes back after this time.
_OPENING: Final = b"retry: 1000\n\n"


class Subject(NamedTuple):
    """The table that a page shows beside the numbers: its name ("": none), sort and filters."""

    table: str = ""
    question: bytes = b""


class Viewer(Pending):
    """A page that looks on."""

    __slots__ = ("_live", "answer", "has_seen", "is_paused", "subject")

    def __init__(self, live: Live, answer: Answer, subject: Subject) -> None:
        self._live = live
        self.answer = answer
        self.subject = subject
        self.is_paused = False
        self.has_seen = False  # whether it has got a snapshot

    def on_gone(self, reason: CloseReason) -> None:
        self._live.leave(self)

    def on_paused(self) -> None:
        self.is_paused = True

    def on_resumed(self) -> None:
        self.is_paused = False


class Live:
    """The snapshots of a worker, and the pages that get them. `status` is the dict of /status."""

    def __init__(
        self, runtime: Runtime, slow_work: SlowWork, tables: Mapping[str, Table], status: Callable[[], dict[str, Any]]
    ) -> None:
        self._runtime = runtime
        self._slow_work = slow_work
        self._tables = tables
        self._status = status
        self._viewers: dict[Viewer, None] = {}
        self._timer: asyncio.TimerHandle | None = None  # for the next snapshots
        self._is_looking = False  # snapshots are being made
        self._began_at = self._ended_at = -math.inf  # the last snapshots
        self._rest_s = 0.0

    def __len__(self) -> int:
        return len(self._viewers)

    # -- pages

    def open(self, answer: Answer) -> None:
        """Answer a page with the snapshots from now on. Raises HttpError."""
        subject = self._subject(query_of(answer.request))
        if answer.request.method == "HEAD":
            answer.send(200, fields=[STREAM_TYPE])
            return
        if len(self._viewers) >= VIEWERS_MAX:
            text = f"{VIEWERS_MAX} pages look on already; close one of them."
            raise HttpError(503, text, code="too_many_viewers", reason=CloseReason.OVER_BUDGET, retry_after_s=5)
        viewer = Viewer(self, answer, subject)
        self._viewers[viewer] = None
        answer.later(viewer)
        answer.proxy_head(_HEAD, _FIELDS)
        answer.proxy_body(_OPENING)
        self._schedule()

    def leave(self, viewer: Viewer) -> None:
        """The page is gone."""
        self._viewers.pop(viewer, None)
        if not self._viewers and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _subject(self, query: dict[str, str]) -> Subject:
        name = query.pop("table", "")
        table = self._tables.get(name)
        if table is None:
            if name or query:
                text = f"table has to be one of {', '.join(self._tables)}; without a table there is no sort or filter."
                raise HttpError(400, text, code="bad_table", param="table")
            return Subject()
        wanted = table.wanted(query)
        if wanted.limit > ROWS:
            raise HttpError(400, f"limit has to be a number from 1 to {ROWS}.", code="bad_limit", param="limit")
        return Subject(name, wanted.encode())

    # -- snapshots

    def _schedule(self) -> None:
        """Set the timer for the next snapshots, earlier than usual if a page waits for its first."""
        if self._is_looking or not self._viewers:
            return
        is_fresh = any(not viewer.has_seen and not viewer.is_paused for viewer in self._viewers)
        due_at = max(self._began_at + EVERY_S, self._ended_at + self._rest_s)
        if is_fresh:
            due_at = min(due_at, self._ended_at + max(FRESH_S, self._rest_s))
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._runtime.loop.call_later(max(0.0, due_at - self._runtime.time()), self._look)

    def _look(self) -> None:
        self._timer = None
        self._is_looking = True
        self._began_at = self._runtime.time()
        subjects = dict.fromkeys(viewer.subject for viewer in self._viewers if not viewer.is_paused)
        status = b"null"
        with self._runtime.guard:
            if subjects:
                status = orjson.dumps(bounded(self._status()))
        self._next(deque(subjects), status)

    def _next(self, subjects: deque[Subject], status: bytes) -> None:
        """Make the snapshot of the next subject; after the last, rest."""
        if not subjects:
            self._is_looking = False
            self._ended_at = self._runtime.time()
            self._rest_s = REST * (self._ended_at - self._began_at)
            self._schedule()
            return
        subject = subjects.popleft()

        def made(table: bytes) -> None:
            snapshot = b'event: snapshot\ndata: {"unix_s":%.3f,"status":%b,"table":%b}\n\n'
            self._send(subject, snapshot % (self._runtime.unix_time(), status, table))
            self._next(subjects, status)

        def failed(error: Exception) -> None:
            self._runtime.bug("live", error)
            self._next(subjects, status)

        if not subject.table:
            made(b"null")
            return
        is_begun = False
        with self._runtime.guard:
            is_begun = self._make(subject, made, failed)
        if not is_begun:
            self._next(subjects, status)  # too much other work, or a bug: its pages keep the snapshot that they have

    def _make(self, subject: Subject, made: Callable[[bytes], None], failed: Callable[[Exception], None]) -> bool:
        """Make the table of a subject, of all workers. False: there is no room for the work."""
        table, wanted = self._tables[subject.table], TableQuery.decode(subject.question)

        def whole(parts: list[bytes], missing: int) -> None:
            def shown(found: Shown) -> None:
                head = {"name": subject.table, "sort": wanted.sort, "total": found.total, "workers_missing": missing}
                made(b'%b,"data":[%b]}' % (orjson.dumps(head)[:-1], b",".join(found.rows)))

            if not self._slow_work.do(table.whole(wanted, parts), shown, failed):
                made(b"null")

        part = table.part(wanted)
        return collect(self._runtime, self._slow_work, table.kind, subject.question, part, whole, failed)

    def _send(self, subject: Subject, snapshot: bytes) -> None:
        for viewer in tuple(self._viewers):
            if viewer.subject == subject and not viewer.is_paused:
                viewer.has_seen = True
                with self._runtime.guard:  # an error of a single page must not stop the snapshots of all
                    viewer.answer.proxy_body(snapshot)


def bounded(status: dict[str, Any]) -> dict[str, Any]:
    """The numbers of /status for a page: of many upstreams those that fail or work most, and no worker by itself."""
    upstreams = status["upstreams"]
    if len(upstreams) > ROWS:
        rank = lambda name: (upstreams[name]["state"] != "up", upstreams[name]["in_flight"])  # noqa: E731
        status = {**status, "upstreams": {name: upstreams[name] for name in heapq.nlargest(ROWS, upstreams, key=rank)}}
    return {**status, "upstreams_total": len(upstreams), "workers": len(status.get("workers") or (None,))}
