"""Gathering: answers a request from the state of all workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from streamd.net.answer import Answer
from streamd.net.inquiry import Answers
from streamd.net.runtime import Runtime


class Gathered:
    """The answers of the other workers."""

    def __init__(self, answers: Answers, missing: tuple[int, ...]) -> None:
        self.answers = tuple(answers.values())
        self.missing = missing  # slots that didn't answer in time


def gather(
    runtime: Runtime, answer: Answer, kind: str, questions: Mapping[int, bytes], finish: Callable[[Gathered], None]
) -> None:
    """Ask other workers, by slot, then call `finish`, which answers the request; at once if no worker is asked."""
    inquiries = runtime.inquiries
    if inquiries is None or not questions:
        finish(Gathered({}, ()))
        return

    def over(answers: Answers) -> None:
        if runtime.turns.postpones(partial(over, answers)):
            return
        missing = tuple(slot for slot in questions if slot not in answers)
        answer.settle(lambda: finish(Gathered(answers, missing)))

    inquiries.ask(kind, questions, over)


def all_others(runtime: Runtime, question: bytes = b"") -> dict[int, bytes]:
    """Put the same question to every other worker."""
    return dict.fromkeys(runtime.peers.others(), question) if runtime.peers is not None else {}
