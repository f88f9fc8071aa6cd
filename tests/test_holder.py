"""The load test's own eyes: a holder that misses a lost token would prove nothing.

A small server in a thread speaks streamd's dialect, properly or with a single fault, and the holder must report it.
"""

from __future__ import annotations

import importlib
import json
import socketserver
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LOADTEST = Path(__file__).resolve().parent.parent / "loadtest"
sys.path.insert(0, str(LOADTEST))
checker: Any = importlib.import_module("checker")
holder: Any = importlib.import_module("holder")

TOKENS = 12


def token(number: int) -> str:
    return f"@{number}.{1000 + number} "


def event(seq: int, text: str, name: str = "s_1") -> bytes:
    chunk = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    return f"id: {name}:{seq}\ndata: {json.dumps(chunk, separators=(',', ':'))}\n\n".encode()


def gap(first: int, last: int) -> bytes:
    body = json.dumps({"choices": [], "gap": {"from": first, "to": last}})
    return f"id: s_1:{last}\nevent: gap\ndata: {body}\n\n".encode()


def done(seq: int) -> bytes:
    return f"id: s_1:{seq}\ndata: [DONE]\n\n".encode()


def whole_stream() -> list[bytes]:
    return [*(event(k + 1, token(k)) for k in range(TOKENS)), done(TOKENS + 1)]


class Fake(socketserver.ThreadingTCPServer):
    """Answers each request with its script in `answers`: POST and GET have a script each, by Last-Event-ID."""

    daemon_threads = True
    request_queue_size = 512
    allow_reuse_address = True

    def __init__(self, script: str) -> None:
        super().__init__(("127.0.0.1", 0), FakeConnection)
        self.script = script
        self.posts = 0
        self.gets = 0
        self.graces = 0


class FakeConnection(socketserver.StreamRequestHandler):
    server: Fake

    def handle(self) -> None:
        request = self.rfile.readline()
        fields = {}
        while (line := self.rfile.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            fields[name.lower()] = value.strip()
        self.rfile.read(int(fields.get(b"content-length", b"0")))
        try:
            if request.startswith(b"POST"):
                self.server.posts += 1
                self.server.graces += b"x-stream-detach-grace" in fields
                self.post()
            elif request:
                self.server.gets += 1
                self.resume(int(fields.get(b"last-event-id", b":0").rpartition(b":")[2]))
        except OSError:
            return

    def head(self, status: str = "200 OK", more: str = "X-Stream-Id: s_1\r\nTransfer-Encoding: chunked\r\n") -> None:
        self.wfile.write(f"HTTP/1.1 {status}\r\nContent-Type: text/event-stream\r\n{more}\r\n".encode())

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def post(self) -> None:
        script = self.server.script
        if script == "refuse":
            self.head("503 Service Unavailable", "Retry-After: 3\r\nContent-Length: 0\r\nConnection: close\r\n")
            return
        self.head()
        events = whole_stream()
        if script == "lose":
            del events[4]
        elif script == "double":
            events.insert(5, events[4])
        elif script == "gap":
            events[3:6] = [gap(4, 6)]
        elif script == "wrong gap":
            events[3:6] = [gap(5, 6)]
        elif script == "coalesced":
            events[3:6] = [event(6, token(3) + token(4) + token(5))]
        elif script == "coalesced with a hole":
            events[3:6] = [event(6, token(3) + token(5))]
        elif script == "truncated":
            events[6:] = [b'data: {"error": {"message": "x", "code": "upstream_truncated"}}\n\n']
        elif script.startswith("resume"):
            self.chunk(b"retry: 10\n" + b"".join(events[:4]))
            self.rfile.read()  # the reader resets
            return
        self.chunk(b"retry: 10\n" + events[0])
        for one in events[1:]:
            self.chunk(b": hb\n" + one)
        if script == "malformed":
            self.wfile.write(b"nonsense\r\n")
        if script != "truncated":
            self.wfile.write(b"0\r\n\r\n")
        if script == "endless":
            self.rfile.read()

    def resume(self, last: int) -> None:
        if self.server.gets == 1 and self.server.script == "resume politely refused":
            self.head()
            self.chunk(b"retry: 20\n: over capacity\n")
            return
        self.head()
        if last < TOKENS:
            first = last + int(self.server.script == "resume loses")
            self.chunk(event(TOKENS, "".join(token(k) for k in range(first, TOKENS))))
        self.chunk(done(TOKENS + 1))
        self.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def fake(request: pytest.FixtureRequest) -> Iterator[Fake]:
    server = Fake(request.param)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def hold(server: Fake, readers: int = 20, **plan: Any) -> dict[str, Any]:
    plan = {"tokens": TOKENS, "body": b"{}", "ramp_per_s": 5000, "seconds": 20, "act_after_events": 1, **plan}
    report: dict[str, Any] = holder.Holder(holder.Plan(server.server_address[1], readers, **plan)).run()
    return report


def with_script(*scripts: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fake", scripts, indirect=True)


class TestReaders:
    @with_script("good", "coalesced")
    def test_readers_of_good_streams_are_complete(self, fake: Fake) -> None:
        report = hold(fake)
        assert report["ends"] == {"live: complete": 20}
        assert report["groups"]["live"]["tokens"] == 20 * TOKENS
        assert holder.holds(report)
        assert fake.graces == 0

    @with_script("lose", "coalesced with a hole")
    def test_every_reader_sees_a_lost_token(self, fake: Fake) -> None:
        report = hold(fake)
        assert report["groups"]["live"]["lost"] == 20
        assert not holder.holds(report)

    @with_script("double")
    def test_a_doubled_token_is_seen(self, fake: Fake) -> None:
        report = hold(fake)
        assert report["groups"]["live"]["doubled"] == 2 * 20  # its seq and its text
        assert not holder.holds(report)

    @with_script("gap")
    def test_an_announced_gap_is_no_loss(self, fake: Fake) -> None:
        report = hold(fake)
        live = report["groups"]["live"]
        assert (live["lost"], live["gap_events"], live["announced"], live["wrong"]) == (0, 20, 60, 0)

    @with_script("wrong gap")
    def test_a_gap_that_names_too_few_seqs_is_wrong(self, fake: Fake) -> None:
        report = hold(fake)
        assert report["groups"]["live"]["wrong"] == 20
        assert not holder.holds(report)

    @with_script("truncated")
    def test_an_error_event_is_no_completion(self, fake: Fake) -> None:
        report = hold(fake)
        assert report["ends"] == {"live: error upstream_truncated": 20}
        assert not holder.holds(report)

    @with_script("malformed")
    def test_broken_framing_is_wrong_and_ends_no_other_reader(self, fake: Fake) -> None:
        report = hold(fake)
        assert report["ends"] == {"live: malformed": 20}
        assert not holder.holds(report)

    @with_script("refuse")
    def test_refusals_are_counted_with_their_retry_after(self, fake: Fake) -> None:
        report = hold(fake)
        assert report["ends"] == {"live: refused 503": 20}
        assert report["with_retry_after"] == 20

    def test_without_a_listener_every_reader_ends_with_connect(self) -> None:
        with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as server:
            port = server.server_address[1]
        report = holder.Holder(holder.Plan(port, 3, seconds=20)).run()
        assert report["ends"] == {"live: connect": 3}


class TestGroups:
    @with_script("resume")
    def test_a_resuming_reader_gets_the_rest_without_a_second_post(self, fake: Fake) -> None:
        report = hold(fake, shares={holder.Group.RESUMING: 1.0}, cuts=1)
        assert report["ends"] == {"resuming: complete": 20}
        assert report["resumed"] == fake.gets == fake.posts == fake.graces == 20
        assert holder.holds(report)

    @with_script("resume loses")
    def test_a_token_lost_at_the_resume_is_seen(self, fake: Fake) -> None:
        report = hold(fake, shares={holder.Group.RESUMING: 1.0}, cuts=1)
        assert report["groups"]["resuming"]["lost"] == 20
        assert not holder.holds(report)

    @with_script("resume politely refused")
    def test_a_polite_refusal_brings_the_reader_back_later(self, fake: Fake) -> None:
        report = hold(fake, readers=1, shares={holder.Group.RESUMING: 1.0}, cuts=1, seed=3)
        assert report["ends"] == {"resuming: complete": 1}
        assert (fake.posts, fake.gets, report["resumed"]) == (1, 2, 2)

    @with_script("endless")
    def test_vanishing_and_stalled_readers_vanish_and_stall(self, fake: Fake) -> None:
        shares = {holder.Group.VANISHING: 0.5, holder.Group.STALLED: 0.5}
        report = hold(fake, shares=shares, tokens=TOKENS + 1)
        stalled = sum(count for end, count in report["ends"].items() if end.startswith("stalled"))
        assert stalled + report["open_at_end"] == 10
        assert report["readers"] == {"stalled": 10, "vanishing": 10}

    @with_script("good")
    def test_a_stall_that_ends_loses_nothing(self, fake: Fake) -> None:
        report = hold(fake, shares={holder.Group.STALLED: 1.0}, stall_s=0.05)
        assert report["ends"] == {"stalled: complete": 20}
        assert report["groups"]["stalled"]["lost"] == 0

    @with_script("good")
    def test_slow_readers_read_in_slices(self, fake: Fake) -> None:
        report = hold(fake, readers=2, shares={holder.Group.SLOW: 1.0}, slow_bps=2500, seconds=3)
        assert report["groups"]["slow"]["lost"] == 0
        assert report["groups"]["slow"]["events"] > 0


BLOCKS = [one[:-2] for one in whole_stream()]


class TestResponse:
    def wire(self) -> bytes:
        body = b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in whole_stream())
        return b"HTTP/1.1 200 OK\r\nX-Stream-Id: s_1\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"

    @pytest.mark.parametrize("step", [1, 2, 3, 7, 50, 10_000])
    def test_a_response_is_parsed_in_any_cut(self, step: int) -> None:
        response = checker.Response()
        wire = self.wire()
        blocks = [block for at in range(0, len(wire), step) for block in response.take(wire[at : at + step])]
        assert blocks == BLOCKS
        assert (response.status, response.ended) == (200, True)
        assert response.field(b"x-stream-id") == b"s_1"
        assert response.field(b"retry-after") is None

    def test_a_response_without_framing_ends_with_the_connection(self) -> None:
        response = checker.Response()
        blocks = response.take(b"HTTP/1.0 200 OK\r\n\r\n" + b"".join(whole_stream()) + b"retry: 5\n")
        assert blocks == BLOCKS
        assert response.rest == b"retry: 5\n"

    def test_an_answer_without_a_body_has_ended(self) -> None:
        for head in (b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n"):
            response = checker.Response()
            assert response.take(head) == []
            assert response.ended


class TestReference:
    TEXT = 'One "quoted" 🚀 ending.'.encode()

    def read(self, *pieces: str) -> Any:
        seen = checker.Checker(checker.Reference(self.TEXT), checker.Tally())
        for seq, piece in enumerate(pieces, 1):
            seen.take(event(seq, piece)[:-2])
        seen.take(b"data: [DONE]")
        return seen

    def test_a_whole_text_has_no_loss(self) -> None:
        seen = self.read("One ", '"quoted"', " 🚀", " ending.")
        assert seen.whole(None)
        assert (seen.tally.lost, seen.tally.doubled, seen.tally.wrong) == (0, 0, 0)

    def test_lost_doubled_and_foreign_pieces_are_counted(self) -> None:
        seen = self.read("One ", " 🚀", "One ", "elsewhere", " ending.")
        assert (seen.tally.lost, seen.tally.doubled, seen.tally.wrong) == (1, 1, 1)

    def test_a_text_that_is_cut_short_is_not_whole(self) -> None:
        assert not self.read("One ", '"quoted"').whole(None)
