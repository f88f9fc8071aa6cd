"""A reader over a plain socket that resumes by id, and reports the end of its stream. HTTP/1.0: the body is not framed.

The expected text comes from the upstream itself, without streamd in between.
"""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import json
import random
from typing import Any

TRIES_MAX = 200  # per reader; with pauses of 0.05 to 0.25 s that is half a minute
ENDS = ("complete", "error", "lost")


@dataclasses.dataclass
class Outcome:
    """The end of a reader's stream and its text."""

    end: str = "lost"  # of ENDS: the text was complete, an error event gave the reason, or neither
    text: str = ""
    error: dict[str, Any] | None = None
    refused: int = 0  # connections without a listener
    refused_politely: int = 0  # answers with 503
    resumes: int = 0
    gaps: int = 0
    ids: list[str] = dataclasses.field(default_factory=list)


def whole_text(mock_port: int, seed: int, tokens: int) -> str:
    """The mock upstream's text for this seed, asked directly."""
    connection = http.client.HTTPConnection("127.0.0.1", mock_port, timeout=60)
    headers = {"Content-Type": "application/json", "X-Mock-Text-Seed": str(seed), "X-Mock-Tokens": str(tokens)}
    connection.request(
        "POST",
        "/v1/chat/completions",
        _body(stream=False),
        headers | {"X-Mock-Ttft-Ms": "0", "X-Mock-Interval-Ms": "0"},
    )
    content = json.loads(connection.getresponse().read())["choices"][0]["message"]["content"]
    connection.close()
    assert isinstance(content, str)
    return content


async def read(port: int, *, seed: int, tokens: int, interval_ms: int, resume: bool = True) -> Outcome:
    """Ask for a generation and read it to its end; after a cut resume with the last id, if `resume` holds."""
    outcome = Outcome()
    head = f"X-Mock-Text-Seed: {seed}\r\nX-Mock-Tokens: {tokens}\r\nX-Mock-Interval-Ms: {interval_ms}\r\n"
    body = _body(stream=True)
    request = f"POST /v1/chat/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n{head}"
    status = 503
    while status == 503 and outcome.refused_politely < TRIES_MAX:
        status = await answer(port, f"{request}Content-Length: {len(body)}\r\n\r\n{body}", outcome)
        if status == 503:
            outcome.refused_politely += 1
            await asyncio.sleep(random.uniform(0.5, 1.5))  # sooner than Retry-After, so that the test is harder
    for _ in range(TRIES_MAX if resume else 0):
        if outcome.end != "lost" or not outcome.ids or status in (204, 404, 410):
            break
        await asyncio.sleep(random.uniform(0.05, 0.25))
        last_id = outcome.ids[-1]
        head = f"Accept: text/event-stream\r\nLast-Event-ID: {last_id}\r\n"
        outcome.resumes += 1
        status = await answer(
            port, f"GET /v1/streams/{last_id.split(':')[0]} HTTP/1.0\r\nHost: localhost\r\n{head}\r\n", outcome
        )
    return outcome


async def answer(port: int, request: str, outcome: Outcome) -> int:
    """Send a request on a new connection, read to its end into `outcome`; return the status (0 without an answer)."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        outcome.refused += 1
        return 0
    try:
        writer.write(request.encode())
        status_line = await reader.readline()
        status = int(status_line.split()[1]) if status_line else 0
        while (await reader.readline()).strip():
            pass
        if status == 200:
            await _events(reader, outcome)
        return status
    except (ConnectionError, asyncio.IncompleteReadError):
        return 0
    finally:
        writer.close()


async def _events(reader: asyncio.StreamReader, outcome: Outcome) -> None:
    event: dict[str, str] = {}
    while line := (await reader.readline()).decode():
        name, _, value = line.rstrip("\n").partition(":")
        if name:
            event[name] = value.removeprefix(" ")
        elif line == "\n":
            _take(event, outcome)
            event = {}


def _take(event: dict[str, str], outcome: Outcome) -> None:
    if "id" in event:
        outcome.ids.append(event["id"])
    if event.get("data") == "[DONE]":
        outcome.end = "complete"
        return
    told = json.loads(event.get("data", "{}"))
    if "gap" in told:
        outcome.gaps += 1
    for choice in told.get("choices", ()):
        outcome.text += choice.get("delta", {}).get("content") or ""
    if "error" in told and event.get("event") != "reconnect":
        outcome.end, outcome.error = "error", told["error"]


def _body(*, stream: bool) -> str:
    return json.dumps({"model": "mock-llm", "stream": stream, "messages": [{"role": "user", "content": "hello"}]})
