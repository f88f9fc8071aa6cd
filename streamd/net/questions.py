"""Questions: small answers of upstreams (lists of models) that all who want them share.

Who asks while the same question is under way waits for its answer, and a good answer is kept for KEPT_S. Questions are
the same if they go to the same upstream with the same bytes: the credentials that go upstream belong to them, and what
an asker sends beside them doesn't.

A question takes a place in flight, like a request for a generation, so at most AT_ONCE_MAX of them are at an upstream
and it isn't asked while it is full. The others wait for their turn. A failure is told to all who wait, and not kept. A
question that nobody waits for is cut.

Bounds: AT_ONCE_MAX for each upstream, QUEUED_MAX waiting, KEPT_BYTES_MAX of answers; a larger sum drops the oldest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Final, NamedTuple, Protocol

from streamd.net.attempt import Ask
from streamd.net.fetch import ANSWER_BYTES_MAX, TIMEOUT_S, Fetch
from streamd.net.http_error import HttpError
from streamd.net.runtime import Runtime
from streamd.net.turns import CONNECTION_PIECES_MAX
from streamd.net.upstream import Upstream
from streamd.net.upstreams import NONE_AVAILABLE
from streamd.wire.http1 import Headers
from streamd.wire.model_list import ModelList

# A page that asks for the list several times as it opens gets the same; a model that was loaded shows soon.
KEPT_S: Final = 3.0
# Two of the largest answers (net/fetch.py), or one and its models. An OpenAI-compatible server's list is a few KB.
KEPT_BYTES_MAX: Final = 4 * 1024 * 1024
# With keys of their own upstream (pass_client_key) clients can't share: two of them are answered at a time.
AT_ONCE_MAX: Final = 2
# Two at a time within the time limit of a question, at 25 ms each: 400. The next is refused.
QUEUED_MAX: Final = 400

# An error that is passed on: the error object of an OpenAI-compatible server takes a few hundred bytes, a page 10 KB.
ERROR_BYTES_MAX: Final = 64 * 1024

Key = tuple[Upstream, bytes]
"""A question: its upstream, and a digest of the bytes that go there."""

Reading = Generator[None, None, ModelList | None]
"""The work on an answer, in steps of a model each. It returns None for an answer that is no list."""

Read = Callable[[Upstream, int, bytes], Reading]
"""Begins that work, of an answer's status and body."""


class ErrorAnswer(NamedTuple):
    """An upstream's answer with an error status."""

    status: int
    fields: Headers
    body: bytes


class Listener(Protocol):
    """An asker that waits."""

    def arrived(self, question: Question, models: ModelList | None) -> None:
        """The answer; None for a failure."""


class Question:
    """A question under way, or waiting for its turn, or an answer that is being read: a TurnMember then."""

    __slots__ = ("_done", "_runtime", "ask", "error", "fetch", "key", "listeners", "read", "steps", "timer")

    def __init__(
        self, runtime: Runtime, key: Key, ask: Ask, read: Read, done: Callable[[Question, ModelList | None], None]
    ) -> None:
        self._runtime = runtime
        self._done = done  # called once the answer is read
        self.steps: Reading | None = None
        self.key = key
        self.ask = ask
        self.read = read
        self.listeners: list[Listener] = []
        self.error: ErrorAnswer | None = None  # the answer, if it is one of an error
        self.fetch: Fetch | None = None  # None: it waits for its turn, until the timer ends that
        self.timer: asyncio.TimerHandle | None = None

    @property
    def upstream(self) -> Upstream:
        return self.key[0]

    # -- TurnMember

    @property
    def share(self) -> str:
        return f"upstream {self.upstream.settings.name}"

    def work(self) -> bool:
        """Read a turn's share of the answer. True: more is left."""
        left, steps = CONNECTION_PIECES_MAX, self.steps
        try:
            while steps is not None and left > 0:
                next(steps)
                left -= 1
        except StopIteration as end:
            self.steps = steps = None
            self._done(self, end.value)
        self._runtime.turns.spend(CONNECTION_PIECES_MAX - left)
        return steps is not None

    def crash(self, where: str, error: Exception) -> None:
        """work() raised: nobody gets an answer. Never raises."""
        self._runtime.bug(where, error)
        if self.steps is not None:
            self.steps = None
            with self._runtime.guard:
                self._done(self, None)


class Kept(NamedTuple):
    """An answer that is still good."""

    models: ModelList
    size_bytes: int


class Questions:
    """All questions of a worker, by their key."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._under_way: dict[Key, Question] = {}  # the longest waiting first
        self._kept: dict[Key, Kept] = {}  # the oldest first
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self._under_way)

    def kept(self, key: Key) -> ModelList | None:
        """The answer, if it came within KEPT_S."""
        kept = self._kept.get(key)
        return kept.models if kept is not None else None

    def join(self, key: Key, listener: Listener) -> Question | None:
        """Wait for a question that is under way; None if it isn't."""
        question = self._under_way.get(key)
        if question is not None:
            question.listeners.append(listener)
        return question

    def leave(self, question: Question, listener: Listener) -> None:
        """Wait no longer."""
        if listener in question.listeners:
            question.listeners.remove(listener)
            if not question.listeners:
                self._end(question)

    def begin(self, key: Key, ask: Ask, read: Read, listener: Listener) -> Question:
        """Ask, or wait for a turn. Raises HttpError 503 if the upstream is full, or streamd has no room for it.

        Nothing is kept of an answer that is no list.
        """
        question = Question(self._runtime, key, ask, read, self._told)
        asked = sum(each.fetch is not None for each in self._under_way.values() if each.upstream is key[0])
        if asked < AT_ONCE_MAX:
            self._start(question)
        elif len(self._under_way) < QUEUED_MAX:
            question.timer = self._runtime.loop.call_later(TIMEOUT_S, self._arrived, question, 0, b"")
        else:
            raise self._runtime.refused(NONE_AVAILABLE)
        question.listeners.append(listener)
        self._under_way[key] = question
        return question

    def _start(self, question: Question) -> None:
        """Take the places and ask. Raises HttpError, and then holds none."""
        runtime, upstream = self._runtime, question.upstream
        if upstream.full():
            raise runtime.refused(NONE_AVAILABLE)
        runtime.admit_relay()
        try:
            done = lambda upstream, status, body: self._arrived(question, status, body)  # noqa: E731
            question.fetch = Fetch(runtime, upstream, question.ask, done)
            question.fetch.start()
        except Exception:
            question.fetch = None
            runtime.admission.release_relay()
            raise

    def _arrived(self, question: Question, status: int, body: bytes) -> None:
        fetch = question.fetch
        if fetch is not None and fetch.head is not None and status >= 400 and len(body) <= ERROR_BYTES_MAX:
            question.error = ErrorAnswer(status, fetch.head.headers, body)
        if status:
            question.steps = question.read(question.upstream, status, body)
            if question.work():
                self._runtime.turns.wait(question)
        elif fetch is not None and fetch.is_too_large:
            self._told(question, ModelList((), fault=f"it has more than {ANSWER_BYTES_MAX} bytes"))
        else:
            self._told(question, None)

    def _told(self, question: Question, models: ModelList | None) -> None:
        """The answer is read; None: there is none."""
        listeners, question.listeners = question.listeners, []
        if models is not None:
            self._keep(question.key, Kept(models, models.size_bytes))
        self._end(question)
        for listener in listeners:
            listener.arrived(question, models)

    def _end(self, question: Question) -> None:
        """Give the places back, and let the next question have its turn."""
        question.steps = None
        del self._under_way[question.key]
        if question.timer is not None:
            question.timer.cancel()
        if question.fetch is not None:
            question.fetch.cancel()
            self._runtime.admission.release_relay()
            self._next(question.upstream)

    def _next(self, upstream: Upstream) -> None:
        waiting = (each for each in self._under_way.values() if each.upstream is upstream and each.fetch is None)
        question = next(waiting, None)
        if question is None:
            return
        assert question.timer is not None
        question.timer.cancel()
        try:
            self._start(question)
        except HttpError:
            self._runtime.loop.call_soon(self._fail, question)

    def _fail(self, question: Question) -> None:
        """Its turn came and there was no room; the next may have more luck."""
        if self._under_way.get(question.key) is question:
            self._arrived(question, 0, b"")
            self._next(question.upstream)

    def _keep(self, key: Key, kept: Kept) -> None:
        self._forget(key)
        self._kept[key] = kept
        self._count(kept.size_bytes)
        while self._kept_bytes > KEPT_BYTES_MAX:
            self._forget(next(iter(self._kept)))
        self._runtime.loop.call_later(KEPT_S, self._expire, key, kept)

    def _expire(self, key: Key, kept: Kept) -> None:
        if self._kept.get(key) is kept:
            self._forget(key)

    def _forget(self, key: Key) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._count(-kept.size_bytes)

    def _count(self, more_bytes: int) -> None:
        self._kept_bytes += more_bytes
        self._runtime.admission.charge_held(more_bytes)
