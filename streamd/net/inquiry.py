"""Inquiries: questions of a worker to all others, and their answers, as notes between peers.

A question is a kind and bytes; a worker answers a question at once, from its own state. A worker that doesn't answer
within ANSWER_S, because it is starting, stuck or dead, is missing in the result, and the asker reports it.

Bounds: INQUIRIES_MAX at once; further inquiries get no answers. A question or an answer is at most
peers.MEMORY_BYTES_MAX.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Mapping

from streamd.core.guard import BARE, Guard
from streamd.net.peers import Note, Peers

ANSWER_S = 1.0  # a loop that is later than this takes no new streams, either
INQUIRIES_MAX = 64  # lists of streams: some ms of work each in every worker

Answers = dict[int, bytes]
"""The answers by slot."""

_number = struct.Struct(">Q")


class Inquiry:
    """A question under way; `over` gets the answers, once."""

    def __init__(self, awaited: set[int], over: Callable[[Answers], None]) -> None:
        self.awaited = awaited
        self.answers: Answers = {}
        self.over = over
        self.timer: asyncio.TimerHandle | None = None


class Inquiries:
    """All questions of this worker, and its answers to the questions of others."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        peers: Peers,
        answerers: Mapping[str, Callable[[bytes], bytes]],
        guard: Guard = BARE,
    ) -> None:
        self._loop = loop
        self._guard = guard
        self._peers = peers
        self._under_way: dict[int, Inquiry] = {}
        self._asked = 0
        self._answerers = answerers  # by kind of question

    def __len__(self) -> int:
        return len(self._under_way)

    def ask(self, kind: str, questions: Mapping[int, bytes], over: Callable[[Answers], None]) -> None:
        """Ask other workers, by slot. `over` may be called before this returns."""
        if len(self._under_way) >= INQUIRIES_MAX:
            over({})
            return
        self._asked += 1
        number, peers = self._asked, self._peers
        prefix = _number.pack(number)
        asked = {slot for slot, question in questions.items() if peers.tell(slot, f"?{kind}", prefix + question)}
        if not asked:
            over({})
            return
        inquiry = self._under_way[number] = Inquiry(asked, over)
        inquiry.timer = self._loop.call_later(ANSWER_S, self._end, number)

    def take(self, note: Note) -> bool:
        """Whether a note is a question, which is answered now, or an answer."""
        if note.kind.startswith("?"):
            answer = self._answerers[note.kind[1:]](note.body[_number.size :])
            self._peers.tell(note.slot, "!", note.body[: _number.size] + answer)
            return True
        if note.kind != "!":
            return False
        (number,) = _number.unpack_from(note.body)
        inquiry = self._under_way.get(number)
        if inquiry is not None and note.slot in inquiry.awaited:  # else the answer came too late
            inquiry.awaited.discard(note.slot)
            inquiry.answers[note.slot] = note.body[_number.size :]
            if not inquiry.awaited:
                self._end(number)
        return True

    def _end(self, number: int) -> None:
        inquiry = self._under_way.pop(number)
        assert inquiry.timer is not None
        inquiry.timer.cancel()
        with self._guard:
            inquiry.over(inquiry.answers)
