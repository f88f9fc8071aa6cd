"""Answer edges: the tally of a whole answer that also keeps its two ends, for the facts that they state."""

from __future__ import annotations

from typing import Final

from streamd.core.usage import Tally
from streamd.wire.answer_facts import AnswerFacts, facts_in
from streamd.wire.dialects.excerpt import EDGE_BYTES_MAX, joined
from streamd.wire.dialects.members import readable_object

_BOTH: Final = 2 * EDGE_BYTES_MAX


class AnswerEdges(Tally):
    """Keeps at most 32 KiB of an answer, for as long as it passes."""

    __slots__ = ("_back", "_front", "_size", "facts", "usage")

    def __init__(self) -> None:
        super().__init__()
        self._front = b""
        self._back = b""
        self._size = 0
        self.usage = (0, 0)  # input and output tokens, once the answer is over
        self.facts = AnswerFacts()

    def passed(self, piece: bytes) -> None:
        super().passed(piece)
        self._size += len(piece)
        if len(self._front) < EDGE_BYTES_MAX:
            missing = EDGE_BYTES_MAX - len(self._front)
            self._front += piece[:missing]
            piece = piece[missing:]
        if piece:
            self._back = (self._back + piece[-EDGE_BYTES_MAX:])[-EDGE_BYTES_MAX:]

    def over(self) -> tuple[int, int]:
        self.usage = super().over()
        if self._size <= _BOTH:
            body = readable_object(self._front + self._back)
        else:
            body = joined(self._front, self._back)
        self.facts = facts_in([body] if body is not None else [])
        self._front = self._back = b""
        return self.usage
