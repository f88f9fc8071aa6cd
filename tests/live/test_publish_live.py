"""Publishing and the dialects' own resumes over real sockets: curl types and curl reads, cuts, the openai SDK."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from fakes import CHAT, LAST, chunk, events_in, get, post, text_of
from loopback import Daemon, run, serving
from tools import needs

from streamd.core.stream import DIRECT_READERS_MAX
from streamd.mockllm import MockOptions

LINES = "Content-Type: application/x-ndjson"
PACED = MockOptions(interval_s=0.002, ttft_s=0, tokens=40)


async def open_stream(d: Daemon, name: str = "n") -> None:
    answer = await d.ask(get(f"/v1/streams/{name}", "Content-Length: 0", method="PUT"))
    assert answer.status == 201


def begin(*fields: str, name: str = "n", query: str = "") -> bytes:
    return get(f"/v1/streams/{name}/events{query}", LINES, "Transfer-Encoding: chunked", *fields, method="POST")


async def last_seq(d: Daemon) -> int:
    answer = await d.ask(get("/v1/streams/n", "Accept: application/json"))
    found: int = json.loads(answer.body)["last_seq"]
    return found


@asynccontextmanager
async def curl(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        "curl", "-sSN", *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@needs("curl")
@pytest.mark.parametrize("expect", [(), ("-H", "Expect:")], ids=["asks first", "doesn't ask"])
def test_curl_types_and_curl_reads(expect: tuple[str, ...]) -> None:
    async def main() -> None:
        async with serving() as d:
            await open_stream(d)
            url = f"http://127.0.0.1:{d.port}/v1/streams/n"
            async with curl(url) as reads, curl("-T", "-", *expect, f"{url}/events?seal=finished") as types:
                assert types.stdin is not None
                assert reads.stdout is not None
                said = ""
                for line in ("Hello,\n", "wörld\n"):
                    types.stdin.write(line.encode())
                    await types.stdin.drain()
                    while not said.endswith("\n"):  # read before the next is typed
                        event = (await reads.stdout.readuntil(b"\n\n")).decode()
                        said += json.loads(event.partition("data: ")[2])["delta"]
                    assert said == line
                    said = ""
                types.stdin.close()
                assert await reads.stdout.read() == b""
                assert (await types.wait(), await reads.wait()) == (0, 0)

    run(main)


def test_a_publisher_cut_in_mid_request_goes_on_exactly() -> None:
    async def main() -> None:
        async with serving() as d:
            await open_stream(d)
            reader = await d.connect(get("/v1/streams/n"))
            lines = [b'{"n":%d}\n' % k for k in range(60)]
            sent = 0
            for cut_at in (13, 100, 7, 211):
                publisher = await d.connect(begin(f"Expected-Seq: {sent}"))
                rest = b"".join(lines[sent:])
                await publisher.send(chunk(rest[:cut_at]))
                whole = rest[:cut_at].count(b"\n")
                await d.until(lambda known=sent + whole: d.streams[0].events == known)
                publisher.abort()
                sent = await last_seq(d)
            await d.ask(begin(f"Expected-Seq: {sent}", query="?seal=finished") + chunk(b"".join(lines[sent:])) + LAST)
            answer = await reader.answer()
            assert answer.whole
            assert [each.json["n"] for each in events_in(answer.body)] == list(range(60))

    run(main)


def test_a_crowd_of_readers_does_not_delay_other_requests() -> None:
    async def main() -> None:
        async with serving() as d:
            await open_stream(d)
            readers = [await d.connect(get("/v1/streams/n")) for _ in range(DIRECT_READERS_MAX * 2)]
            publisher = await d.connect(begin(query="?seal=finished"))
            await d.until(lambda: len(d.streams[0].readers) == len(readers))
            for k in range(20):
                await publisher.send(chunk(b'{"n":%d}\n' % k))
                assert (await d.ask(get("/healthz"))).status == 200
                if k == 10:
                    readers.pop().abort()
            await publisher.send(LAST)
            for reader in readers:
                answer = await reader.answer()
                assert answer.whole
                assert [each.seq for each in events_in(answer.body)] == list(range(1, 21))

    run(main)


def test_a_conversation_survives_cuts_anywhere() -> None:
    async def main() -> None:
        async with serving(PACED) as d:
            first = await d.connect(post(CHAT, "X-Conversation-Id: c"))
            got = b""
            conn = first
            while True:
                enough = 700 + 13 * (len(got) % 97)
                answer = await conn.begun()
                while not answer.whole and len(answer.body) < enough:
                    await conn.read(211)
                    answer = conn.answers[0]
                got += answer.body
                if answer.whole:
                    break
                conn.abort()
                conn = await d.connect(get(f"/v1/stream?conv_id=c&from={len(got)}"))
            whole = await d.ask(get("/v1/stream?conv_id=c&from=0"))
            assert got == whole.body
            assert text_of(events_in(got))
            assert got.endswith(b"data: [DONE]\n\n")
            found = await d.ask(post({"conversation_ids": ["c"]}, path="/v1/streams/lookup"))
            assert json.loads(found.body)[0]["total_bytes"] == len(got)
            assert d.mock.stats.requests.total() == 1

    run(main)


def said_by(events: list[Any]) -> str:
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


def test_the_openai_sdk_resumes_a_response_by_its_number() -> None:
    async def main() -> None:
        async with serving(PACED) as d:
            client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{d.port}/v1", api_key="x", max_retries=0)
            async with client:
                asked = await client.responses.create(model="mock-llm", input="Hello", stream=True)
                seen, response_id = [], ""
                async for event in asked:
                    seen.append(event)
                    if event.type == "response.created":
                        response_id = event.response.id
                middle = next(event for event in seen[20:] if event.type == "response.output_text.delta")
                for start in (seen.index(middle), len(seen) - 1):
                    expected = seen[start + 1 :]
                    after = seen[start].sequence_number
                    again = await client.responses.retrieve(response_id, stream=True, starting_after=after)
                    events = [event async for event in again]
                    assert said_by(events) == said_by(expected)
                    assert [event.type for event in events[-1:]] == [event.type for event in expected[-1:]]
                assert d.mock.stats.requests.total() == 1

    run(main)
