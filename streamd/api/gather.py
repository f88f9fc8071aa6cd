"""Gathering: a request whose answer takes the word of all workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from streamd.net.client import At, ClientConnection
from streamd.net.inquiry import Answers
from streamd.net.problem import Problem
from streamd.net.request import Request
from streamd.net.runtime import Runtime
from streamd.reasons import CloseReason


class Gathered:
    """What the other workers said."""

    def __init__(self, answers: Answers, missing: tuple[int, ...]) -> None:
        self.answers = tuple(answers.values())
        self.missing = missing  # slots that didn't answer in time


class Gathering:
    """Stands for the request while the others are asked."""

    __slots__ = ("_connection", "_finish", "_request")

    def __init__(self, connection: ClientConnection, request: Request, finish: Callable[[Gathered], None]) -> None:
        self._connection: ClientConnection | None = connection
        self._request = request
        self._finish = finish
        request.waiting = self

    def over(self, gathered: Gathered) -> None:
        connection, self._connection = self._connection, None
        if connection is None or connection.at is not At.WAITING:
            return
        self._request.waiting = None
        try:
            self._finish(gathered)
        except Problem as problem:
            connection.answer_problem(problem)
        except Exception as error:
            connection.crash("api.gather", error)

    # -- Waiting

    def reader_gone(self, reason: CloseReason) -> None:
        self._connection = None

    def reader_paused(self) -> None:
        """Nothing is written before the answer begins."""

    def reader_resumed(self) -> None:
        """Nothing is written before the answer begins."""


def gather(
    runtime: Runtime,
    connection: ClientConnection,
    request: Request,
    kind: str,
    questions: Mapping[int, bytes],
    finish: Callable[[Gathered], None],
) -> None:
    """Ask other workers, by slot, then `finish`, which answers the request; at once where nobody is to be asked."""
    inquiries = runtime.inquiries
    if inquiries is None or not questions:
        finish(Gathered({}, ()))
        return
    gathering = Gathering(connection, request, finish)

    def over(answers: Answers) -> None:
        gathering.over(Gathered(answers, tuple(slot for slot in questions if slot not in answers)))

    inquiries.ask(kind, questions, over)


def all_others(runtime: Runtime, question: bytes = b"") -> dict[int, bytes]:
    """The same question to every other worker."""
    return dict.fromkeys(runtime.peers.others(), question) if runtime.peers is not None else {}
