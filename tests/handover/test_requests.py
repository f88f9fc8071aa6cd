"""Requests as records: every fact comes back, and facts of no request are refused."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import CHAT, SSE_HEAD, chunk, event, post, rig

from streamd.core.auth import Key, Principal
from streamd.handover.record import pack, unpack
from streamd.handover.requests import REQUEST, HeadFacts, RequestFacts, request_facts, request_of
from streamd.handover.slots import FATES, Fate
from streamd.handover.values import RecordError
from streamd.net.request import Request
from streamd.net.trace import Trace
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect
from streamd.wire.heads import RequestHead
from streamd.wire.http1 import parse_request

KEY = Key("k1", "alice", b"", b"")
ALICE = Principal("k1", KEY)


def made() -> Request:
    with rig() as r:
        route = r.runtime.settings.route("/v1/chat/completions")
        wire = post(
            CHAT, "X-Request-Id: r-1", "Cookie: a", "Cookie: b", "Traceparent: 00-" + "a" * 32 + "-" + "b" * 16 + "-01"
        )
        head = parse_request(wire[: wire.index(b"\r\n\r\n") + 4])
        request = Request(head, now=7.5, route=route, dialect=Dialect.CHAT)
    request.principal = ALICE
    request.body, request.client, request.gate_key, request.expires_at = b"{}", "192.0.2.9", "192.0.2.9", 99.0
    request.conversation, request.data_only, request.is_handed_over = "c", True, True
    request.extra_headers = [(b"vary", b"origin")]
    request.model, request.upstream, request.upstream_id = "m", "up", "u-1"
    request.status, request.answered_at, request.reason = 200, 8.5, CloseReason.COMPLETE
    return request


def test_every_fact_of_a_request_comes_back() -> None:
    request = made()
    again = request_of(unpack(REQUEST, pack(REQUEST, request_facts(request))), request.route, ALICE)
    carried = FATES["net.request.Request"][Fate.CARRIED].split()
    assert {name: getattr(again, name) for name in carried} == {name: getattr(request, name) for name in carried}
    assert isinstance(again.head, RequestHead) and again.get(b"cookie") == b"a, b" and again.raw
    assert again.head.by_name == request.head.by_name  # type: ignore[union-attr]
    request.head = None
    request.body = b""
    assert request_of(request_facts(request), request.route, ALICE).head is None


def test_the_requests_of_live_connections_can_be_told() -> None:
    with rig() as r:
        clients = [r.client(post(CHAT)[:-5]), r.client(post(CHAT)), r.client(post(CHAT))]
        r.reply(SSE_HEAD + chunk(event("one ")))
        for client in clients:
            answer = client.connection.answer
            assert answer is not None
            facts = request_facts(answer.request)
            assert unpack(REQUEST, pack(REQUEST, facts)) == facts
            client.fin()


def _facts() -> RequestFacts:
    return request_facts(made())


@pytest.mark.parametrize(
    ("wrong", "principal"),
    [
        ({}, Principal("k1")),
        ({}, Principal("k2", KEY)),
        ({}, Principal("k1", KEY, admin=True)),
        ({"path": "/other"}, ALICE),
        ({"method": "GET"}, ALICE),
        ({"extra_headers": ((b"a", b"b\r\nc: d"),)}, ALICE),
        ({"extra_headers": ((b"a b", b""),)}, ALICE),
        ({"extra_headers": ((b"", b""),)}, ALICE),
    ],
)
def test_facts_of_no_request_are_refused(wrong: dict[str, Any], principal: Principal) -> None:
    with pytest.raises(RecordError):
        request_of(_facts()._replace(**wrong), made().route, principal)


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": "a b"},
        {"id": ""},
        {"method": "GET\r\n"},
        {"path": "/ä"},
        {"upstream": "a\nb"},
        {"status": 1000},
        {"head": ()},
    ],
)
def test_facts_that_no_header_or_log_line_may_have_are_not_written(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecordError):
        pack(REQUEST, _facts()._replace(**wrong))


def test_a_request_that_is_traced_can_not_be_told() -> None:
    request = made()
    request.trace = Trace("chat", None, None)  # type: ignore[arg-type]
    with pytest.raises(RecordError, match="traced"):
        request_facts(request)


def test_a_head_has_all_members_of_the_heads_that_are_read() -> None:
    assert [*HeadFacts._fields, "by_name"] == list(RequestHead.__slots__)
