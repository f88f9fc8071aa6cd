"""Inquiries: questions to other workers, their answers in any order, and workers that don't answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from fakes import FakeLoop

from streamd.net.inquiry import ANSWER_S, INQUIRIES_MAX, Answers, Inquiries
from streamd.net.peers import Note, Peers


class Outbox:
    """The way to the other workers: it keeps all notes, and has no room for the workers in `full`."""

    def __init__(self) -> None:
        self.told: list[Note] = []  # here `slot` is that of the receiver
        self.full: set[int] = set()

    def tell(self, slot: int, kind: str, body: bytes) -> bool:
        if slot in self.full:
            return False
        self.told.append(Note(slot, kind, body))
        return True


class Asking:
    """The inquiries of a worker, and the answers to their askers."""

    def __init__(self) -> None:
        self.loop = FakeLoop()
        self.outbox = Outbox()
        self.answerers: dict[str, Callable[[bytes], bytes]] = {}
        self.inquiries = Inquiries(self.loop, cast(Peers, self.outbox), self.answerers)
        self.got: list[Answers] = []

    def ask(self, *slots: int, kind: str = "list") -> None:
        self.inquiries.ask(kind, {slot: b"question for %d" % slot for slot in slots}, self.got.append)

    def number(self, nth: int = -1) -> bytes:
        """The number that a question and its answer carry."""
        return self.outbox.told[nth].body[:8]

    def answer(self, slot: int, body: bytes, number: bytes = b"") -> bool:
        return self.inquiries.take(Note(slot, "!", (number or self.number()) + body))

    def pass_time(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))

    @property
    def timers(self) -> int:
        scheduled: Any = self.loop._scheduled  # type: ignore[attr-defined]
        return sum(not timer.cancelled() for timer in scheduled)


@pytest.fixture
def asking() -> Iterator[Asking]:
    """Inquiries of which none, and no deadline, may be left at the end of the test."""
    made = Asking()
    yield made
    assert len(made.inquiries) == 0 and made.timers == 0
    made.loop.close()


def test_each_worker_gets_its_own_question_and_the_last_answer_ends_the_inquiry(asking: Asking) -> None:
    asking.ask(1, 3)
    assert [(note.slot, note.kind, note.body[8:]) for note in asking.outbox.told] == [
        (1, "?list", b"question for 1"),
        (3, "?list", b"question for 3"),
    ]
    assert asking.number(0) == asking.number(1)
    assert asking.answer(3, b"three") and asking.got == []
    assert asking.timers == 1
    assert asking.answer(1, b"one")
    assert asking.got == [{3: b"three", 1: b"one"}]
    assert len(asking.inquiries) == 0 and asking.timers == 0, "nothing waits for the deadline"


def test_a_worker_that_does_not_answer_is_missing_at_the_deadline(asking: Asking) -> None:
    asking.ask(1, 2)
    asking.answer(2, b"two")
    asking.pass_time(ANSWER_S * 0.99)
    assert asking.got == [] and len(asking.inquiries) == 1
    asking.pass_time(ANSWER_S * 0.02)
    assert asking.got == [{2: b"two"}]


def test_an_answer_after_the_deadline_is_dropped(asking: Asking) -> None:
    asking.ask(1)
    asking.pass_time(ANSWER_S * 1.01)
    assert asking.got == [{}]
    assert asking.answer(1, b"late"), "the note is an inquiry's all the same"
    assert asking.got == [{}]


def test_an_answer_that_comes_twice_or_from_a_worker_that_was_not_asked_is_not_counted(asking: Asking) -> None:
    asking.ask(1, 2)
    asking.answer(1, b"first")
    asking.answer(1, b"again")
    asking.answer(3, b"unasked")
    assert asking.got == []
    asking.answer(2, b"two")
    assert asking.got == [{1: b"first", 2: b"two"}]


def test_inquiries_under_way_at_once_do_not_mix(asking: Asking) -> None:
    asking.ask(1)
    asking.ask(1)
    first, second = asking.number(0), asking.number(1)
    assert first != second
    asking.answer(1, b"to the second", second)
    assert asking.got == [{1: b"to the second"}]
    asking.answer(1, b"to the first", first)
    assert asking.got == [{1: b"to the second"}, {1: b"to the first"}]


def test_a_worker_whose_outbox_is_full_is_not_waited_for(asking: Asking) -> None:
    asking.outbox.full = {1}
    asking.ask(1, 2)
    asking.answer(2, b"two")
    assert asking.got == [{2: b"two"}]


@pytest.mark.parametrize("slots", [(), (1, 2)], ids=["no worker is asked", "no worker has room"])
def test_without_a_question_in_flight_the_asker_gets_its_answer_at_once(asking: Asking, slots: tuple[int, ...]) -> None:
    asking.outbox.full = {1, 2}
    asking.ask(*slots)
    assert asking.got == [{}] and len(asking.inquiries) == 0 and asking.timers == 0


def test_beyond_the_bound_no_worker_is_asked_until_an_inquiry_is_over(asking: Asking) -> None:
    for _ in range(INQUIRIES_MAX):
        asking.ask(1)
    last = asking.number()
    asking.ask(1)
    assert asking.got == [{}] and len(asking.outbox.told) == len(asking.inquiries) == INQUIRIES_MAX
    asking.answer(1, b"", last)
    asking.ask(1)
    assert len(asking.outbox.told) == INQUIRIES_MAX + 1
    asking.pass_time(ANSWER_S * 1.01)
    assert len(asking.got) == INQUIRIES_MAX + 2


def test_an_asker_may_ask_again_when_it_gets_its_answers(asking: Asking) -> None:
    def again(answers: Answers) -> None:
        asking.got.append(answers)
        asking.ask(2)

    asking.inquiries.ask("list", {1: b""}, again)
    asking.answer(1, b"one")
    assert asking.got == [{1: b"one"}] and asking.outbox.told[-1].slot == 2
    asking.answer(2, b"two")
    assert asking.got == [{1: b"one"}, {2: b"two"}]


def test_a_question_of_another_worker_is_answered_at_once_under_its_number(asking: Asking) -> None:
    asking.answerers["list"] = lambda question: b"answer to " + question
    assert asking.inquiries.take(Note(4, "?list", b"\0\0\0\0\0\0\0\x07all"))
    assert asking.outbox.told == [Note(4, "!", b"\0\0\0\0\0\0\0\x07answer to all")]


def test_an_answer_that_the_asker_has_no_room_for_is_dropped(asking: Asking) -> None:
    asking.answerers["list"] = lambda question: b"answer"
    asking.outbox.full = {4}
    assert asking.inquiries.take(Note(4, "?list", b"\0\0\0\0\0\0\0\x07"))
    assert asking.outbox.told == []


def test_notes_of_other_kinds_are_left_alone(asking: Asking) -> None:
    assert not asking.inquiries.take(Note(1, "learned", b"\0\0\0\0\0\0\0\x01"))


def test_malformed_notes_are_bugs_and_end_no_inquiry(asking: Asking) -> None:
    asking.ask(1)
    with pytest.raises(KeyError):
        asking.inquiries.take(Note(1, "?unheard-of", b"\0\0\0\0\0\0\0\x01"))
    with pytest.raises(Exception, match="unpack_from requires a buffer"):
        asking.inquiries.take(Note(1, "!", b"short"))
    assert asking.got == [] and len(asking.inquiries) == 1
    asking.answer(1, b"one")
    assert asking.got == [{1: b"one"}]
