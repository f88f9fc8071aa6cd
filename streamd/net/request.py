"""Request: the facts of a request, from its head to the log line at its end. Its response is in net/answer.py."""

from __future__ import annotations

import re
import secrets

from streamd.config import RouteSettings
from streamd.core.auth import ANONYMOUS, Principal
from streamd.core.body_charge import BodyCharge
from streamd.net.trace import Trace
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect
from streamd.wire.form_scan import FormScan
from streamd.wire.http1 import Framing, RequestHead
from streamd.wire.json_scan import JsonScan

# Safe to echo and log unchanged (CWE-93, CWE-117); UUIDs, ULIDs and most tracing ids fit.
_sane_request_id = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}").fullmatch
_sane_traceparent = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}").fullmatch


class Outcome:
    """How a request was answered: the part of a Request that its log line is about."""

    __slots__ = ("answered_at", "keep_alive", "model", "reason", "status", "upstream", "upstream_id")

    def __init__(self, keep_alive: bool) -> None:
        self.keep_alive = keep_alive  # whether another request may follow on the connection
        self.model = ""
        self.upstream = ""
        self.upstream_id = ""  # the upstream's own name for the request
        self.status = 0
        self.answered_at = 0.0  # time of the first event, or of the first byte of another answer
        self.reason: CloseReason | None = None


class Request(Outcome):
    """The data kept of a request while it is answered; head and body are freed as early as possible."""

    __slots__ = (
        "body",
        "body_charge",
        "client",
        "conversation",
        "data_only",
        "dialect",
        "expires_at",
        "extra_headers",
        "form",
        "gate_key",
        "head",
        "http10",
        "id",
        "is_handed_over",
        "json",
        "method",
        "path",
        "principal",
        "route",
        "started_at",
        "trace",
        "traceparent",
    )

    def __init__(self, head: RequestHead, *, now: float, route: RouteSettings, dialect: Dialect) -> None:
        super().__init__(head.keep_alive)
        # until the answer begins
        self.head: RequestHead | None = head
        self.body = b""
        self.body_charge: BodyCharge | None = None  # for the body, here or while it is read
        self.json: JsonScan | None = None  # reads the body while it comes; None: it isn't wanted, or isn't JSON
        self.form: FormScan | None = None  # the same for a form
        # request
        self.method = head.method
        self.path = head.path
        self.http10 = head.http10
        self.id = request_id(head.get(b"x-request-id"))
        traceparent = head.get(b"traceparent") or b""
        self.traceparent = traceparent.decode() if _sane_traceparent(traceparent) else ""
        self.trace: Trace | None = None  # of a generation, where generations are traced
        self.route = route
        self.dialect = dialect
        self.client = ""  # the client's address as a trusted proxy names it; "": the connection's own
        self.gate_key = ""  # the key under which that address is counted during the request
        self.principal: Principal = ANONYMOUS
        self.expires_at = 0.0  # monotonic seconds at which the right to read ends; 0: never
        self.is_handed_over = False  # by another worker, with its connection: at most once, or it could go in circles
        self.started_at = now
        self.conversation = ""  # llama.cpp's dialect
        self.data_only = False  # a stream goes out as data lines only: the dialect's clients take no other lines
        # answer
        self.extra_headers: list[tuple[bytes, bytes]] = []

    @classmethod
    def unparsed(cls, *, now: float, route: RouteSettings) -> Request:
        """A stand-in for a request with an unreadable head, so that its refusal is sent and logged like any other."""
        head = RequestHead(
            method="-",
            target=b"-",
            path="-",
            query="",
            http10=False,
            headers=(),
            authority=b"",
            framing=Framing.NONE,
            content_length=0,
            keep_alive=False,
            expect_continue=False,
            upgrade=False,
            bytes_read=0,
            by_name={},
        )
        return cls(head, now=now, route=route, dialect=Dialect.UNKNOWN)

    @property
    def raw(self) -> bool:
        """Whether a stream goes out as the bytes of its events only, because the client counts them."""
        return self.conversation != ""

    @property
    def declares_json(self) -> bool:
        """Whether the body says that it is JSON (RFC 8259, RFC 6839 3.1)."""
        media_type = (self.get(b"content-type") or b"").split(b";")[0].strip().lower()
        return media_type == b"application/json" or media_type.endswith(b"+json")

    def get(self, name: bytes) -> bytes | None:
        """A header of the request; None once the head is freed."""
        head = self.head
        return head.by_name.get(name) if head is not None else None


def request_id(given: bytes | None) -> str:
    """The client's own id if it is safe to echo and log, else a new id."""
    if given is not None and _sane_request_id(given):
        return given.decode()
    return "req_" + secrets.token_hex(12)
