"""Router: finds the plan for a request by its method and path, from the head alone.

Precedence as in docs/PROTOCOL.md, section 1: streamd's own paths first. Then all of /v1/ goes upstream, and the paths
that an API has elsewhere, such as /v1beta/.
"""

from __future__ import annotations

import urllib.parse

from streamd.api import llama
from streamd.api.admin import Admin
from streamd.api.llama import Llama
from streamd.api.models import Models
from streamd.api.ops import Ops
from streamd.api.publish import Publish
from streamd.api.relay import Relay
from streamd.api.responses import ResponsesRoute
from streamd.api.rights import Rights
from streamd.api.streams import PREFIX, Streams, query_of, relayed_last_event_id
from streamd.net.answer import Answer
from streamd.net.application import Plan
from streamd.net.http_error import HttpError, method_not_allowed, not_found
from streamd.net.peers import Peers
from streamd.net.request import Request
from streamd.net.runtime import Runtime
from streamd.wire.cors import is_preflight
from streamd.wire.dialect import APIS

Methods = dict[str, Plan]

# Paths that go upstream unless streamd answers them itself: all below /v1/, and those that an API has elsewhere.
RELAYED = frozenset(path for api in APIS for path in api.paths)
RELAYED_BELOW = ("/v1/", *(prefix for api in APIS for prefix in api.below))

# All paths of streams begin so: by their ids, published, and llama.cpp's.
STREAMS = "/v1/stream"

# RFC 9110 15.5.22: a 426 names the protocols that would do.
UPGRADE = ((b"upgrade", b"HTTP/1.1"), (b"connection", b"Upgrade"))


class Router:
    """All routes of a process."""

    def __init__(
        self,
        runtime: Runtime,
        rights: Rights,
        relay: Relay,
        streams: Streams,
        publish: Publish,
        models: Models,
        ops: Ops,
        admin: Admin,
        llama: Llama,
        responses: ResponsesRoute,
    ) -> None:
        self._runtime = runtime
        self._rights = rights
        self._publish = publish
        self._relay = relay
        self._streams = streams
        self._models = models
        self._ops = ops
        self._admin = admin
        self._preflight = Plan(answer=rights.answer_preflight)
        self._llama = llama
        self._responses = responses

    def plan(self, answer: Answer) -> Plan:
        """The plan for a request. Raises HttpError:
        404, 405, 421, 501 and refusals that a route makes from the head alone."""
        request = answer.request
        head = request.head
        assert head is not None
        self._rights.check_page(answer)
        if answer.origin.listener == "metrics":
            return _of(self._ops.routes_of_scraper(answer), request)
        if head.upgrade:
            # Clients that try a WebSocket first (Codex) go over to HTTP at once only after a 426.
            text = "streamd speaks HTTP/1.1 and Server-Sent Events: ask without Upgrade."
            raise HttpError(426, text, code="no_upgrade", headers=UPGRADE, close=True)
        if head.method == "OPTIONS" and is_preflight(head.get):
            return self._preflight
        methods = self._ops.routes(answer) or self._admin.routes(answer)
        if methods is not None:
            return _of(methods, request)
        refusal = answer.origin.refusal
        if refusal is not None and request.method != "DELETE":
            raise self._runtime.refused(refusal, close=True)
        request.principal = self._rights.identify(answer)
        owner = self._other_owner(request)
        if owner is not None:
            return Plan(owner=owner)
        if request.path.startswith(STREAMS):
            families = (self._streams, self._publish, self._llama)
            methods = {method: plan for each in families for method, plan in (each.routes(request) or {}).items()}
            if methods:
                return _of(methods, request)
        known = self._responses.plan(request)
        if known is not None:
            return known
        methods = self._models.routes(request)
        if methods is not None:
            self._rights.check_relay(request, request.path.rstrip("/"))
            return _of(methods, request)
        relayed = request.path in RELAYED or request.path.startswith(RELAYED_BELOW)
        if request.path.startswith(("/v1/streams", "/v1/stream/")) or not relayed:
            raise not_found(request.path)
        return self._relay.plan(request)

    def _other_owner(self, request: Request) -> int | None:
        """With several workers: the slot of another worker that has to serve this request."""
        peers = self._runtime.peers
        if peers is None or request.is_handed_over:
            return None
        slot = self._owner(peers, request)
        return slot if slot != peers.slot else None

    def _owner(self, peers: Peers, request: Request) -> int | None:
        """The slot that this request belongs to; None: any worker may answer it."""
        path = request.path
        if path in (llama.LOOKUP, PREFIX[:-1]):
            after = query_of(request).get("after")
            return peers.owner_of_stream(after) if after is not None else None
        if path.startswith(PREFIX):
            return peers.owner_of_stream(urllib.parse.unquote(path[len(PREFIX) :].split("/")[0]))
        conversing = llama.owner_asked(peers, request)
        if request.method != "POST":
            conversing = self._responses.owner(request) if conversing is None else conversing
            if conversing is not None:
                return conversing
        last = relayed_last_event_id(request)
        if last is not None:
            return peers.owner_of_stream(last.stream)
        key = request.get(b"idempotency-key") if request.method == "POST" else None
        if conversing is None and key is not None:
            return peers.owner_of_name(request.principal.id, key.decode("latin-1"))
        return conversing


def _of(methods: Methods, request: Request) -> Plan:
    method = "GET" if request.method == "HEAD" and "HEAD" not in methods else request.method
    plan = methods.get(method)
    if plan is None:
        allowed = tuple(dict.fromkeys([*methods, "HEAD"] if "GET" in methods else methods))
        raise method_not_allowed(request.path, allowed)
    if plan.check is not None:
        plan.check(request)
    return plan
