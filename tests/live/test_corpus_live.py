"""The HTTP corpus over real sockets: each request row on a connection of its own, each response row from an upstream
that sends exactly these bytes. After any row the next request is served."""

from __future__ import annotations

import asyncio
import contextlib
import runpy
from pathlib import Path
from typing import Any

from fakes import Answer, answers_in, get
from loopback import Conn, Daemon, RawUpstream, raw_upstream, run, serving

from streamd.config import UpstreamSettings
from streamd.net import answer as net_answer
from streamd.reasons import CloseReason
from streamd.wire.http1 import RemoteProtocolError

CORPUS = Path(__file__).parent.parent / "corpus"
REQUESTS = runpy.run_path(str(CORPUS / "http_requests.py"))["ROWS"]
RESPONSES = runpy.run_path(str(CORPUS / "http_responses.py"))["ROWS"]
AT_ONCE = 16  # rows that are run at the same time


async def exchanged(conn: Conn, wire: bytes) -> list[Answer]:
    """All answers to the bytes that are sent before a FIN."""
    with contextlib.suppress(ConnectionError):
        await conn.send(wire)
        conn.fin()
    await conn.to_the_end()
    try:
        return answers_in(conn.received)
    except (RemoteProtocolError, AssertionError):  # HEAD, or cut off by our own FIN: the first status is enough
        return answers_in(conn.received.split(b"\r\n\r\n")[0] + b"\r\n\r\n")


async def all_rows(rows: list[Any], check: Any) -> list[str]:
    """Run `check(row)` for all rows, and return the names of the faulty rows."""
    gate = asyncio.Semaphore(AT_ONCE)
    wrong: list[str] = []

    async def one(row: Any) -> None:
        async with gate:
            fault = await check(row)
            if fault:
                wrong.append(f"{row[0]}: {fault}")

    await asyncio.gather(*[one(row) for row in rows])
    return wrong


def at_once(answer: net_answer.Answer) -> None:
    answer.send(204)


async def check_request(d: Daemon, row: Any) -> str:
    _, wire, _, expected = row
    conn = await d.connect()
    answers = await exchanged(conn, wire)
    statuses = [answer.status for answer in answers]
    refusals = [status for status in statuses if status not in (200, 204, 404, 405)]
    if isinstance(expected, int):
        last = answers[-1] if answers else None
        if last is None or last.status != expected:
            return f"{statuses} in place of {expected}"
        if last.body and set(last.error) != {"message", "type", "param", "code"}:
            return "no error object"
    elif expected == "close" and statuses:
        return f"{statuses} for a request that is not whole"
    elif expected == "accept" and (refusals or (not statuses and b"HTTP/" in wire)):
        return f"{statuses} for well-formed requests"
    return "" if (await d.ask(get())).status == 204 else "the next request is not served"


def test_every_request_row_gets_its_status() -> None:
    async def main() -> None:
        async with serving(insecure_public=True) as d:  # rows have every kind of Host
            # What goes upstream is answered here: rows are about what is a request, and their FIN would cancel it.
            application = d.worker.application
            plan = application.plan

            def planned(answer: net_answer.Answer) -> Any:
                made = plan(answer)
                return made if made.take_body else type(made)(answer=at_once)

            application.plan = planned
            assert await all_rows(REQUESTS, lambda row: check_request(d, row)) == []
            assert d.runtime.bodies_bytes == 0
            await d.until(lambda: len(d.runtime.clients) == 0)
            ours = {CloseReason.INTERNAL, CloseReason.STALLED}
            assert not any(d.runtime.counters.connections_closed[reason] for reason in ours)

    run(main)


def verdict(answer: Answer) -> int | str:
    """How a reader judges an answer; a "surplus" is not visible to it."""
    if answer.status == 502:  # no row has this status of its own
        return 502
    return "accept" if answer.whole else "close"


async def check_response(d: Daemon, upstream: RawUpstream, row: Any) -> str:
    name, method, _, _, expected = row
    conn = await d.connect(get("/v1/row", f"X-Row: {name.encode().hex()}", method=method), method=method)
    answer = await conn.answer()
    closed_wrong = answer.whole and expected == "close"
    found = verdict(answer)
    wanted = "accept" if expected == "surplus" else expected
    if closed_wrong or found != wanted:
        return f"{found} ({answer.status}, whole: {answer.whole}) in place of {expected}"
    if b"forged" in conn.received:
        return "a forged answer got through"
    conn.close()
    return ""


def test_every_response_row_gets_its_verdict() -> None:
    by_name = {row[0]: row for row in RESPONSES}

    async def script(upstream: RawUpstream, reader: Any, writer: Any) -> None:
        head = upstream.requests[-1]
        row = bytes.fromhex(head.split(b"x-row: ")[1].split(b"\r\n")[0].decode()).decode()
        writer.write(by_name[row][2])
        await writer.drain()

    async def main() -> None:
        async with (
            raw_upstream(script) as upstream,
            serving(upstreams=(UpstreamSettings(name="raw", url=upstream.url),), pool_idle_timeout_s=0.0) as d,
        ):
            wrong = [fault for row in RESPONSES if (fault := await check_response(d, upstream, row))]
            assert wrong == []
            assert upstream.connections == len(RESPONSES)

    run(main)
