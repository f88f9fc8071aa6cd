"""The targets of the fuzzers: functions that take any bytes, check the outcome, and raise only for a finding.

    request_path    a ClientConnection with all routes behind it, over a transport with a capacity from the input;
                    the bytes after FOUR_FF are the upstream's answer
    quick_head      the quick path for heads reads a head as the gates and h11 do, or leaves it to them
    chunked         the chunked decoder: cuts don't change the outcome
    sse             the event splitter: cuts don't change the outcome, and its output splits into itself
    json_scan       the scan of JSON: cuts don't change the outcome, and it takes what orjson takes and finds the same
    replay_log      the replay log: events come back byte for byte, coalesced text is the same text
    log_record      records of a log's copy: refused, or readable to their end, and cuts don't change the copy
    state           kept streams of another process: refused, or readable to their end
    handover        records that another process hands over: refused, or the parser or stream goes on

An AssertionError, or any other exception, is a finding. This module doesn't depend on atheris: tests/test_fuzz.py runs
the same functions over the corpus and some mutations of it.
"""

from __future__ import annotations

import contextlib
import json
import runpy
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import orjson
from fakes import CHAT, DONE, LAST, SSE_HEAD, Client, Rig, chunk, event, get, post

from streamd.core import snapshot
from streamd.core.hub import Hub
from streamd.core.log_record import pack, unpack
from streamd.core.replay import Mark, ReplayLog
from streamd.core.stream import Form, ReaderPlace, Stream
from streamd.daemon import logs
from streamd.handover import wire_kinds
from streamd.handover.clients import CLIENT
from streamd.handover.exchanges import EXCHANGE
from streamd.handover.record import pack as pack_for_handover
from streamd.handover.record import unpack as unpack_handed_over
from streamd.handover.requests import REQUEST
from streamd.handover.streams import READER, STREAM, StreamState, land_stream, stream_state
from streamd.handover.upstreams import UPSTREAM
from streamd.handover.values import RecordError
from streamd.policy import Policy
from streamd.reasons import CloseReason
from streamd.wire.chunked import ChunkedDecoder, LengthState, UntilCloseState, decoder_of
from streamd.wire.dialect import Dialect
from streamd.wire.dialects.api import Progress
from streamd.wire.heads import HEAD_LIMITS
from streamd.wire.http1 import HeadReader, RemoteProtocolError, judged_request, judged_response
from streamd.wire.inner import InnerState, SentAway
from streamd.wire.json_lines import LinesState
from streamd.wire.json_scan import JsonError, JsonScan, Watched, scan_slowly
from streamd.wire.quick_head import quick_request, quick_response, whole_head
from streamd.wire.splitters import splitter_of
from streamd.wire.sse import Edge, EventSplitter, EventTooLarge, SplitterState

FOUR_FF = b"\xff\xff\xff\xff"
CORPUS = Path(__file__).parent / "corpus"
TABLES = Path(__file__).parents[1] / "tests" / "corpus"

Target = Callable[[bytes], None]


def cut(data: bytes, size: int) -> Iterator[bytes]:
    """The data in reads of that size; 0: all in one."""
    for start in range(0, len(data), size or len(data) or 1):
        yield data[start : start + (size or len(data))]


# -- a connection


class RequestPath:
    """A lasting Worker with a new connection for each input; no input may leave anything behind."""

    def __init__(self) -> None:
        self._rig: Rig | None = None

    def __call__(self, data: bytes) -> None:
        if len(data) < 2:
            return
        r = self._rig = self._rig or Rig(head_bytes_max=4096, pipeline_bytes_max=2048, body_bytes_max=8192)
        logs.set_level("error")
        theirs, _, answer = data[2:].partition(FOUR_FF)
        client = Client(r, capacity=PLENTY_OR.get(data[1], data[1] * 64))
        for piece in cut(theirs, data[0]):
            client.send(piece)
        for link in tuple(r.links):
            for piece in cut(answer, data[0]):
                if link.reading:  # else its reader is slow, and the rest waits in the kernel
                    link.feed(piece)
                    r.turn()
            link.fin()
        r.turn()
        check_output(client.raw)
        client.reset()
        self._clean(r)

    def _clean(self, r: Rig) -> None:
        """Remove the state that may outlive a connection, and check that there is no other."""
        runtime = r.runtime
        for stream in tuple(runtime.hub):
            stream.cancel(CloseReason.CANCELLED, runtime.time(), message="over")
            runtime.hub.remove(stream)
        r.turn()
        assert r.bugs == [], r.bugs
        assert not runtime.clients and runtime.bodies_bytes == 0 and runtime.hub.log_bytes == 0
        assert [upstream.in_flight for upstream in r.worker.upstreams] == [0]
        in_use: Any = runtime.admission.status()["in_use"]
        assert in_use["connections"] == in_use["streams"] == in_use["upstream"] == 0, in_use
        for upstream in r.worker.upstreams:
            upstream.close_idle()
        r.turn()
        assert len(runtime.sweep) == 0, runtime.sweep._members
        for kept_list in (r.links, r.dialled, r.ended):
            kept_list.clear()


PLENTY_OR = {0: 1 << 60, 1: 0}


def check_output(raw: bytes) -> None:
    """Check that the output begins like an answer and has no internal error."""
    assert not raw or raw.startswith(b"HTTP/1.1 "[: len(raw)]), raw[:100]
    assert b"HTTP/1.1 500" not in raw, raw


# -- pure parts


def quick_head(data: bytes) -> None:
    """A head of a request or of an answer, with any bytes behind it."""
    head = data[: whole_head(data, HEAD_LIMITS)]
    asked = quick_request(head, HEAD_LIMITS)
    assert asked is None or asked == judged_request(head)
    for method in ("GET", "HEAD"):
        answered = quick_response(head, method, HEAD_LIMITS)
        assert answered is None or answered == judged_response(head, method)


def chunked(data: bytes) -> None:
    """The first byte is the size of the cuts."""
    if data:
        assert decoded(data[1:], 0) == decoded(data[1:], data[0]) == decoded(data[1:], 1)


def decoded(wire: bytes, size: int) -> tuple[bytes, bool, bytes] | None:
    """The body, whether it is whole, and the bytes after it; None if it was refused."""
    decoder, body, rest = ChunkedDecoder(), b"", b""
    try:
        for piece in cut(wire, size):
            if decoder.done:
                rest += piece
                continue
            body += b"".join(decoder.feed(piece))
            if decoder.done:
                rest += decoder.rest
    except RemoteProtocolError:
        return None  # the payload before a mistake depends on the cut, and so may its code
    assert len(body) + len(rest) <= len(wire)
    return body, decoder.done, rest


EVENT_BYTES_MAX = 2048
FIRST = b"data: 0\n\n"  # put before bytes that may look like a BOM: only the first bytes of a stream are a BOM


def sse(data: bytes) -> None:
    """The first byte is the size of the cuts."""
    if not data:
        return
    whole, cuts = split(data[1:], 0), split(data[1:], data[0] or 1)
    if whole is None or cuts is None:
        return  # an event over its size: refused sooner or later
    assert whole == cuts
    for piece in whole:
        assert b"\r" not in piece and piece.endswith(b"\n")
        assert piece.find(b"\n\n") in (-1, len(piece) - 2)
    events = [FIRST, *(piece for piece in whole if piece.endswith(b"\n\n"))]
    assert split(b"".join(events), 0) == events


WATCHED = Watched(
    {
        "model": None,
        "stream": None,
        "requests": Watched(elements=Watched({"model": None})),
        "generateContentRequest": Watched({"model": None}),
    }
)


FLAT = Watched({"model": None, "stream": None, "store": None})


def json_scan(data: bytes) -> None:
    """The first byte is the size of the cuts."""
    if not data:
        return
    text = data[1:]
    whole, cuts = scanned(text, len(text) + 1), scanned(text, data[0] or 1)
    assert outcome(whole) == outcome(cuts)
    assert FLAT.quick is not None
    quick = FLAT.quick.read(text)
    if quick is not None:
        assert repr(sorted(scan_slowly(text, FLAT).fields(text).items())) == repr(sorted(quick.items()))
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return  # the inside of strings too, which the scan leaves to the server
    if isinstance(whole, JsonError):
        assert whole.code != "bad_json" or b"1" * 100 in text
        return
    expected = value.get("model") if isinstance(value, dict) else None
    found = [each for each in whole.found if each.name == "model" and each.depth == 1]
    assert [orjson.loads(text[each.start : each.end]) for each in found] == ([expected] if found else [])
    assert bool(found) is (isinstance(value, dict) and "model" in value)


def scanned(text: bytes, size: int) -> JsonScan | JsonError:
    """The scan of a text that comes in pieces of `size` bytes, or the refusal."""
    scan, held = JsonScan(WATCHED), bytearray()
    try:
        for piece in cut(text, size):
            held += piece
            scan.feed(held)
        scan.feed(held, last=True)
    except JsonError as refused:
        return refused
    return scan


def outcome(scan: JsonScan | JsonError) -> object:
    return scan.code if isinstance(scan, JsonError) else (scan.found, scan.values, scan.containers)


def split(wire: bytes, size: int) -> list[bytes] | None:
    """The events; None if an event is over its size."""
    splitter = EventSplitter(event_bytes_max=EVENT_BYTES_MAX)
    pieces: list[bytes] = []
    try:
        for piece in cut(wire, size):
            pieces += splitter.feed(piece)
            assert splitter.pending <= EVENT_BYTES_MAX
        return pieces + splitter.finish()
    except EventTooLarge:
        return None


def replay_log(data: bytes) -> None:
    """The first byte sets the interval between trims of the log."""
    events = [each for each in split(data[1:], 0) or [] if each.endswith(b"\n\n")]
    if not events:
        return
    log = ReplayLog(bytes_max=1 << 20, events_max=1000)
    for number, each in enumerate(events):
        log.append(each)
        if data[0] and number % data[0] == data[0] - 1:
            log.trim_to(log.bytes_held // 2)
    check_log(log, events)
    check_log(ReplayLog.of_parts(log.parts(), bytes_max=1 << 20, events_max=1000), events)


def check_log(log: ReplayLog, events: list[bytes]) -> None:
    cursor = log.seek(log.seq_first)
    read = log.read(cursor, bytes_max=1 << 30)
    assert [each for _, each in read] == events[log.seq_first - 1 :]
    assert [seq for seq, _ in read] == list(range(log.seq_first, log.seq_next))
    coalesced: list[tuple[int, bytes]] = []
    cursor = log.seek(log.seq_first)
    while more := log.read_coalesced(cursor, bytes_max=512):
        coalesced += more
    seqs = [seq for seq, _ in coalesced]
    assert seqs == sorted(set(seqs)) and (not seqs or seqs[-1] == log.seq_next - 1)
    assert texts(each for _, each in coalesced) == texts(each for _, each in read)


def texts(events: Iterator[bytes]) -> dict[str, str]:
    """The texts of the chat deltas, by choice; other shapes are ignored."""
    said: dict[str, str] = {}
    for each in events:
        try:
            for choice in json.loads(each.removeprefix(b"data:"))["choices"]:
                index, text = json.dumps(choice["index"]), choice["delta"]["content"]
                said[index] = said.get(index, "") + text
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return {index: text.encode("utf-16", "surrogatepass").hex() for index, text in said.items() if text}


def log_record(data: bytes) -> None:
    """The first byte sets the size of the good records; the input is the events of a log, and a record behind it."""
    if not data:
        return
    events = [each for each in split(data[1:], 0) or [] if each.endswith(b"\n\n")]
    log, copy = ReplayLog(bytes_max=1 << 20, events_max=1000), ReplayLog(bytes_max=1 << 20, events_max=1000)
    mark = log.mark_at_start()
    for each in events:
        log.append(each)
        if len(each) % 3 == 0:
            follow(copy, log, mark, data[0])
    follow(copy, log, mark, data[0])
    assert copy.parts() == log.parts()
    last = copy.seq_next - 1
    for wire in (data[1:], data[2:], b"\0\1" + data[1:]):
        for seq_last in (last + 1, last + 2, last + 9):
            try:
                copy.extend(unpack(wire, seq_last))
            except ValueError:
                continue
    copy.append(b"data: more\n\n")
    cursor = copy.seek(copy.seq_first)
    while copy.read(cursor, bytes_max=4096):
        pass
    assert cursor.seq == copy.seq_next
    cursor = copy.seek(copy.seq_first)
    while copy.read_coalesced(cursor, bytes_max=4096):
        pass
    assert cursor.seq == copy.seq_next


def follow(copy: ReplayLog, log: ReplayLog, mark: Mark, bytes_max: int) -> None:
    while record := log.since(mark, bytes_max=bytes_max * 16):
        wire = pack(record)
        again = unpack(wire, record.seq_last)
        assert pack(again) == wire and again == record
        copy.extend(again)


def state(data: bytes) -> None:
    """As a file, and as the body of a record with a right checksum: accepted streams can be read to their end."""
    restored(data)
    header = snapshot._HEADER.pack(snapshot.MAGIC, snapshot.VERSION, b"12345678", 1.0)
    restored(header + snapshot._record(b"S", data) + snapshot._record(b"E", b"\0\0\0\1"))


def restored(wire: bytes) -> None:
    position = 0

    def read(count: int) -> bytes:
        nonlocal position
        taken = wire[position : position + count]
        position += len(taken)
        return taken

    try:
        snapshot.read_header(read)
        streams = list(snapshot.load(read))
    except snapshot.StateError:
        return
    hub = new_hub()
    for each in streams:
        stream = snapshot.restore(hub, each, 10.0, each.facts.sealed_unix + 1)
        if stream is not None:
            log, cursor = stream.log, stream.log.seek(stream.log.seq_first)
            while log.read(cursor, bytes_max=4096):
                pass
            assert cursor.seq == log.seq_next
            cursor = log.seek(log.seq_first)
            while log.read_coalesced(cursor, bytes_max=4096):
                pass
            log.append(b"data: more\n\n")


def handover(data: bytes) -> None:
    """A record, with further bytes for its parser behind the last FOUR_FF: the same as without the record's way."""
    wire, _, more = data.rpartition(FOUR_FF)
    size, strays = EVENT_BYTES_MAX, NoStrays()
    for kind, go_on in (
        (wire_kinds.DECODER, decoder_of),
        (
            wire_kinds.SPLITTER,
            lambda state: splitter_of(state, Dialect.CHAT.api, event_bytes_max=size, strays=strays),
        ),
        (wire_kinds.HEAD, head_reader_of),
        (wire_kinds.PROGRESS, progress_of),
    ):
        try:
            state = unpack_handed_over(kind, wire)
            one, two = go_on(state), go_on(state)
        except ValueError:
            continue
        assert unpack_handed_over(kind, pack_for_handover(kind, state)) == state
        assert told(one, more, 0) == told(two, more, 3), state
    for kind in (STREAM, READER, CLIENT, UPSTREAM, EXCHANGE, REQUEST):
        with contextlib.suppress(RecordError):
            state = unpack_handed_over(kind, wire)
            assert unpack_handed_over(kind, pack_for_handover(kind, state)) == state
            if isinstance(state, StreamState):
                landed(state)


def landed(state: StreamState) -> None:
    """A stream that lands can be read to its end and goes on; else nothing is left of it."""
    hub = new_hub()
    try:
        stream = land_stream(hub, state)
    except ValueError:
        assert len(hub) == hub.log_bytes == hub.detached == 0
        return
    assert stream_state(hub, stream) == state
    cursor = stream.log.seek(stream.log.seq_first)
    while stream.log.read(cursor, bytes_max=4096):
        pass
    assert cursor.seq == stream.log.seq_next
    if stream.reason is None:
        stream.append(b"data: more\n\n", 9.0)
        stream.seal(CloseReason.COMPLETE, 9.0, clean=True)
    hub.remove(stream)
    assert len(hub) == hub.log_bytes == hub.detached == 0


class NoStrays:
    """Takes strays, and makes nothing of them."""

    def take_strays(self, lines: bytes, before: list[bytes], *, dropped: bool) -> list[bytes]:
        return []


def head_reader_of(state: Any) -> HeadReader:
    reader = HeadReader()
    reader.go_on_from(state)
    return reader


def progress_of(state: Any) -> Progress:
    progress = Progress(Dialect.CHAT.api)
    progress.go_on_from(state)
    return progress


def told(parser: Any, more: bytes, size: int) -> object:
    """All that a parser makes of the bytes, in pieces of that size; None where it refuses them."""
    out = []
    try:
        if isinstance(parser, Progress):
            parser.see(more)
            return parser.state()
        for piece in cut(more, size):
            if isinstance(parser, HeadReader):
                head = parser.feed(piece)
                if head is not None:
                    return judged_request(head[0])  # a mistake in it shows earlier or later, by the cut
            elif not getattr(parser, "done", False):
                out += parser.feed(piece)
    except (RemoteProtocolError, EventTooLarge, SentAway):
        return None
    return out if isinstance(parser, EventSplitter) else b"".join(out)


def new_hub() -> Hub:
    return Hub(log_bytes_max=1 << 24, stream_log_bytes_max=1 << 20, stream_log_events_max=1000, detached_max=10)


TARGETS: dict[str, Target] = {
    "request_path": RequestPath(),
    "quick_head": quick_head,
    "chunked": chunked,
    "sse": sse,
    "json_scan": json_scan,
    "replay_log": replay_log,
    "log_record": log_record,
    "state": state,
    "handover": handover,
}


# -- seeds


def seeds(name: str) -> list[bytes]:
    """The first inputs of the fuzzer: the files in corpus/NAME, and rows of the tests' tables."""
    folder = CORPUS / name
    files = [path.read_bytes() for path in sorted(folder.iterdir())] if folder.is_dir() else []
    return files + MADE[name]()


def request_seeds() -> list[bytes]:
    rows = runpy.run_path(str(TABLES / "http_requests.py"))["ROWS"]
    answers = [row[2] for row in runpy.run_path(str(TABLES / "http_responses.py"))["ROWS"]]
    answers.append(SSE_HEAD + chunk(event("a"), DONE) + LAST)
    asks = [post(CHAT), get("/v1/models"), get("/v1/x"), post(CHAT, "Idempotency-Key: 1", "Prefer: respond-async")]
    asks += [get("/v1/streams/a", method="PUT") + post(b"x\n", path="/v1/streams/a/events") + get("/v1/streams/a")]
    asks += [get("/v1/streams?limit=1"), get("/v1/streams/a?wait=1"), get("/metrics"), get("/x", "Origin: http://a")]
    return [b"\0\0" + row[1] for row in rows] + [
        bytes((number % 7, number % 5)) + asks[number % len(asks)] + FOUR_FF + answer
        for number, answer in enumerate(answers)
    ]


def head_seeds() -> list[bytes]:
    asks = [row[1] for row in runpy.run_path(str(TABLES / "http_requests.py"))["ROWS"]]
    answers = [row[2] for row in runpy.run_path(str(TABLES / "http_responses.py"))["ROWS"]]
    return [*asks, *answers, SSE_HEAD, post(CHAT), get("/v1/x?a=%41", "Cookie: a", "Cookie: b", "Connection: close")]


def chunked_seeds() -> list[bytes]:
    rows = runpy.run_path(str(TABLES / "http_requests.py"))["ROWS"]
    return [b"\3" + row[1].partition(b"\r\n\r\n")[2] for row in rows if b"chunked" in row[1]]


def event_seeds() -> list[bytes]:
    texts_of = (" the", "\\n", '\\"', "é", "\\ud83d\\ude00", "\\u00e9", "x" * 700, "")
    chats = b"".join(event(text) for text in texts_of)
    two = b"".join(event(text, index) for text in texts_of for index in (0, 1))
    odd = b": hb\n\nid: 9\nevent: x\ndata: a\ndata: b\n\nretry: 3\r\n\r\ndata:\r\rdata: [DONE]\n\n\xef\xbb\xbfdata: c"
    return [first + body for first in (b"\0", b"\1", b"\5") for body in (chats, two, odd, b"\xef\xbb\xbf" + chats)]


def record_seeds() -> list[bytes]:
    """Events, and records of every form, the last of them cut at the end of a log."""
    records = []
    for body in event_seeds()[:4]:
        log = ReplayLog(bytes_max=1 << 20, events_max=1000)
        for each in split(body[1:], 0) or []:
            log.append(each)
        for mark in (log.mark_at_start(), log.mark_behind(1)):
            record = log.since(mark, bytes_max=600)
            records += [b"\0" + pack(record)] if record else []
    return [b"\1" + event_seeds()[0][1:], *event_seeds(), *records]


def json_seeds() -> list[bytes]:
    texts = [
        b'{"model":"m","stream":true,"messages":[{"role":"user","content":"a, \\"b\\" [c]"}],"seed":1e-3}',
        b' { "model" : null , "x" : [ [ ] , { } , [ [ 1 , -0.5 ] ] ] , "mod\\u0065l" : 1 } ',
        b'{"requests":[{"model":"a","x":{}},{"Model":1},3,"\\\\"],"generateContentRequest":{"model":"b"}}',
        b'[{"a":[{"b":[{"c":"\\\\\\""}]}]},true,false,null]',
        b"[" * 127 + b'{"a":1}' + b"]" * 127,
        b'"' + b"\\\\" * 50 + b'"',
    ]
    return [size + text for size in (b"\1", b"\7") for text in texts]


def state_seeds() -> list[bytes]:
    hub = new_hub()
    bodies = []
    for number, body in enumerate(event_seeds()[:4]):
        stream: Stream = hub.open(Dialect.CHAT, 1.0, name=f"n{number}" if number % 2 else "", epoch="abcdef")
        for each in split(body[1:], 0) or []:
            if each.endswith(b"\n\n"):
                stream.append(each, 2.0)
        stream.seal(CloseReason.COMPLETE, 3.0, clean=True)
        bodies.append(snapshot._body(snapshot.take_snapshot(hub, stream, 4.0, 5.0)))
    whole = struct.pack(">14sB8sd", snapshot.MAGIC, snapshot.VERSION, b"12345678", 5.0)
    return [
        *bodies,
        whole + b"".join(snapshot._record(b"S", body) for body in bodies) + snapshot._record(b"E", b"\0\0\0\4"),
    ]


def handover_seeds() -> list[bytes]:
    """Records of every kind of parser, in the middle of something."""
    chunked, splitter, head, progress = (
        ChunkedDecoder(),
        EventSplitter(event_bytes_max=999),
        HeadReader(),
        Progress(Dialect.CHAT.api),
    )
    chunked.feed(b"5;a\r\nhel")
    splitter.feed(b"data: a\n\ndata: b\r")
    head.feed(b"\r\nGET / HTTP/1.1\r\nhost")
    progress.see(event("a"))
    inner = InnerState(splitter.state(), 7)
    lines = LinesState(SplitterState(b"", Edge.PLAIN), b'{"choices"')
    decoders = [chunked.state(), ChunkedDecoder().state(), LengthState(7), UntilCloseState()]
    made = [(wire_kinds.DECODER, state, b"lo\r\n0\r\n\r\n") for state in decoders]
    made += [(wire_kinds.SPLITTER, state, b"\n\ndata: c\n\n") for state in (splitter.state(), inner, lines)]
    made += [(wire_kinds.HEAD, head.state(), b": a\r\n\r\n"), (wire_kinds.PROGRESS, progress.state(), event("b"))]
    for number, body in enumerate(event_seeds()[:4]):
        hub = new_hub()
        stream: Stream = hub.open(
            Dialect.CHAT, 1.0, name=f"n{number}" if number % 2 else "", epoch="abcdef"[: number % 2 * 6]
        )
        stream.append_all([each for each in split(body[1:], 0) or [] if each.endswith(b"\n\n")], 2.0)
        made.append((STREAM, stream_state(hub, stream), b""))
    made.append((READER, ReaderPlace(Policy.COALESCE, Form.CHUNKED, 9, 1, 2, 3, 999), b""))
    return [pack_for_handover(kind, state) + FOUR_FF + more for kind, state, more in made]


MADE: dict[str, Callable[[], list[bytes]]] = {
    "request_path": request_seeds,
    "quick_head": head_seeds,
    "chunked": chunked_seeds,
    "sse": event_seeds,
    "json_scan": json_seeds,
    "replay_log": event_seeds,
    "log_record": record_seeds,
    "state": state_seeds,
    "handover": handover_seeds,
}
