"""Questions that askers share: one at an upstream for all who wait, kept for some seconds; nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fakes import Rig, rig, whole_answer

from streamd.config import UpstreamSettings
from streamd.net import questions as questions_module
from streamd.net.attempt import FixedAsk
from streamd.net.fetch import TIMEOUT_S
from streamd.net.http_error import HttpError
from streamd.net.questions import AT_ONCE_MAX, KEPT_S, Key, Question, Questions, Reading
from streamd.net.turns import CONNECTION_PIECES_MAX
from streamd.net.upstream import Upstream
from streamd.wire.model_list import PART_BYTES, ModelList

ASK = FixedAsk(b"/list", [(b"host", b"up.test")])


def read(upstream: Upstream, status: int, body: bytes) -> Reading:
    yield
    return ModelList(((body.decode(), body),)) if status == 200 else None


class Asker:
    """Asks, and notes what it is told."""

    def __init__(self, q: Asking, name: bytes = b"same") -> None:
        self.q = q
        self.key: Key = (q.upstream, name)
        self.told: list[str | None] = []
        self.question: Question | None = None
        kept = q.questions.kept(self.key)
        if kept is not None:
            self.told.append(kept.entries[0][0])
            return
        self.question = q.questions.join(self.key, self) or q.questions.begin(self.key, ASK, read, self)
        q.r.turn()

    def arrived(self, question: Question, parts: ModelList | None) -> None:
        assert question is self.question
        self.told.append(parts.entries[0][0] if parts else None)

    def leave(self) -> None:
        assert self.question is not None
        self.q.questions.leave(self.question, self)
        self.q.r.turn()


class Asking:
    """The questions of a rig with a single upstream."""

    def __init__(self, r: Rig) -> None:
        self.r = r
        (self.upstream,) = r.worker.upstreams
        self.questions = Questions(r.runtime)

    def reply(self, body: bytes = b"list", status: str = "200 OK", link: int = -1) -> None:
        self.r.links[link].feed(whole_answer(body, status))
        self.r.turn()


@pytest.fixture
def q() -> Iterator[Asking]:
    """A rig in which every place is given back at the end of the test."""
    with rig(upstreams=(UpstreamSettings(name="up", url="http://up.test:1", inflight_max=3),)) as r:
        made, held = Asking(r), memory(r)
        yield made
        assert len(made.questions) == 0 and made.upstream.in_flight == 0
        assert r.runtime.admission.status()["in_use"]["upstream"] == 0
        r.pass_time(KEPT_S)
        assert not made.questions._kept and made.questions._kept_bytes == 0
        assert memory(r) == held


def memory(r: Rig) -> int:
    in_use = r.runtime.admission.status()["in_use"]
    assert isinstance(in_use, dict)
    return int(in_use["memory"])


def test_a_list_that_is_kept_is_counted(q: Asking) -> None:
    before = memory(q.r)
    Asker(q)
    q.reply(b"x" * 10_000)
    assert memory(q.r) == before + 2 * 10_000 + PART_BYTES


def test_all_who_ask_the_same_wait_for_one_answer_and_later_askers_get_it_too(q: Asking) -> None:
    askers = [Asker(q) for _ in range(20)]
    assert len(q.r.links) == 1 and q.upstream.in_flight == 1
    assert q.r.runtime.admission.status()["in_use"]["upstream"] == 1
    assert q.r.runtime.counters.upstream_requests == {"up": 1}
    q.reply()
    assert [asker.told for asker in askers] == [["list"]] * 20
    q.r.pass_time(KEPT_S - 0.1)
    assert Asker(q).told == ["list"] and len(q.r.links) == 1
    q.r.pass_time(0.2)
    again = Asker(q)
    assert again.told == [] and q.upstream.in_flight == 1
    q.reply(b"newer")
    assert again.told == ["newer"]


@pytest.mark.parametrize("fault", ["500 Oops", "404 Not Found", "reset", "silent", "refused"])
def test_a_failure_is_told_to_all_who_wait_and_is_not_kept(q: Asking, fault: str) -> None:
    q.r.refusing |= {1} if fault == "refused" else set()
    askers = [Asker(q), *([] if fault == "refused" else [Asker(q)])]
    if fault == "reset":
        q.r.link.reset()
    elif fault == "silent":
        q.r.pass_time(TIMEOUT_S + 0.1)
    elif fault != "refused":
        q.reply(b"list", fault)
    q.r.turn()
    assert [asker.told for asker in askers] == [[None]] * len(askers)
    q.r.refusing.clear()
    again = Asker(q)
    assert again.told == []
    q.reply()
    assert again.told == ["list"]


def test_a_question_that_nobody_waits_for_is_cut(q: Asking) -> None:
    first, second = Asker(q), Asker(q)
    first.leave()
    assert not q.r.link.closed
    second.leave()
    second.leave()
    assert q.r.link.closed and first.told == second.told == []


def test_other_questions_have_their_turn_one_after_another(q: Asking) -> None:
    askers = [Asker(q, b"%d" % k) for k in range(6)]
    assert q.upstream.in_flight == AT_ONCE_MAX == 2
    askers[3].leave()
    for k in (0, 1, 2, 4, 5):
        assert q.upstream.in_flight <= AT_ONCE_MAX
        link = next(n for n, each in enumerate(q.r.links) if each.protocol._asker is not None and not each.closed)
        q.reply(b"%d" % k, link=link)
    assert sorted(asker.told[0] or "" for asker in askers if asker.told) == ["0", "1", "2", "4", "5"]


def test_a_question_whose_turn_does_not_come_in_time_fails(q: Asking) -> None:
    askers = [Asker(q, b"%d" % k) for k in range(3)]
    q.r.pass_time(TIMEOUT_S - 0.5)
    assert askers[2].told == []
    q.r.pass_time(1)
    assert [asker.told for asker in askers] == [[None]] * 3


@pytest.mark.parametrize("is_full", [True, False])
def test_a_question_without_room_is_refused_and_takes_nothing(q: Asking, is_full: bool) -> None:
    q.upstream.in_flight = 3 if is_full else 0
    q.r.runtime.draining = not is_full
    with pytest.raises(HttpError) as raised:
        Asker(q)
    assert raised.value.status == 503 and len(q.questions) == 0
    q.upstream.in_flight = 0
    q.r.runtime.draining = False


def test_a_turn_that_finds_the_upstream_full_fails_and_frees_the_next(q: Asking) -> None:
    askers = [Asker(q, b"%d" % k) for k in range(4)]
    q.upstream.in_flight += 2  # generations took the other places
    askers[0].leave()
    q.r.turn()
    assert [asker.told for asker in askers] == [[], [], [None], [None]]
    q.upstream.in_flight -= 2
    q.reply(link=1)
    assert askers[1].told == ["list"]


def test_the_number_that_waits_is_bounded(q: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions_module, "QUEUED_MAX", 3)
    askers = [Asker(q, b"%d" % k) for k in range(3)]
    with pytest.raises(HttpError):
        Asker(q, b"one more")
    for asker in askers:
        asker.leave()


def test_the_bytes_that_are_kept_are_bounded(q: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions_module, "KEPT_BYTES_MAX", 2 * (8 + PART_BYTES))
    for k in range(4):
        Asker(q, b"%d" % k)
        q.reply(b"four")
    assert [q.questions.kept((q.upstream, b"%d" % k)) is not None for k in range(4)] == [False, False, True, True]
    assert q.questions._kept_bytes == 2 * (8 + PART_BYTES)


def slowly(upstream: Upstream, status: int, body: bytes) -> Reading:
    for _ in range(3 * CONNECTION_PIECES_MAX):
        yield
    if body == b"bug":
        raise RuntimeError("a mistake")
    return ModelList(((body.decode(), body),))


@pytest.mark.parametrize("body", [b"list", b"bug"])
def test_an_answer_is_read_in_shares_of_a_turn(q: Asking, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    asker = Asker(q, b"slow")
    assert asker.question is not None
    asker.question.read = slowly
    shares: list[bool] = []
    work = Question.work
    monkeypatch.setattr(Question, "work", lambda question: shares.append(more := work(question)) or more)
    q.reply(body)
    assert asker.told == ["list" if body == b"list" else None]
    assert shares == ([True, True, True, False] if body == b"list" else [True, True, True])
    assert [str(bug) for bug in q.r.bugs] == ["a mistake"] * (body == b"bug")
    q.r.bugs.clear()
    q.r.runtime.counters.bugs = 0


def test_an_answer_that_nobody_waits_for_is_not_read_on(q: Asking) -> None:
    asker = Asker(q, b"slow")
    assert asker.question is not None
    asker.question.read = slowly
    q.r.links[-1].feed(whole_answer(b"list"))
    asker.leave()
    assert asker.told == [] and asker.question.steps is None
