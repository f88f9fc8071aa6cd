"""Health, readiness, metrics and status: the routes of operators and balancers; also the pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from streamd.api.page_files import PageFiles
from streamd.net.answer import Answer
from streamd.net.application import Plan
from streamd.net.http_error import not_found
from streamd.net.runtime import Runtime

JSON = (b"content-type", b"application/json")


class Ops:
    """`metrics` renders the Prometheus text, `status` the dict of /status; each runs only when requested."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        metrics: Callable[[], tuple[bytes, bytes]],
        status: Callable[[], dict[str, Any]],
        ready: Callable[[], str],
        pages: PageFiles,
    ) -> None:
        self._runtime = runtime
        self._metrics = metrics
        self._status = status
        self._ready = ready
        public = {"GET": Plan(answer=self.health)}
        whole = {"OPTIONS": Plan(answer=self.options)}
        self._public = {
            "*": whole,
            "/healthz": public,
            "/health": public,
            "/readyz": {"GET": Plan(answer=self.readiness)},
            **pages.methods,
        }
        scraped = {"GET": Plan(answer=self.metrics)}
        self._scraped = {"/metrics": scraped, "/healthz": public, "/readyz": self._public["/readyz"]}
        self._private = {
            "/metrics": scraped,
            "/status": {"GET": Plan(answer=self.status)},
        }

    def routes(self, answer: Answer) -> dict[str, Plan] | None:
        """The methods of an operator's path; private paths only on a private listener (docs/PROTOCOL.md, section 1)."""
        private = self._private.get(answer.request.path)
        if private is not None and (self._runtime.settings.ops_public or not answer.origin.is_outside(answer.request)):
            return private
        return self._public.get(answer.request.path)

    def routes_of_scraper(self, answer: Answer) -> dict[str, Plan]:
        """The methods of a path on the listener of `metrics_listen`. Raises HttpError 404 for every other path."""
        methods = self._scraped.get(answer.request.path)
        if methods is None:
            raise not_found(answer.request.path)
        return methods

    def options(self, answer: Answer) -> None:
        """`OPTIONS *` asks about the server as a whole (RFC 9110 9.3.7)."""
        answer.send(204, b"", [(b"allow", b"GET, HEAD, POST, PUT, DELETE, OPTIONS")])

    def health(self, answer: Answer) -> None:
        """The process lives and its loop turns."""
        answer.send(200, b'{"status":"ok"}', [JSON])

    def readiness(self, answer: Answer) -> None:
        """Whether a balancer should send requests here. Upstreams have no influence: a 502 says more."""
        state = self._ready()
        body = b'{"status":"%b"}' % state.encode()
        answer.send(200 if state == "ready" else 503, body, [JSON])

    def metrics(self, answer: Answer) -> None:
        content_type, text = self._metrics()
        answer.send(200, text, [(b"content-type", content_type)])

    def status(self, answer: Answer) -> None:
        body = orjson.dumps(self._status(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        answer.send(200, body, [JSON])
