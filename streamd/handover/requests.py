"""Requests as records: a head with its fields, and the facts of a request under way.

The settings of its route and the principal with its key are those of the new process. The body is there as long as it
may have to be sent; it is charged and scanned anew. A request that is traced can't be told yet.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from streamd.config import RouteSettings
from streamd.core.auth import Principal
from streamd.handover.record import RecordKind
from streamd.handover.values import (
    Bytes,
    Flag,
    Many,
    Maybe,
    RecordError,
    Seconds,
    Text,
    TupleOf,
    WholeNumber,
    Word,
)
from streamd.handover.wire_kinds import HELD_BYTES_MAX
from streamd.net.request import Request
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect
from streamd.wire.heads import Framing, Headers, RequestHead, joined


class HeadFacts(NamedTuple):
    """A request's head. The members are those of RequestHead."""

    method: str
    target: bytes
    path: str
    query: str
    http10: bool
    headers: Headers
    authority: bytes
    framing: Framing
    content_length: int
    keep_alive: bool
    expect_continue: bool
    upgrade: bool
    bytes_read: int


class RequestFacts(NamedTuple):
    """A request. The members are those of Request, but for the principal's."""

    head: HeadFacts | None
    body: bytes
    method: str
    path: str
    http10: bool
    id: str
    traceparent: str
    dialect: Dialect
    principal_id: str
    key_id: str  # of the principal's key; "": it has none
    is_admin: bool
    client: str
    gate_key: str
    expires_at: float
    is_handed_over: bool
    started_at: float
    conversation: str
    data_only: bool
    extra_headers: Headers
    keep_alive: bool
    model: str
    upstream: str
    upstream_id: str
    status: int
    answered_at: float
    reason: CloseReason | None


_method = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}").fullmatch
_field_name = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+").fullmatch
_field_value = re.compile(rb"[^\0\r\n]*").fullmatch
_token = re.compile(r"[!-~]{1,128}").fullmatch

FIELDS: Final = Many(TupleOf(Bytes(1 << 16), Bytes(1 << 20)))
METHOD: Final = Text(64, _method)
TARGET: Final = Text(1 << 20, str.isascii)
_LINE: Final = Text(4096, lambda text: "\n" not in text and "\r" not in text)

REQUEST_HEAD: Final = RecordKind(
    "request_head",
    HeadFacts,
    {
        "method": METHOD,
        "target": Bytes(1 << 20),
        "path": TARGET,
        "query": TARGET,
        "http10": Flag(),
        "headers": FIELDS,
        "authority": Bytes(1 << 16),
        "framing": Word(Framing),
        "content_length": WholeNumber(0, 2**63 - 1),
        "keep_alive": Flag(),
        "expect_continue": Flag(),
        "upgrade": Flag(),
        "bytes_read": WholeNumber(),
    },
)
"""A whole head of a request, valid by all rules in the process that read it."""

REQUEST: Final = RecordKind(
    "request",
    RequestFacts,
    {
        "head": Maybe(REQUEST_HEAD),
        "body": Bytes(HELD_BYTES_MAX),
        "method": METHOD,
        "path": TARGET,
        "http10": Flag(),
        "id": Text(128, _token),
        "traceparent": Text(64, str.isascii),
        "dialect": Word(Dialect),
        "principal_id": Text(256),
        "key_id": Text(256),
        "is_admin": Flag(),
        "client": Text(64),
        "gate_key": Text(64),
        "expires_at": Seconds(),
        "is_handed_over": Flag(),
        "started_at": Seconds(),
        "conversation": Text(4096),
        "data_only": Flag(),
        "extra_headers": FIELDS,
        "keep_alive": Flag(),
        "model": Text(256),
        "upstream": _LINE,
        "upstream_id": _LINE,
        "status": WholeNumber(0, 999),
        "answered_at": Seconds(),
        "reason": Maybe(Word(CloseReason, "word")),
    },
)
"""A request, with its head and body as long as these are kept."""


def request_facts(request: Request) -> RequestFacts:
    """The facts of this request. Raises RecordError for a request that can't be told."""
    if request.trace is not None:
        raise RecordError(f"request {request.id} is traced")
    head, key = request.head, request.principal.key
    return RequestFacts(
        head=HeadFacts(*(getattr(head, name) for name in HeadFacts._fields)) if head is not None else None,
        body=request.body,
        principal_id=request.principal.id,
        key_id=key.id if key is not None else "",
        is_admin=request.principal.admin,
        extra_headers=tuple(request.extra_headers),
        **{name: getattr(request, name) for name in _SAME},
    )


def request_of(facts: RequestFacts, route: RouteSettings, principal: Principal) -> Request:
    """The request in this process, without charges. `principal` is the owner with this key_id, as it is known here.

    Raises RecordError for facts that no request has.
    """
    _check(facts, principal)
    request = Request.unparsed(now=facts.started_at, route=route)
    request.head = None
    if facts.head is not None:
        request.head = RequestHead(*facts.head, joined(facts.head.headers))
    request.body = facts.body
    request.principal = principal
    request.extra_headers = list(facts.extra_headers)
    for name in _SAME:
        setattr(request, name, getattr(facts, name))
    return request


# Facts that are attributes of a request under the same name.
_OTHERS: Final = ("head", "body", "principal_id", "key_id", "is_admin", "extra_headers")
_SAME: Final = tuple(name for name in RequestFacts._fields if name not in _OTHERS)


def _check(facts: RequestFacts, principal: Principal) -> None:
    fields = [*facts.extra_headers, *(facts.head.headers if facts.head is not None else ())]
    if not all(_field_name(name) and _field_value(value) for name, value in fields):
        raise RecordError(f"request {facts.id} has a field that no head can have")
    key_id = principal.key.id if principal.key is not None else ""
    if (principal.id, key_id, principal.admin) != (facts.principal_id, facts.key_id, facts.is_admin):
        raise RecordError(f"request {facts.id} belongs to another principal")
    if facts.head is not None and (facts.head.method, facts.head.path) != (facts.method, facts.path):
        raise RecordError(f"request {facts.id} has the head of another")
