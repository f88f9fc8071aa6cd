"""The fault matrix: every route times every fault of an upstream. Each cell has its status or its error event, and
leaves nothing behind: no exchange, no upstream connection, no stream with a reader."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fakes import DONE, LAST, SSE_HEAD, Answer, Read, chunk, event, events_in, post
from loopback import Conn, Daemon, RawUpstream, nobody_listens, raw_upstream, run, says, serving

from streamd.config import UpstreamSettings
from streamd.wire.dialect import Dialect

PROMPT = [{"role": "user", "content": "Say something."}]
STREAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"model": "m", "stream": True, "messages": PROMPT}),
    "completions": ("/v1/completions", {"model": "m", "stream": True, "prompt": "Say"}),
    "responses": ("/v1/responses", {"model": "m", "stream": True, "input": "Say"}),
    "messages": ("/v1/messages", {"model": "m", "stream": True, "messages": PROMPT, "max_tokens": 99}),
    "gemini": ("/v1beta/models/m:streamGenerateContent?alt=sse", {"contents": [{"parts": [{"text": "Say"}]}]}),
}
assert STREAMED.keys() == {dialect.value for dialect in Dialect} - {"unknown"}, "each dialect meets each fault"
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("/v1/chat/completions", {"model": "m", "messages": PROMPT}),
    "other": ("/v1/embeddings", {"model": "m", "input": "Say"}),
}
ROUTES = STREAMED | WHOLE
LIMITS: dict[str, Any] = {"ttft_timeout_s": 300.0, "idle_timeout_s": 120.0, "commit_after_s": 10.0}


def request(route: str, *fields: str) -> bytes:
    path, body = ROUTES[route]
    return post(body, "Accept: text/event-stream", *fields, path=path)


def error_of(route: str, answer: Answer) -> dict[str, Any]:
    """The error object of an error status, in the route's shape."""
    body = json.loads(answer.body)
    if route == "messages":
        assert body["type"] == "error" and set(body["error"]) == {"type", "message"}
    elif route == "gemini":
        assert set(body["error"]) == {"code", "message", "status", "details"}
        return {"code": body["error"]["details"][0]["reason"], "message": body["error"]["message"]}
    else:
        assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def check_error_event(route: str, answer: Answer, code: str, *, given: frozenset[str] = frozenset()) -> list[Read]:
    """Check that the stream ends with an error event of the route's dialect, not cleanly; return the events before.

    `given`: further members, which an upstream's own error has.
    """
    assert answer.status == 200 and not answer.whole
    assert b"[DONE]" not in answer.body
    *before, last = events_in(answer.body)
    assert last.seq == len(before) + 1
    if route == "messages":
        assert last.name == "error" and last.json["type"] == "error"
        assert set(last.json["error"]) == {"type", "message", *given} - {"status"}
    elif route == "responses":
        assert last.name == "error" and last.json["type"] == "error"
        assert last.json["code"] == last.json["error"]["code"] == code
        numbers = [each.json["sequence_number"] for each in before]
        assert last.json["sequence_number"] == (numbers[-1] + 1 if numbers else 0)
    elif route == "gemini":
        assert last.name is None and last.json["error"]["details"][0]["reason"] == code
        assert given or last.json["error"]["status"] in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")
    else:
        assert last.name is None and last.json["error"]["code"] == code
        assert set(last.json["error"]) == {"message", "type", "param", "code", *given}
    return before


async def read_to_its_end(conn: Conn) -> Answer:
    await conn.to_the_end()
    (answer,) = conn.answers
    return answer


Cell = Callable[[Daemon, str], Awaitable[None]]


def cell(fault: str, check: Callable[[Daemon, Conn, str], Awaitable[None]]) -> Cell:
    async def runs(daemon: Daemon, route: str) -> None:
        conn = await daemon.connect(request(route, f"X-Mock-Fault: {fault}"))
        await check(daemon, conn, route)

    return runs


def refused_with(status: int, code: str, should_retry: str) -> Callable[[Daemon, Conn, str], Awaitable[None]]:
    async def check(daemon: Daemon, conn: Conn, route: str) -> None:
        answer = await conn.answer()
        assert answer.status == status and answer.whole
        assert answer.get("x-should-retry") == should_retry
        error = error_of(route, answer)
        assert route == "messages" or error["code"] == code
        assert not conn.closed  # an error of this kind keeps the connection

    return check


def cut_off(code: str, *, clean_for: tuple[str, ...] = ()) -> Callable[[Daemon, Conn, str], Awaitable[None]]:
    """The answer breaks off in the middle. On the routes in `clean_for` it still ends properly."""

    async def check(daemon: Daemon, conn: Conn, route: str) -> None:
        if route in clean_for:
            answer = await conn.answer()
            assert answer.status == 200 and answer.whole
        elif route in STREAMED:
            before = check_error_event(route, await read_to_its_end(conn), code)
            assert before, "what came is passed on"
        else:
            answer = await read_to_its_end(conn)
            assert answer.status == 200 and answer.body and not answer.whole

    return check


async def silent_before_the_head(daemon: Daemon, conn: Conn, route: str) -> None:
    await daemon.mock.stats.until(lambda stats: stats.open == 1)
    daemon.later(301)
    await refused_with(504, "upstream_ttft_timeout", "false")(daemon, conn, route)


async def silent_before_the_head_after_the_commit(daemon: Daemon, conn: Conn, route: str) -> None:
    await daemon.mock.stats.until(lambda stats: stats.open == 1)
    daemon.later(11)
    if route in WHOLE:  # only requests for a stream are committed
        daemon.later(301)
        await refused_with(504, "upstream_ttft_timeout", "false")(daemon, conn, route)
        return
    assert (await conn.begun()).status == 200
    daemon.later(301)
    assert check_error_event(route, await read_to_its_end(conn), "upstream_ttft_timeout") == []


async def silent_after_the_head(daemon: Daemon, conn: Conn, route: str) -> None:
    assert (await conn.begun()).status == 200
    daemon.later(301)
    answer = await read_to_its_end(conn)
    if route in STREAMED:
        assert check_error_event(route, answer, "upstream_ttft_timeout") == []
    else:
        assert not answer.whole


async def silent_in_the_middle(daemon: Daemon, conn: Conn, route: str) -> None:
    await conn.until(lambda conn: bool(conn.answers and conn.answers[0].body))
    if route in STREAMED:
        await daemon.until(lambda: all(stream.events >= 3 for stream in daemon.streams))
    daemon.later(121)
    await cut_off("upstream_idle_timeout")(daemon, conn, route)


def passed_on(status: int) -> Callable[[Daemon, Conn, str], Awaitable[None]]:
    async def check(daemon: Daemon, conn: Conn, route: str) -> None:
        answer = await conn.answer()
        assert answer.status == status and answer.whole and answer.get("x-upstream") == "mock"
        assert f"was told to answer {status}" in json.loads(answer.body)["error"]["message"]
        assert answer.get("retry-after") == ("7" if status in (429, 503) else None)
        assert answer.get("x-should-retry") is None

    return check


MATRIX: dict[str, Cell] = {
    "reset in head": cell("reset-in-head", refused_with(502, "upstream_reset", "false")),
    "garbage status line": cell("garbage-status", refused_with(502, "upstream_protocol", "false")),
    "stall before the first byte": cell("stall=0", silent_before_the_head),
    "stall before the first byte, committed": cell("stall=0", silent_before_the_head_after_the_commit),
    "stall after the head": cell("stall=0; early-head", silent_after_the_head),
    "stall after the first byte": cell("stall=3", silent_in_the_middle),
    "reset in mid-stream": cell("break-rst=3", cut_off("upstream_truncated")),
    "reset in mid-event": cell("break-rst=3; half", cut_off("upstream_truncated")),
    "early FIN": cell("break-fin=3", cut_off("upstream_truncated")),
    "early FIN in mid-event": cell("break-fin=3; half", cut_off("upstream_truncated")),
    "early FIN, Content-Length": cell("break-fin=3; content-length", cut_off("upstream_truncated")),
    "early FIN, until close": cell("break-fin=3; until-close", cut_off("upstream_truncated")),
    "bad chunk size": cell("bad-chunk=3", cut_off("upstream_protocol")),
    # Some servers never send it: with a finish_reason on every choice a chat is complete.
    "no [DONE]": cell(
        "no-done", cut_off("upstream_truncated", clean_for=("chat", "completions", "messages", "gemini", *WHOLE))
    ),
    "no [DONE] and no finish_reason": cell("no-finish", cut_off("upstream_truncated", clean_for=tuple(WHOLE))),
    **{f"status {status}": cell(f"status={status}", passed_on(status)) for status in (400, 401, 404, 429, 500, 503)},
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("fault", MATRIX)
def test_each_fault_has_its_answer_on_every_route(fault: str, route: str) -> None:
    async def main() -> None:
        async with serving(**LIMITS) as daemon:
            await MATRIX[fault](daemon, route)

    run(main)


@pytest.mark.parametrize("route", ROUTES)
def test_a_refused_connection_is_a_502_on_every_route(route: str) -> None:
    async def main() -> None:
        with nobody_listens() as url:
            async with serving(upstreams=(UpstreamSettings(name="mock", url=url),), **LIMITS) as daemon:
                conn = await daemon.connect(request(route))
                await refused_with(502, "upstream_unreachable", "true")(daemon, conn, route)

    run(main)


async def run_raw(script: Any, use: Callable[[Daemon, RawUpstream], Awaitable[None]], **settings: Any) -> None:
    async with raw_upstream(script) as upstream:
        async with serving(
            upstreams=(UpstreamSettings(name="raw", url=upstream.url),), **(LIMITS | settings)
        ) as daemon:
            await use(daemon, upstream)
        for _ in range(1000):  # the upstream's side of the connections ends with ours
            if not upstream.open:
                return
            await asyncio.sleep(0.001)
        raise AssertionError("an upstream connection is left behind")


@pytest.mark.parametrize("route", ROUTES)
def test_a_fin_before_the_head_is_a_502_and_is_not_retried(route: str) -> None:
    async def use(daemon: Daemon, upstream: RawUpstream) -> None:
        conn = await daemon.connect(request(route))
        await refused_with(502, "upstream_reset", "false")(daemon, conn, route)
        assert upstream.connections == 1

    run(lambda: run_raw(says(), use))


@pytest.mark.parametrize("route", ROUTES)
def test_a_compressed_answer_passes_unchanged(route: str) -> None:
    payload = b"\x1f\x8b\x08 not really"
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\n"

    async def use(daemon: Daemon, upstream: RawUpstream) -> None:
        answer = await daemon.ask(request(route))
        assert answer.body == payload and answer.whole
        assert answer.get("content-encoding") == "gzip" and answer.get("x-stream-id") is None
        assert b"accept-encoding: identity" in upstream.requests[0]

    run(lambda: run_raw(says(head + b"content-length: %d\r\n\r\n" % len(payload) + payload), use))


def when_told(*pieces: bytes) -> Any:
    async def script(upstream: RawUpstream, reader: Any, writer: Any) -> None:
        await upstream.go.wait()
        await says(*pieces)(upstream, reader, writer)

    return script


@pytest.mark.parametrize("route", STREAMED)
def test_a_committed_stream_is_relayed_to_its_end(route: str) -> None:
    """The mock tests the dialects' own endings; this unfinished stream shows the shape of the error."""

    async def use(daemon: Daemon, upstream: RawUpstream) -> None:
        conn = await daemon.connect(request(route))
        await daemon.until(lambda: upstream.requests)
        daemon.later(11)
        begun = await conn.begun()
        assert begun.status == 200 and begun.get("x-stream-id")
        upstream.go.set()
        answer = await read_to_its_end(conn)
        if route in ("chat", "completions"):
            assert answer.whole and [each.data for each in events_in(answer.body)][-1] == b"[DONE]"
        else:
            last = events_in(answer.body)[-1]
            assert not answer.whole and (last.name == "error" or (route == "gemini" and "error" in last.json))

    pieces = [SSE_HEAD, chunk(b'data: {"sequence_number": 4}\n\n'), chunk(DONE), LAST]
    script = when_told(*pieces)

    async def main() -> None:
        await run_raw(script, use_with_close(use))

    run(main)


def use_with_close(use: Callable[[Daemon, RawUpstream], Awaitable[None]]) -> Callable[[Daemon, RawUpstream], Any]:
    """`use` with requests that ask for `Connection: close`, so that streamd closes the connection at the end."""

    async def wrapped(daemon: Daemon, upstream: RawUpstream) -> None:
        connect = daemon.connect

        async def closing(data: bytes = b"", **options: Any) -> Conn:
            return await connect(data.replace(b"\r\nHost:", b"\r\nConnection: close\r\nHost:", 1), **options)

        daemon.connect = closing  # type: ignore[method-assign]
        await use(daemon, upstream)

    return wrapped


@pytest.mark.parametrize("route", STREAMED)
@pytest.mark.parametrize(
    ("head", "body", "says_so"),
    [
        (b"HTTP/1.1 500 Oops\r\n", b'{"error": {"message": "out of memory"}}', "out of memory"),
        (b"HTTP/1.1 429 Slow\r\nretry-after: 5\r\n", b'{"error": {"message": "slow down"}}', "slow down"),
        (b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n", b"plain", "200: plain"),
    ],
)
def test_an_error_status_after_the_commit_becomes_an_error_event(
    route: str, head: bytes, body: bytes, says_so: str
) -> None:
    async def use(daemon: Daemon, upstream: RawUpstream) -> None:
        conn = await daemon.connect(request(route))
        await daemon.until(lambda: upstream.requests)
        daemon.later(11)
        await conn.begun()
        upstream.go.set()
        answer = await read_to_its_end(conn)
        given = {"status"} if b"200" not in head else set()
        given |= {"retry_after"} if b"retry-after" in head else set()
        assert check_error_event(route, answer, "upstream_refused", given=frozenset(given)) == []
        assert says_so in answer.body.decode()

    run(lambda: run_raw(when_told(head + b"content-length: %d\r\n\r\n" % len(body) + body), use))


def test_the_commit_comes_by_itself() -> None:
    """The only cell in which real time passes: 50 ms, then a sweep."""

    async def use(daemon: Daemon, upstream: RawUpstream) -> None:
        conn = await daemon.connect(request("chat"))
        assert (await conn.begun()).status == 200
        upstream.go.set()
        assert (await conn.answer()).whole

    run(lambda: run_raw(when_told(SSE_HEAD + chunk(event("a"), DONE) + LAST), use, commit_after_s=0.05))
