"""The mock's record: counters for a test to assert on, and a way to wait for them without sleeping."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

ABORTED_AT_MAX: Final = 16_384  # 5,000 readers that leave at once, twice, and some more
SEEN_MAX: Final = 64  # the requests of a test
SEEN_BODY_BYTES_MAX: Final = 65_536
WAIT_S: Final = 60.0  # a test that waits longer for a counter has failed


@dataclass(frozen=True, slots=True)
class Seen:
    """A received request."""

    method: str
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    def get(self, name: bytes) -> bytes | None:
        """The value of the first field with this (lower-case) name."""
        return next((value for field, value in self.headers if field == name), None)


class Stats:
    """Counters of a server. An answer is a response, streamed or not; begun = open + completed + aborted + broken."""

    __slots__ = (
        "_waiting",
        "aborted",
        "aborted_at",
        "broken",
        "completed",
        "connections",
        "connections_open",
        "open",
        "pauses",
        "requests",
        "seen",
    )

    def __init__(self) -> None:
        self.connections = 0
        self.connections_open = 0
        self.requests: Counter[str] = Counter()  # by `METHOD path`; unknown paths share a name
        self.open = 0  # answers begun and not ended
        self.completed = 0
        self.aborted = 0  # by the peer
        self.pauses = 0  # times that a peer's socket took no more bytes
        self.broken = 0  # by a fault of the mock
        self.aborted_at: deque[float] = deque(maxlen=ABORTED_AT_MAX)  # seconds, monotonic
        self.seen: deque[Seen] = deque(maxlen=SEEN_MAX)
        self._waiting: list[tuple[Callable[[Stats], bool], asyncio.Future[None]]] = []

    @property
    def requests_total(self) -> int:
        """Requests of all paths, without those for the mock's own pages."""
        return self.requests.total()

    def changed(self) -> None:
        """A counter has changed: wake the tasks that waited for that."""
        if not self._waiting:
            return
        for reached, future in self._waiting:
            if not future.done() and reached(self):
                future.set_result(None)
        self._waiting = [entry for entry in self._waiting if not entry[1].done()]

    async def until(self, reached: Callable[[Stats], bool], timeout_s: float = WAIT_S) -> None:
        """Wait until `reached(stats)` holds. Raises TimeoutError, with the counters, after `timeout_s`."""
        if reached(self):
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((reached, future))
        try:
            await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise TimeoutError(f"still waiting after {timeout_s} s: {self.as_json()}") from None

    def as_json(self) -> dict[str, Any]:
        """The counters, for `/mock/stats`."""
        return {
            "connections": self.connections,
            "connections_open": self.connections_open,
            "requests": dict(self.requests),
            "requests_total": self.requests_total,
            "open": self.open,
            "completed": self.completed,
            "aborted": self.aborted,
            "broken": self.broken,
            "pauses": self.pauses,
            "aborted_at": list(self.aborted_at)[-100:],
        }

    def seen_as_json(self) -> list[dict[str, Any]]:
        """The last requests, for `/mock/requests`."""
        return [
            {
                "method": seen.method,
                "target": seen.target.decode("latin-1"),
                "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in seen.headers],
                "body": seen.body.decode("utf-8", "replace"),
            }
            for seen in self.seen
        ]
