"""Any stream of events in any cut, framing and line ends: the reader gets the same bytes, with the right seqs."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
from fakes import CHAT, SSE_HEAD, Client, Rig, events_in, get, post, rig
from hypothesis import assume, given
from hypothesis import strategies as st
from loopback import Daemon, raw_upstream, run, says, serving

from streamd.config import UpstreamSettings
from streamd.mockllm import MockOptions
from streamd.wire.chunked import LAST_CHUNK
from streamd.wire.sse import first_has_id

BOM = b"\xef\xbb\xbf"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"

# A line may hold anything except a line end. Texts that look like fields and structure are preferred.
text = st.one_of(
    st.binary(max_size=12).map(lambda raw: raw.translate(None, b"\r\n")),
    st.text(max_size=12).map(lambda said: said.encode().translate(None, b"\r\n")),
    st.sampled_from(
        [b"", b" ", b":", b"data: x", b"[DONE]", b'{"delta":"a"}', b'{"choices":[]}', BOM, b"\0", b"id: 1"]
    ),
)
line = st.builds(
    lambda field, rest: field + rest,
    st.sampled_from([b"data: ", b"data:", b"event: ", b"id: ", b"id:", b": ", b":", b"retry: ", b"x: ", b"datax"]),
    text,
) | st.sampled_from([b"data", b"id", b"retry", b"event", b":"])
block = st.lists(line, min_size=1, max_size=4)


@dataclass
class Sent:
    """The bytes of an upstream: blocks of lines, and the way they are cut up."""

    blocks: list[list[bytes]]
    line_ends: list[bytes]  # per block: a mixture within a block would be ambiguous (CR, then LF)
    blanks: list[int]  # blank lines after each block, at least 1
    bom: bool
    cut_short: int  # line ends left out at the very end: 0, 1, 2
    framing: str
    chunk_sizes: list[int]
    read_sizes: list[int]

    @property
    def body(self) -> bytes:
        out = [BOM] if self.bom else []
        for lines, end, blanks in zip(self.blocks, self.line_ends, self.blanks, strict=True):
            out.append(b"".join(each + end for each in lines) + end * blanks)
        body = b"".join(out)
        if self.blocks:
            body = body[: len(body) - len(self.line_ends[-1]) * min(self.cut_short, self.blanks[-1] + 1)]
        return body

    def wire(self) -> bytes:
        if self.framing == "length":
            return HEAD + b"content-length: %d\r\n\r\n" % len(self.body) + self.body
        if self.framing == "until close":
            return HEAD + b"\r\n" + self.body
        chunks = [b"%x%b\r\n%b\r\n" % (len(p), b";a=b" if len(p) % 3 == 0 else b"", p) for p in self.chunks()]
        return SSE_HEAD + b"".join(chunks) + LAST_CHUNK

    def chunks(self) -> list[bytes]:
        return pieces(self.body, self.chunk_sizes)

    def expected(self, stream_id: str) -> bytes:
        """The bytes for a reader, by a second implementation of the four rules of docs/PROTOCOL.md, section 3."""
        out: list[bytes] = []
        seq = 0
        for lines in self.blocks:
            if any(each == b"data" or each.startswith(b"data:") for each in lines):
                seq += 1
                kept = [each for each in lines if each.partition(b":")[0] not in (b"id", b"retry")]
                out.append(f"id: {stream_id}:{seq}\n".encode() + b"".join(each + b"\n" for each in kept) + b"\n")
            else:
                out += [each + b"\n" for each in lines if each.startswith(b":")]
        return b"".join(out)


def pieces(whole: bytes, sizes: list[int]) -> list[bytes]:
    """Cut `whole` into pieces of these sizes, repeating the list of sizes."""
    out, start, k = [], 0, 0
    while start < len(whole):
        size = sizes[k % len(sizes)]
        out.append(whole[start : start + size])
        start, k = start + size, k + 1
    return out


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=5) | st.just([1]) | st.just([100_000])


@st.composite
def streams(draw: st.DrawFn) -> Sent:
    blocks = draw(st.lists(block, max_size=8))
    count = len(blocks)
    return Sent(
        blocks,
        draw(st.lists(st.sampled_from([b"\n", b"\r\n", b"\r"]), min_size=count, max_size=count)),
        draw(st.lists(st.integers(1, 3), min_size=count, max_size=count)),
        draw(st.booleans()),
        draw(st.integers(0, 2)),
        draw(st.sampled_from(["chunked", "length", "until close"])),
        draw(sizes),
        draw(sizes),
    )


def relayed(r: Rig, sent: Sent) -> Client:
    client = r.client(get("/v1/of/no/known/dialect"))
    for piece in pieces(sent.wire(), sent.read_sizes):
        r.link.feed(piece)
    if sent.framing == "until close":
        r.link.fin()
    r.turn()
    return client


@given(streams())
def test_a_stream_in_any_cut_reaches_the_reader_unchanged(sent: Sent) -> None:
    # A BOM after a BOM is text, but a first line that begins with a BOM looks like the stream's own BOM.
    if sent.blocks and sent.blocks[0][0].startswith(BOM) and not sent.bom:
        sent.bom = True
    assume(first_has_id(sent.body + b"\n\n") is not True)  # its ids stay: tests/net/test_first_event.py
    with rig() as r:
        client = relayed(r, sent)
        answer = client.answer
        retry, rest = answer.body.split(b"\n", 1)
        assert retry.startswith(b"retry: ")
        expected = sent.expected(answer.get("x-stream-id") or "")
        has_event = expected.startswith(b"id: ") or b"\nid: " in expected
        assert answer.whole == has_event, "a stream without an event is never complete"
        assert rest == expected if has_event else rest.startswith(expected)


@given(streams(), st.integers(1, 9))
def test_a_second_reader_gets_the_same_events(sent: Sent, first: int) -> None:
    assume(first_has_id(sent.body + b"\n\n") is not True)
    with rig() as r:
        client = relayed(r, sent)
        events = events_in(client.answer.body)
        other = r.client(get(f"/v1/streams/{client.answer.get('x-stream-id')}?from={first}"))
        if first > len(events):
            assert other.answer.status == 204
            return
        again = events_in(other.answer.body)
        assert [each.id for each in again] == [each.id for each in events[first - 1 :]]
        assert [each.data for each in again] == [each.data for each in events[first - 1 :]]


ODDITIES = (
    "cuts=1",
    "cuts=2; crlf",
    "cuts=3; cr; comments; ids; retry; bom",
    "bytewise",
    "content-length; cuts=4",
    "until-close; cuts=5; no-blank",
    "comments; ids; retry",
)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"model": "m", "stream": True, "prompt": "Say"}),
        ("/v1/responses", {"model": "m", "stream": True, "input": "Say"}),
        ("/v1/messages", {**CHAT, "max_tokens": 99}),
        ("/v1beta/models/m:streamGenerateContent?alt=sse", {"contents": [{"parts": [{"text": "Say"}]}]}),
    ],
)
def test_the_events_do_not_show_an_upstreams_oddities(path: str, body: dict[str, object]) -> None:
    async def main() -> None:
        async with serving(MockOptions(interval_s=0, ttft_s=0, tokens=12)) as d:
            told = []
            for fault in ("", *ODDITIES):
                answer = await d.ask(post(body, "Accept: text/event-stream", f"X-Mock-Fault: {fault}", path=path))
                assert answer.whole
                events = events_in(answer.body)
                assert [each.seq for each in events] == list(range(1, len(events) + 1))
                told.append([(each.name, stable(each.data)) for each in events])
            assert all(each == told[0] for each in told)

    run(main)


def stable(data: bytes) -> bytes:
    """Without what counts generations or is the time of day."""
    return re.sub(
        rb'"(id|item_id|created|created_at|response_id|responseId|completed_at)":("[^"]*"|[0-9.]+)', b"", data
    )


def test_a_large_event_and_many_small_events_in_one_piece_are_relayed() -> None:
    body = b"data: " + b"x" * 900_000 + b"\n\n" + b"".join(b"data: %d\n\n" % n for n in range(5000))

    async def main() -> None:
        wire = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
        async with (
            raw_upstream(says(wire)) as upstream,
            serving(upstreams=(UpstreamSettings(name="raw", url=upstream.url),)) as d,
        ):
            await check(d)

    async def check(d: Daemon) -> None:
        answer = await d.ask(get("/v1/other"))
        events = events_in(answer.body)
        assert answer.whole and events[-1].data == b"4999" and events[-1].seq == 5001
        assert len(events[0].data) == 900_000

    run(main)
