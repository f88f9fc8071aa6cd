"""Router: (method, path) to what is done with a request, decided from its head.

Precedence as in docs/PROTOCOL.md, section 1: streamd's own paths first, then everything under /v1/ goes upstream.
"""

from __future__ import annotations

from collections.abc import Callable

from streamd.api.models import Models
from streamd.api.ops import Ops
from streamd.api.relay import Relay
from streamd.api.streams import Streams
from streamd.net.client import ClientConnection
from streamd.net.problem import Problem, method_not_allowed, not_found
from streamd.net.request import Plan, Request

Answer = Callable[[ClientConnection, Request], None]
Methods = dict[str, Plan]


class Router:
    """All routes of a process."""

    def __init__(self, relay: Relay, streams: Streams, models: Models, ops: Ops) -> None:
        self._relay = relay
        self._streams = streams
        self._models = models
        self._ops = ops

    def plan(self, connection: ClientConnection, request: Request) -> Plan:
        """What to do with the request. Raises Problem: 404, 405, 501 and what a route refuses from the head alone."""
        head = request.head
        assert head is not None
        if head.upgrade:
            raise Problem(501, "streamd speaks HTTP/1.1 and Server-Sent Events, no other protocol.", code="no_upgrade")
        methods = self._ops.routes(connection, request) or self._streams.routes(request) or self._models.routes(request)
        if methods is not None:
            return _of(methods, request)
        if request.path.startswith("/v1/"):
            return self._relay.plan(connection, request)
        raise not_found(request.path)


def _of(methods: Methods, request: Request) -> Plan:
    method = "GET" if request.method == "HEAD" and "HEAD" not in methods else request.method
    plan = methods.get(method)
    if plan is None:
        allowed = tuple(dict.fromkeys([*methods, "HEAD"] if "GET" in methods else methods))
        raise method_not_allowed(request.path, allowed)
    return plan
