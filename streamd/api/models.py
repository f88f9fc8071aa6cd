"""GET /v1/models: the models of all upstreams, merged, with their aliases. An upstream that fails is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from streamd.net.client import At, ClientConnection
from streamd.net.exchange import Ask
from streamd.net.fetch import Fetch
from streamd.net.problem import Problem
from streamd.net.request import Plan, Request
from streamd.net.runtime import Runtime
from streamd.net.upstream import Upstream
from streamd.net.upstreams import Upstreams
from streamd.reasons import CloseReason

PATH = "/v1/models"


class Models:
    """Asks every upstream at once and answers when the last one has, or its time is up."""

    def __init__(self, runtime: Runtime, upstreams: Upstreams, ask: Callable[[Request, dict[str, Any]], Ask]) -> None:
        self._runtime = runtime
        self._upstreams = upstreams
        self._ask = ask
        self._methods = {"GET": Plan(answer=self.answer)}

    def routes(self, request: Request) -> dict[str, Plan] | None:
        return self._methods if request.path == PATH and request.method in ("GET", "HEAD") else None

    def answer(self, connection: ClientConnection, request: Request) -> None:
        upstreams = tuple(self._upstreams)
        if not upstreams:
            self._upstreams.choose("", self._runtime.time())
        _Merge(self._runtime, connection, request, upstreams, self._ask(request, {}))


class _Merge:
    """One request for the list: its parts as they come."""

    def __init__(
        self,
        runtime: Runtime,
        connection: ClientConnection,
        request: Request,
        upstreams: tuple[Upstream, ...],
        ask: Ask,
    ) -> None:
        self._connection: ClientConnection | None = connection
        self._request = request
        self._upstreams = upstreams
        self._lists: dict[str, list[dict[str, Any]]] = {}
        self._missing = len(upstreams)
        request.waiting = self
        self._fetches = [Fetch(runtime, upstream, ask, self._arrived) for upstream in upstreams]
        for fetch in self._fetches:
            fetch.start()

    def _arrived(self, upstream: Upstream, status: int, body: bytes) -> None:
        """One upstream's answer; status 0 if it failed."""
        self._missing -= 1
        if status == 200:
            self._lists[upstream.settings.name] = _models_of(body)
        if not self._missing:
            self._finish()

    def _finish(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None or connection.at is not At.WAITING:
            return
        self._request.waiting = None
        if not self._lists:
            text = "No upstream answered with a list of models."
            connection.answer_problem(
                Problem(502, text, code="no_models", reason=CloseReason.UPSTREAM_CONNECT, should_retry=True)
            )
            return
        merged: dict[str, dict[str, Any]] = {}
        for upstream in self._upstreams:
            for model in _offered(upstream, self._lists.get(upstream.settings.name)):
                merged.setdefault(model["id"], model)
        body = orjson.dumps({"object": "list", "data": list(merged.values())})
        connection.answer(200, body, [(b"content-type", b"application/json")])

    # -- Waiting

    def reader_gone(self, reason: CloseReason) -> None:
        self._connection = None
        for fetch in self._fetches:
            fetch.cancel()

    def reader_paused(self) -> None:
        """Nothing is written before the whole answer is."""

    def reader_resumed(self) -> None:
        """Nothing is written before the whole answer is."""


def _models_of(body: bytes) -> list[dict[str, Any]]:
    """The list's entries that have an id; an answer of another shape has none."""
    try:
        entries = orjson.loads(body)["data"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return []
    if not isinstance(entries, list):
        return []
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


def _offered(upstream: Upstream, models: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """What may be asked for here: the models that the configuration lets through, then its aliases."""
    if models is None:
        return []
    settings = upstream.settings
    offered = [model for model in models if upstream.serves(model["id"])]
    by_id = {model["id"]: model for model in models}
    for alias, name in settings.aliases.items():
        offered.append({**by_id.get(name, {"object": "model", "owned_by": settings.name}), "id": alias})
    return offered
