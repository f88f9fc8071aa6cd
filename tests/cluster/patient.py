"""PatientReader: a reader that comes back at one node after the other, and compares each event with its source.

It does what an EventSource behind a balancer does: after a broken connection, a farewell or a 503 it resumes with the
id of its last event at the next node. It stops at [DONE], at `node_lost`, at 204, and at an answer that says that the
stream isn't there. What it finds wrong on the way is in `wrong`: a lost, doubled, changed or foreign event, or a gap.
"""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from counting_upstream import DONE, Generation, data_of, finish_of

from streamd.choice import Choice

# A Retry-After is a second or more: a test has no time for more than a tenth of it.
RETRY_S = 0.1


class Ending(Choice):
    """How a reader's stream ended."""

    DONE = "done"
    NODE_LOST = "node_lost"
    OVER = "over"  # 204
    GONE = "gone"  # 404 or 410


class Event(NamedTuple):
    """An event as a reader got it."""

    id: str
    name: str
    data: str


def events_of(answer: http.client.HTTPResponse) -> Iterator[Event]:
    """The events of an answer until it ends, however it does."""
    fields: dict[str, str] = {}
    while True:
        try:
            line = answer.readline().decode()
        except (http.client.HTTPException, OSError):
            return
        if not line:
            return
        if line == "\n":
            if "data" in fields:
                yield Event(fields.get("id", ""), fields.get("event", ""), fields["data"])
            fields = {}
            continue
        name, _, value = line.rstrip("\n").partition(": ")
        if name:
            fields[name] = value if name not in fields else f"{fields[name]}\n{value}"


class PatientReader(threading.Thread):
    """A reader in a thread of its own, of one stream at several nodes in turn."""

    def __init__(
        self,
        generation: Generation,
        stream_id: str,
        ask: Callable[[str, str, str], http.client.HTTPResponse],
        *homes: str,
        first: http.client.HTTPResponse | None = None,
    ) -> None:
        """`ask(node, stream_id, last_id)` requests the stream; `homes` are the nodes in turn, and `first` is an answer
        to begin with.
        """
        super().__init__(daemon=True)
        self._first = first
        self.generation = generation
        self.stream_id = stream_id
        self.homes = homes
        self._ask = ask
        self.seq = 0  # of the last event
        self.exact = 0  # events that came as they were made, and not merged
        self.last_id = ""
        self.ending: Ending | None = None
        self.lost_at: int | None = None  # the seq behind which the node was told to be lost
        self.statuses: list[int] = []  # of all answers
        self.wrong: list[str] = []

    # -- the way

    def run(self) -> None:
        if self._first is not None:
            self._read(self._first)
        for node in itertools.cycle(self.homes):
            if self.ending is not None or self.wrong:
                return
            answer = self._answer(node)
            if answer is not None:
                self._read(answer)
            else:
                time.sleep(RETRY_S)

    def _answer(self, node: str) -> http.client.HTTPResponse | None:
        """The stream behind what is here; None: ask again."""
        try:
            answer = self._ask(node, self.stream_id, self.last_id)
        except (http.client.HTTPException, OSError):
            return None
        self.statuses.append(answer.status)
        match answer.status:
            case 200:
                return answer
            case 503 if answer.headers["Retry-After"]:
                return None
            case 204:
                self.ending = Ending.OVER
            case 404 | 410:
                self.ending = Ending.GONE
            case status:
                self.wrong.append(f"{status} at {node}: {answer.read()!r}")
        return None

    def _read(self, answer: http.client.HTTPResponse) -> None:
        """Read an answer to its end."""
        for event in events_of(answer):
            if event.name == "reconnect" or self.wrong:
                break
            self.take(event)
            if self.ending is not None:
                break
        answer.close()

    # -- the comparison

    def take(self, event: Event) -> None:
        """Compare the next event with its source's."""
        if event.name:
            self.wrong.append(f"an event {event} behind {self.seq}")
            return
        stream_id, _, place = event.id.rpartition(":")
        if "node_lost" in event.data:
            self.last_id, self.lost_at = event.id, int(place.rstrip("!"))
            self.ending = Ending.NODE_LOST
            if stream_id != self.stream_id or not place.endswith("!"):
                self.wrong.append(f"node_lost with the id {event.id}")
            return
        if stream_id != self.stream_id or not place.isdecimal():
            self.wrong.append(f"an id {event.id} behind {self.seq}")
            return
        seq, tag = int(place), self.generation.tag
        if event.data in (DONE, finish_of(tag)):
            is_next = seq == self.seq + 1
            self.ending = Ending.DONE if event.data == DONE else None
        elif event.data == data_of(tag, seq):
            is_next = seq == self.seq + 1
            self.exact += 1
        else:
            is_next = self._merged(event.data) == "".join(f"{tag}.{k} " for k in range(self.seq + 1, seq + 1))
        if not is_next:
            self.wrong.append(f"{event} behind {self.seq}")
        self.seq, self.last_id = seq, event.id

    def _merged(self, data: str) -> str:
        """The text of a merged event, if all else in it is as in the source's events."""
        try:
            text = str(json.loads(data)["choices"][0]["delta"]["content"])
        except (ValueError, KeyError, IndexError, TypeError):
            return data
        one = data_of(self.generation.tag, 0)
        return text if data == one.replace(f"{self.generation.tag}.0 ", text) else data
