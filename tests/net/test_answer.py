"""Answer: its states, and work that answers later, over a connection whose transport the test plays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fakes import Client, Rig, get, rig

from streamd.net.answer import TRANSITIONS, Answer, AnswerEvent, AnswerState, Pending
from streamd.net.application import Plan
from streamd.net.http_error import not_found
from streamd.reasons import CloseReason


class Work(Pending):
    """Answers when the test says so; notes what it is told."""

    def __init__(self) -> None:
        self.answer: Answer
        self.told: list[CloseReason] = []

    def begin(self, answer: Answer) -> None:
        self.answer = answer
        answer.later(self)

    def on_gone(self, reason: CloseReason) -> None:
        self.told.append(reason)


def asked(r: Rig, work: Work) -> Client:
    """A client whose request is worked on."""
    plan, r.worker.application.plan = r.worker.application.plan, lambda answer: Plan(answer=work.begin)
    client = r.client(get())
    r.worker.application.plan = plan
    assert client.raw == b""
    return client


def refuse() -> None:
    raise not_found("/later")


def fail() -> None:
    raise ZeroDivisionError


def test_every_state_of_an_answer_can_end() -> None:
    assert set(TRANSITIONS) == set(AnswerState)
    for state, steps in TRANSITIONS.items():
        assert state is AnswerState.OVER or steps[AnswerEvent.END] is AnswerState.OVER


def test_an_answer_may_come_later() -> None:
    with rig() as r:
        work = Work()
        client = asked(r, work)
        work.answer.settle(lambda: work.answer.send(200, b"late"))
        assert client.answer.body == b"late" and work.told == []
        client.send(get())
        assert client.statuses == [200, 200]


def test_a_problem_of_a_late_answer_is_its_refusal() -> None:
    with rig() as r:
        work = Work()
        client = asked(r, work)
        work.answer.settle(refuse)
        assert client.answer.status == 404 and work.told == []


def test_a_bug_of_a_late_answer_is_a_500_and_told() -> None:
    with rig() as r:
        work = Work()
        client = asked(r, work)
        work.answer.settle(fail)
        assert client.answer.status == 500
        assert [type(bug) for bug in r.bugs] == [ZeroDivisionError] and r.runtime.counters.bugs == 1
        r.bugs.clear()
        r.runtime.counters.bugs = 0


@pytest.mark.parametrize("respond", [refuse, fail])
def test_nothing_is_answered_to_a_client_that_has_left(respond: Callable[[], None]) -> None:
    with rig() as r:
        work = Work()
        client = asked(r, work)
        client.fin()
        assert work.told == [CloseReason.READER_GONE]
        work.answer.settle(respond)
        assert client.raw == b"" and client.gone


def test_a_refusal_by_the_drain_is_told_to_the_work() -> None:
    with rig() as r:
        work = Work()
        client = asked(r, work)
        client.connection.give_up(not_found("/"))
        assert client.answer.status == 404 and work.told == [CloseReason.NOT_FOUND]
        work.answer.settle(refuse)
        assert client.statuses == [404]


def test_a_paused_client_that_waits_for_its_answer_is_stalled_like_any_other() -> None:
    with rig(stall_timeout_s=10.0) as r:
        work = Work()
        plan, r.worker.application.plan = r.worker.application.plan, lambda answer: Plan(answer=work.begin)
        client = r.client(get("/", "Expect: 100-continue", "Content-Length: 2", method="POST"), capacity=3)
        r.worker.application.plan = plan
        assert client.connection.paused  # by the interim answer
        client.send(b"hi")
        r.pass_time(9)
        assert not client.gone
        r.pass_time(2)
        assert client.gone and work.told == [CloseReason.STALLED]
