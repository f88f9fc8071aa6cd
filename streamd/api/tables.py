"""Tables of the admin surface: the readers, streams and keys of all workers, sorted, filtered and bounded.

    GET /readers?sort=lag&limit=100&key=alice

Each worker ranks its own members in slices and keeps the best `limit` of them in a heap, so neither a reply nor a turn
of the loop grows with their number. A worker's part of a table is a line of JSON with the ranks, then a line of JSON
for each row. The worker that was asked merges the parts by their ranks, and parses no row.
"""

from __future__ import annotations

import abc
import functools
import heapq
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

import orjson

from streamd.api.gather import all_others
from streamd.api.rights import Rights
from streamd.api.streams import JSON, query_of
from streamd.net.answer import Answer
from streamd.net.http_error import HttpError
from streamd.net.in_turns import SlowWork, Steps
from streamd.net.inquiry import Answers
from streamd.net.runtime import WORKER_BUSY, Runtime

# Rows of a reply: a screen or two of a person, and as many as a program can want; 500 B each.
ROWS: Final = 100
ROWS_MAX: Final = 1000

# Members ranked in a turn of the loop: 2 us each.
SLICE_MEMBERS: Final = 500
# Rows made in a turn of the loop: 15 us each.
SLICE_ROWS: Final = 100

_count = re.compile(r"[1-9][0-9]{0,3}").fullmatch

M = TypeVar("M")


class TableQuery(NamedTuple):
    """The request for a table."""

    sort: str
    limit: int
    owners: tuple[str, ...] | None  # principals; None: all
    filters: dict[str, str]  # the other filters, by name

    def encode(self) -> bytes:
        return orjson.dumps(tuple(self))

    @classmethod
    def decode(cls, question: bytes) -> TableQuery:
        sort, limit, owners, filters = orjson.loads(question)
        return cls(sort, limit, None if owners is None else tuple(owners), filters)

    def has_owner(self, owner: str) -> bool:
        """Whether the filter for keys lets this principal through."""
        return self.owners is None or owner in self.owners

    def has(self, name: str, value: str) -> bool:
        """Whether the filter `name` lets this value through."""
        return self.filters.get(name, value) == value


class Shown(NamedTuple):
    """The rows of a table, each as JSON, and the number of members that the filters let through."""

    total: int
    rows: list[bytes]


class Table(abc.ABC):
    """A kind of table. `kind` is that of the question to the other workers."""

    kind: ClassVar[str]
    sorts: ClassVar[tuple[str, ...]]  # the first is the default
    filters: ClassVar[tuple[str, ...]]  # beside `key`
    states: ClassVar[tuple[str, ...]] = ()  # the values of the filter `state`, if the table has it

    def __init__(self, runtime: Runtime, rights: Rights, slow_work: SlowWork) -> None:
        self._runtime = runtime
        self._rights = rights
        self._slow_work = slow_work

    @abc.abstractmethod
    def part(self, wanted: TableQuery) -> Steps[bytes]:
        """Make this worker's part of the table."""

    @abc.abstractmethod
    def whole(self, wanted: TableQuery, parts: Sequence[bytes]) -> Steps[Shown]:
        """Make the table from the parts of all workers."""

    def answer_question(self, question: bytes) -> Steps[bytes]:
        """Answer another worker's question."""
        return self.part(TableQuery.decode(question))

    def show(self, answer: Answer) -> None:
        """Answer a request with the table. Raises HttpError."""
        wanted = self.wanted(query_of(answer.request))
        in_all_workers(
            self._runtime,
            self._slow_work,
            answer,
            self.kind,
            wanted.encode(),
            self.part(wanted),
            lambda parts, missing: self._finish(answer, wanted, parts, missing),
        )

    def _finish(self, answer: Answer, wanted: TableQuery, parts: Sequence[bytes], missing: int) -> None:
        def send(shown: Shown) -> None:
            rest = b',"workers_missing":%d' % missing if missing else b""
            body = b'{"data":[\n%b\n],"total":%d%b}\n' % (b",\n".join(shown.rows), shown.total, rest)
            answer.send(200, body, [JSON])

        slowly(self._runtime, self._slow_work, answer, self.whole(wanted, parts), send)

    def wanted(self, query: dict[str, str]) -> TableQuery:
        """The table that a query asks for; its fields are taken out. Raises HttpError 400."""
        known = ("sort", "limit", "key", *self.filters)
        for name in query:
            if name not in known:
                text = f"This table has no {name!r}; it takes {', '.join(known)}."
                raise HttpError(400, text, code="bad_filter", param=name)
        sort, limit = query.pop("sort", self.sorts[0]), query.pop("limit", str(ROWS))
        if sort not in self.sorts:
            text = f"sort has to be one of {', '.join(self.sorts)}."
            raise HttpError(400, text, code="bad_sort", param="sort")
        if not _count(limit) or int(limit) > ROWS_MAX:
            raise HttpError(400, f"limit has to be a number from 1 to {ROWS_MAX}.", code="bad_limit", param="limit")
        key = query.pop("key", None)
        if self.states and query.get("state", self.states[0]) not in self.states:
            text = f"state has to be one of {', '.join(self.states)}."
            raise HttpError(400, text, code="bad_state", param="state")
        return TableQuery(sort, int(limit), self._rights.principals_named(key) if key is not None else None, query)


def best(
    members: Iterable[M], rank: Callable[[M], float | None], limit: int
) -> Steps[tuple[int, list[M], list[float]]]:
    """Find the `limit` members of the highest rank, in slices. A member of rank None isn't counted.

    Returns the number of members that have a rank, then the best and their ranks, highest first; of equal ranks the
    earlier member comes first.
    """
    heap: list[tuple[float, int, M]] = []
    total = 0
    for k, member in enumerate(members, 1):
        if k % SLICE_MEMBERS == 0:
            yield
        value = rank(member)
        if value is None:
            continue
        total += 1
        entry = (value, -k, member)
        if len(heap) < limit:
            heapq.heappush(heap, entry)
        elif entry > heap[0]:
            heapq.heapreplace(heap, entry)
    heap.sort(reverse=True)
    return total, [member for _, _, member in heap], [value for value, _, _ in heap]


def part_of(
    members: Iterable[M], rank: Callable[[M], float | None], row: Callable[[M], dict[str, Any] | None], limit: int
) -> Steps[bytes]:
    """Make a worker's part: rank the members, then make a row of each of the best; None for a member that has gone."""
    total, found, ranks = yield from best(members, rank, limit)
    kept: list[float] = []
    rows: list[bytes] = []
    for k, (member, value) in enumerate(zip(found, ranks, strict=True), 1):
        made = row(member)
        if made is not None:
            kept.append(value)
            rows.append(orjson.dumps(made))
        if k % SLICE_ROWS == 0:
            yield
    return b"\n".join([orjson.dumps([total, kept]), *rows])


def merged(parts: Iterable[bytes], limit: int) -> Shown:
    """Merge the parts of all workers by their ranks."""
    total = 0
    columns = []
    for part in parts:
        head, *rows = part.split(b"\n")
        count, ranks = orjson.loads(head)
        total += count
        columns.append(zip(ranks, rows, strict=True))
    entries = heapq.merge(*columns, key=lambda entry: -entry[0])
    return Shown(total, [row for _, row in itertools.islice(entries, limit)])


def slowly(
    runtime: Runtime, slow_work: SlowWork, answer: Answer, steps: Steps[M], respond: Callable[[M], None]
) -> None:
    """Do work for an answer in slices, then respond. Raises HttpError 503 if too much such work is under way."""

    def failed(error: Exception) -> None:
        answer.settle(functools.partial(_raise, error))

    if not slow_work.do(steps, lambda made: answer.settle(lambda: respond(made)), failed):
        raise runtime.refused(WORKER_BUSY)


def _raise(error: Exception) -> None:
    raise error


def in_all_workers(
    runtime: Runtime,
    slow_work: SlowWork,
    answer: Answer,
    kind: str,
    question: bytes,
    own: Steps[bytes],
    finish: Callable[[list[bytes], int], None],
) -> None:
    """As collect(), for an answer: `finish` answers the request, unless the client has left. Raises HttpError 503."""

    def finished(parts: list[bytes], missing: int) -> None:
        answer.settle(lambda: finish(parts, missing))

    def failed(error: Exception) -> None:
        answer.settle(functools.partial(_raise, error))

    if not collect(runtime, slow_work, kind, question, own, finished, failed):
        raise runtime.refused(WORKER_BUSY)


def collect(
    runtime: Runtime,
    slow_work: SlowWork,
    kind: str,
    question: bytes,
    own: Steps[bytes],
    finish: Callable[[list[bytes], int], None],
    failed: Callable[[Exception], None],
) -> bool:
    """Do a work in this worker, in slices, and have all other workers do it; `finish` gets all parts, this worker's
    first, and the number of workers that didn't answer. False: too much work is under way, and nothing is called.
    """
    parts: list[bytes] = []
    missing = 0
    left = 2

    def one_is_there() -> None:
        nonlocal left
        left -= 1
        if not left:
            finish(parts, missing)

    def own_is_there(part: bytes) -> None:
        parts.insert(0, part)
        one_is_there()

    def others_are_there(answers: Answers) -> None:
        nonlocal missing
        parts.extend(answers.values())
        missing = len(questions) - len(answers)
        one_is_there()

    questions = all_others(runtime, question)
    if not slow_work.do(own, own_is_there, failed):
        return False
    if runtime.inquiries is None or not questions:
        others_are_there({})
    else:
        runtime.inquiries.ask(kind, questions, others_are_there)
    return True


def slot_of(runtime: Runtime) -> int:
    """The slot of this worker."""
    return runtime.peers.slot if runtime.peers is not None else 0
