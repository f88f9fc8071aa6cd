"""Inquiries: questions of a worker to all others, and their answers, as notes between peers.

A question is a kind and bytes; a worker answers a question from its own state: at once, or in slices where the answer
takes long (net/in_turns.py). A worker that doesn't answer within ANSWER_S, because it is starting, stuck or dead, is
missing in the result, and the asker reports it.

Bounds: INQUIRIES_MAX at once; further inquiries get no answers. A question or an answer is at most
peers.MEMORY_BYTES_MAX.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Mapping

from streamd.core.guard import BARE, Guard
from streamd.net.in_turns import SlowWork, Steps
from streamd.net.peers import Note, Peers

ANSWER_S = 1.0  # a loop that is later than this takes no new streams, either
INQUIRIES_MAX = 64  # lists of streams: some ms of work each in every worker

Answers = dict[int, bytes]
"""The answers by slot."""

Answerer = Callable[[bytes], "bytes | Steps[bytes]"]
"""Answers a question: with the answer, or with the work that makes it."""

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
        answerers: Mapping[str, Answerer],
        guard: Guard = BARE,
        slow_work: SlowWork | None = None,
    ) -> None:
        self._loop = loop
        self._slow_work = slow_work or SlowWork(loop, guard.caught)
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
        """Whether a note is a question, which is answered now or in later turns, or an answer."""
        if note.kind.startswith("?"):
            self._answer(note)
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

    def _answer(self, question: Note) -> None:
        """A question that can't be answered gets no answer: the asker misses this worker."""
        number, body = question.body[: _number.size], question.body[_number.size :]
        kind = question.kind[1:]

        def tell(answer: bytes) -> None:
            self._peers.tell(question.slot, "!", number + answer)

        answer = self._answerers[kind](body)
        if isinstance(answer, bytes):
            tell(answer)
        else:
            self._slow_work.do(answer, tell, lambda error: self._guard.caught(f"inquiry.{kind}", error))

    def _end(self, number: int) -> None:
        inquiry = self._under_way.pop(number)
        assert inquiry.timer is not None
        inquiry.timer.cancel()
        with self._guard:
            inquiry.over(inquiry.answers)
