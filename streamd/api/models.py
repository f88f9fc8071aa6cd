"""GET /v1/models, /v1beta/models and their like: the models of all upstreams, merged, with their aliases.

The list of a single upstream passes as it is, page by page, as the client's query asks for it. What is
changed in it, or merged, is put together in wire/model_list.py; a key that is limited to some models sees no others.

An upstream that fails is left out; where none has a list, the first upstream's error is the answer, for a wrong key of
streamd's says so there. The question that goes upstream is streamd's own: of the asker it has the
credentials, if that upstream gets them, the fields that an API's list may depend on, and the query if the list is a
single upstream's. So askers share it (net/questions.py), whatever else they send. It counts against the limits of the
key that caused it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Generator
from functools import partial
from typing import Final

import orjson

from streamd.api.rights import Rights
from streamd.net.answer import Answer, Pending
from streamd.net.application import Plan
from streamd.net.attempt import Ask, FixedAsk
from streamd.net.http_error import HttpError
from streamd.net.questions import ErrorAnswer, Key, Question, Questions, Read, Reading
from streamd.net.request import Request
from streamd.net.runtime import Runtime, head_of
from streamd.net.turns import CONNECTION_PIECES_MAX
from streamd.net.upstream import Upstream
from streamd.net.upstreams import Upstreams
from streamd.reasons import CloseReason
from streamd.wire import active_content, query, retry_after
from streamd.wire.dialect import KEY_FIELDS, Dialect
from streamd.wire.dialects.api import Api
from streamd.wire.dialects.members import Json
from streamd.wire.model_list import CURSORS, ModelList, list_in, on_one_page
from streamd.wire.model_names import ListTooLarge, names_in, parsed_list

# OpenAI's, Google's, and two more with OpenAI's shape: Google's for OpenAI's clients, and OpenAI's own before 2022.
_OPENAIS: Final = ("/v1beta/openai/models", "/v1/engines")
PATHS = ("/v1/models", "/v1beta/models", *_OPENAIS)

# Of the asker's fields go upstream: credentials (streamd's own or the client's, as the upstream's settings say), and
# those that decide which list a server gives. Anthropic gives none without its version.
_ASKERS_FIELDS: Final = frozenset(
    (
        b"authorization",
        *KEY_FIELDS,
        b"anthropic-version",
        b"anthropic-beta",
        b"openai-organization",
        b"openai-project",
        b"x-goog-user-project",
    )
)

# Patterns of a key that are compared with a model's name in the time of a piece of work.
PATTERNS_PER_PIECE: Final = 4

# Anthropic's largest page, for clients with Anthropic's version; other servers ignore it or have no pages.
_ANTHROPICS_MOST: Final = "limit=1000"

# Fields of an upstream's error that pass.
_ERROR_FIELDS: Final = frozenset((b"content-type", b"content-encoding", b"www-authenticate", b"retry-after"))


class Models:
    """Asks every upstream at once, and answers after the last has answered or timed out."""

    def __init__(
        self,
        runtime: Runtime,
        upstreams: Upstreams,
        rights: Rights,
        ask: Callable[[Request], Ask],
    ) -> None:
        self._runtime = runtime
        self._upstreams = upstreams
        self._rights = rights
        self._ask = ask
        self._questions = Questions(runtime)
        self._methods = {"GET": Plan(answer=self.answer)}

    def routes(self, request: Request) -> dict[str, Plan] | None:
        return self._methods if request.path.rstrip("/") in PATHS and request.method in ("GET", "HEAD") else None

    def answer(self, answer: Answer) -> None:
        """Answer from what is kept, from questions under way, and from new ones. Raises HttpError."""
        upstreams, request = tuple(self._upstreams), answer.request
        if not upstreams:
            self._upstreams.choose("", self._runtime.time())
        asked = self._ask(request)
        merge = _Merge(self._runtime, self._questions, answer, upstreams)
        fresh: list[tuple[Key, Ask]] = []
        for upstream in upstreams:
            ask = _question(asked, request, upstream, is_own=merge.is_own)
            key = (upstream, _digest(ask, upstream))
            if not merge.has(key):
                fresh.append((key, ask))
        try:
            self._begin(fresh, merge, request)
        except HttpError:
            merge.on_gone(CloseReason.NO_UPSTREAM)
            raise
        merge.begun()

    def _begin(self, fresh: list[tuple[Key, Ask]], merge: _Merge, request: Request) -> None:
        """Ask what isn't known. Raises HttpError if that may not be, and nothing else is known."""
        if not fresh:
            return
        self._rights.check_limits(request)
        asked = query.fields(head_of(request).query)
        paged = CURSORS.intersection(name for name, _ in asked)
        is_first = merge.is_own or not paged
        read = partial(_offered_in, merge.api, is_first=is_first, is_all=merge.is_own or not asked)
        refusals = [problem for key, ask in fresh if (problem := merge.begin(key, ask, read)) is not None]
        if len(refusals) == len(fresh):
            if merge.has_any:
                return
            try:
                raise refusals[0]
            finally:
                del refusals  # or the error, its traceback, this frame and the list would hold each other
        charge = self._rights.charge(request)
        if charge is not None:
            charge.asked()
            charge.over()


class _Merge(Pending):
    """A request for the list: collects its parts as they come."""

    def __init__(self, runtime: Runtime, questions: Questions, answer: Answer, upstreams: tuple[Upstream, ...]) -> None:
        self._runtime = runtime
        self._questions = questions
        self._answer = answer
        self.api = _api_of(answer.request)
        self._upstreams = upstreams
        self._key = answer.request.principal.key
        is_limited = self._key is not None and "*" not in self._key.models
        self.is_own = len(upstreams) > 1 or is_limited  # the list is made here, and not a single upstream's
        self._lists: dict[Upstream, ModelList] = {}
        self._errors: dict[Upstream, ErrorAnswer] = {}
        self._faults: dict[Upstream, str] = {}  # why a list that came isn't shown
        self._waits: set[Question] = set()
        self._steps: Generator[None, None, bytes] | None = None  # makes the page

    def has(self, key: Key) -> bool:
        """Whether an upstream's part is known, or its question under way, which is joined then."""
        models = self._questions.kept(key)
        if models is not None:
            self._take(key[0], models)
            return True
        question = self._questions.join(key, self)
        if question is not None:
            self._waits.add(question)
        return question is not None

    @property
    def has_any(self) -> bool:
        """Whether a part is known, or may come."""
        return bool(self._lists or self._waits)

    def begin(self, key: Key, ask: Ask, read: Read) -> HttpError | None:
        """Ask an upstream; the error if it can't be asked now."""
        try:
            self._waits.add(self._questions.begin(key, ask, read, self))
        except HttpError as problem:
            return problem.with_traceback(None)
        return None

    def begun(self) -> None:
        """Everything is asked: wait for it, or answer now."""
        self._answer.later(self)
        if not self._waits:
            self._finish()

    def arrived(self, question: Question, models: ModelList | None) -> None:
        self._waits.discard(question)
        if models is not None:
            self._take(question.upstream, models)
        elif question.error is not None:
            self._errors[question.upstream] = question.error
        if not self._waits:
            self._finish()

    def _take(self, upstream: Upstream, models: ModelList) -> None:
        if models.fault and (self.is_own or not models.whole):
            self._faults[upstream] = f"The list of models of {upstream.settings.name} is too large: {models.fault}."
        elif models.is_list or not self.is_own:
            self._lists[upstream] = models

    def _shows(self, name: str) -> bool:
        return self._key is None or self._key.refuse_model(name) is None

    def _finish(self) -> None:
        """All parts are here: make the page, a share of it in each turn."""
        lists = [self._lists[upstream] for upstream in self._upstreams if upstream in self._lists]
        if not lists:
            self._answer.settle(self._refuse)
        elif self.is_own:
            self._steps = on_one_page(self.api, lists, self._shows, keeps_shape=len(self._upstreams) == 1)
            if self.work():
                self._runtime.turns.wait(self)
        else:
            self._answer.settle(partial(self._send, lists[0].whole or lists[0].joined()))

    def _send(self, body: bytes) -> None:
        self._answer.send(200, body, [(b"content-type", b"application/json")])

    def _refuse(self) -> None:
        if self._errors:
            self._pass_error()
            return
        if self._faults:
            text = next(iter(self._faults.values()))
            raise HttpError(502, text, code="models_too_many", reason=CloseReason.UPSTREAM_REFUSED, should_retry=False)
        text = "No upstream answered with a list of models."
        raise HttpError(502, text, code="no_models", reason=CloseReason.UPSTREAM_CONNECT, should_retry=True)

    # -- TurnMember

    @property
    def share(self) -> str:
        return f"key {self._answer.request.principal.id}"

    def work(self) -> bool:
        """Look at a turn's share of the models. True: more are left. The client may have left meanwhile."""
        left, steps = CONNECTION_PIECES_MAX, self._steps
        price = 1 + (len(self._key.models) // PATTERNS_PER_PIECE if self._key is not None else 0)
        try:
            while steps is not None and left > 0:
                next(steps)
                left -= price
        except StopIteration as end:
            self._steps = steps = None
            self._answer.settle(partial(self._send, end.value))
        self._runtime.turns.spend(CONNECTION_PIECES_MAX - left)
        return steps is not None

    def crash(self, where: str, error: Exception) -> None:
        """work() raised: the request ends. Never raises."""
        self._steps = None
        self._answer.crash(where, error)

    def _pass_error(self) -> None:
        """Answer with the first upstream's error; the mistake of a client or of a key (4xx) says most."""
        ranked = sorted(self._errors, key=lambda each: (self._errors[each].status >= 500, self._upstreams.index(each)))
        upstream, (status, fields, body) = ranked[0], self._errors[ranked[0]]
        most, now = self._runtime.settings.upstream_retry_after_max_s, self._runtime.unix_time()
        passed = [(b"x-upstream", upstream.settings.name.encode())]
        for name, value in fields:
            bounded = retry_after.bounded(name, value, most, now)
            if name in _ERROR_FIELDS and bounded is not None:
                passed.append((name, bounded))
        types = [value for name, value in fields if name == b"content-type"]
        self._answer.send(status, body, [*passed, *active_content.holding(types[0] if types else None)])

    def on_gone(self, reason: CloseReason) -> None:
        self._steps = None
        waits, self._waits = self._waits, set()
        for question in waits:
            self._questions.leave(question, self)


def _api_of(request: Request) -> Api:
    """The API whose list a path asks for."""
    return Dialect.CHAT.api if request.path.rstrip("/") in _OPENAIS else request.dialect.api


def _question(asked: Ask, request: Request, upstream: Upstream, *, is_own: bool) -> Ask:
    """The question for an upstream: the asker's request without its body and most of its fields.

    Its query goes along, unless the list is streamd's own (`is_own`): that has all models on a single page.
    """
    own = {name.lower().encode() for name in upstream.settings.headers}
    kept = own | _ASKERS_FIELDS | {b"host", b"accept-encoding", b"via"}
    fields = [field for field in asked.fields(upstream, 0) if field[0] in kept]
    if b"accept" not in own:
        fields.append((b"accept", b"application/json"))
    api, path = _api_of(request), request.path.rstrip("/").encode()
    fields += api.list_fields
    if not is_own:
        sent = asked.target(upstream).partition(b"?")[2]
    else:
        sent = (api.list_query or (_ANTHROPICS_MOST if request.get(b"anthropic-version") is not None else "")).encode()
    target = path + b"?" + sent if sent else path
    return FixedAsk(target, fields)


def _digest(ask: Ask, upstream: Upstream) -> bytes:
    fields = b"\n".join(b"%b:%b" % field for field in ask.fields(upstream, 0))
    return hashlib.blake2b(ask.target(upstream) + b"\n" + fields, digest_size=16).digest()


def _offered_in(api: Api, upstream: Upstream, status: int, body: bytes, *, is_first: bool, is_all: bool) -> Reading:
    """The models offered here of an upstream's answer; None for an answer that is no list.

    `is_first`: it is the first page, which has the aliases; `is_all`: no other page was asked for.
    """
    if status != 200:
        return None
    settings = upstream.settings
    whole = body if "*" in settings.models and not settings.aliases and body.lstrip()[:1] in (b"{", b"[") else b""
    try:
        parsed = parsed_list(body)
        found = list_in(parsed, api, settings.name)
    except ListTooLarge as large:
        return ModelList((), whole=whole, fault=str(large))
    if found is None:
        return ModelList((), whole=whole) if whole else None
    yield
    models, around = found
    names = names_in(parsed)
    if names and is_all and not settings.pass_client_key:  # with the client's key the list is the client's
        upstream.listed = names
    entries = []
    for name, model in _offered(api, upstream, models, is_first=is_first):
        with contextlib.suppress(TypeError):  # orjson reads deeper nesting than it writes
            entries.append((name, orjson.dumps(model)))
        yield
    return around._replace(entries=tuple(entries), whole=whole)


def _offered(api: Api, upstream: Upstream, models: list[tuple[str, Json]], *, is_first: bool) -> list[tuple[str, Json]]:
    """The models offered here: those that the configuration lets through, then the upstream's aliases."""
    settings = upstream.settings
    offered = [(name, model) for name, model in models if upstream.serves(name)]
    by_name = dict(models)
    for alias, name in settings.aliases.items() if is_first else ():
        offered.append((alias, api.alias_listed(alias, by_name.get(name), settings.name)))
    return offered
