"""GET /v1/models and /v1beta/models: the models of all upstreams, merged, with their aliases.

An upstream that fails is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson

from streamd.net.answer import Answer, Pending
from streamd.net.application import Plan
from streamd.net.attempt import Ask
from streamd.net.fetch import Fetch
from streamd.net.http_error import HttpError
from streamd.net.request import Request
from streamd.net.runtime import Runtime
from streamd.net.upstream import Upstream
from streamd.net.upstreams import Upstreams
from streamd.reasons import CloseReason
from streamd.wire.dialects.api import Api
from streamd.wire.dialects.members import Json, json_object

PATHS = ("/v1/models", "/v1beta/models")


class Models:
    """Asks every upstream at once, and answers after the last has answered or timed out."""

    def __init__(self, runtime: Runtime, upstreams: Upstreams, ask: Callable[[Request, dict[str, Any]], Ask]) -> None:
        self._runtime = runtime
        self._upstreams = upstreams
        self._ask = ask
        self._methods = {"GET": Plan(answer=self.answer)}

    def routes(self, request: Request) -> dict[str, Plan] | None:
        return self._methods if request.path in PATHS and request.method in ("GET", "HEAD") else None

    def answer(self, answer: Answer) -> None:
        upstreams = tuple(self._upstreams)
        if not upstreams:
            self._upstreams.choose("", self._runtime.time())
        request = answer.request
        ask, query = replace(self._ask(request, {}), method="GET"), request.dialect.api.list_query
        if query:
            ask = replace(ask, target=lambda upstream: f"{request.path}?{query}".encode())
        _Merge(self._runtime, answer, upstreams, ask)


class _Merge(Pending):
    """A request for the list: collects its parts as they come."""

    def __init__(self, runtime: Runtime, answer: Answer, upstreams: tuple[Upstream, ...], ask: Ask) -> None:
        self._answer = answer
        self._api = answer.request.dialect.api
        self._upstreams = upstreams
        self._lists: dict[str, list[tuple[str, Json]]] = {}
        self._missing = len(upstreams)
        answer.later(self)
        self._fetches = [Fetch(runtime, upstream, ask, self._arrived) for upstream in upstreams]
        for fetch in self._fetches:
            fetch.start()

    def _arrived(self, upstream: Upstream, status: int, body: bytes) -> None:
        """Take an upstream's answer; status 0 if it failed."""
        self._missing -= 1
        if status == 200:
            self._lists[upstream.settings.name] = self._api.models_listed(json_object(body) or {})
        if not self._missing:
            self._answer.settle(self._respond)

    def _respond(self) -> None:
        if not self._lists:
            text = "No upstream answered with a list of models."
            raise HttpError(502, text, code="no_models", reason=CloseReason.UPSTREAM_CONNECT, should_retry=True)
        merged: dict[str, Json] = {}
        for upstream in self._upstreams:
            for name, model in _offered(self._api, upstream, self._lists.get(upstream.settings.name)):
                merged.setdefault(name, model)
        body = orjson.dumps(self._api.model_list(list(merged.values())))
        self._answer.send(200, body, [(b"content-type", b"application/json")])

    def on_gone(self, reason: CloseReason) -> None:
        for fetch in self._fetches:
            fetch.cancel()


def _offered(api: Api, upstream: Upstream, models: list[tuple[str, Json]] | None) -> list[tuple[str, Json]]:
    """The models offered here: those that the configuration lets through, then the upstream's aliases."""
    if models is None:
        return []
    settings = upstream.settings
    offered = [(name, model) for name, model in models if upstream.serves(name)]
    by_name = dict(models)
    for alias, name in settings.aliases.items():
        offered.append((alias, api.alias_listed(alias, by_name.get(name), settings.name)))
    return offered
