"""The readers of the simulation: connections that ask, read slowly, stop, break off, come back, and verify each byte.

Their parsers are written independently and share nothing with the code under test.
"""

from __future__ import annotations

import json
from collections import deque
from typing import TYPE_CHECKING, Any
from zlib import crc32

from sim_loop import Violation
from sim_script import PATHS, TEXTS, Script, data_of, effects, merges_to
from sim_transport import UNHEARD_S, Transport
from sim_upstream import weighted

if TYPE_CHECKING:
    from sim_world import World

# A reader that takes bytes at once parses them when this number has arrived, or at an answer's end.
BATCH_BYTES = 2048
# Events without an id, where clients count events.
HEARTBEATS = (b'event: ping\ndata: {"type":"ping"}\n\n', b'event: keepalive\ndata: {"type":"keepalive"}\n\n')

TEMPERS = (("calm", 60), ("stutters", 12), ("trickles", 8), ("stalls", 8), ("breaks", 8), ("vanishes", 4))


class Errand:
    """A client's purpose, pursued over as many connections as necessary."""

    __slots__ = (
        "asked_at",
        "body",
        "deletes",
        "detach_grace_s",
        "http10",
        "key",
        "kind",
        "last",
        "method",
        "path",
        "rid",
        "start",
        "stream_id",
        "tries",
        "wishes",
    )

    def __init__(self, kind: str, method: str, path: str, rid: str, body: bytes = b"") -> None:
        self.kind = kind  # generate, follow, plain, small, broken
        self.method = method
        self.path = path
        self.rid = rid
        self.body = body
        self.wishes: list[bytes] = []  # header lines
        self.http10 = False
        self.stream_id = ""  # once it is known
        self.start = 1  # the seq with which the next answer has to begin
        self.last: int | None = None  # sent as Last-Event-ID
        self.tries = 0
        self.deletes = False
        self.key = ""  # its Idempotency-Key
        self.detach_grace_s: float | None = None  # as its header says
        self.asked_at = 0.0

    @property
    def right_s(self) -> float:
        """How long its right to read holds; 0: for ever. Derived from the id alone, in place of a token's expiry."""
        serial = crc32(self.rid.encode())
        return 0.3 + serial // 15 % 30 / 10 if serial % 15 == 0 else 0.0

    @property
    def data_only(self) -> bool:
        """Whether the answer has data lines and nothing else."""
        wants_ids = any(wish.startswith(b"Accept: ") for wish in self.wishes)
        return self.method == "POST" and self.path == PATHS["gemini"] and not wants_ids

    def request(self) -> bytes:
        """The request as it goes out."""
        lines = [b"%b %b HTTP/1.%d" % (self.method.encode(), self.path.encode(), 0 if self.http10 else 1)]
        lines += [b"Host: x", b"X-Request-Id: " + self.rid.encode(), *self.wishes]
        if self.kind == "publish" and not self.deletes:
            lines.append(b"Content-Type: application/x-ndjson\r\nTransfer-Encoding: chunked")
        if self.body:
            lines += [b"Content-Type: application/json", b"Content-Length: %d" % len(self.body)]
        if self.last is not None:
            lines.append(b"Last-Event-ID: %b:%d" % (self.stream_id.encode(), self.last))
        return b"\r\n".join(lines) + b"\r\n\r\n" + self.body


class Answer:
    """An incremental parser of an answer, which also judges the stream in it."""

    __slots__ = (
        "_data_only",
        "_head",
        "_left",
        "_mode",
        "_prefix",
        "_raw",
        "_text",
        "body",
        "done",
        "errand",
        "error_seen",
        "gaps",
        "headers",
        "ids",
        "merged_from",
        "policy",
        "position",
        "rest",
        "script",
        "sent_away",
        "status",
        "stream",
        "world",
    )

    def __init__(self, world: World, errand: Errand) -> None:
        self.world = world
        self.errand = errand
        self._mode = "head"
        self._head = self._raw = self._text = b""
        self._left = 0
        self._prefix = b""
        self._data_only = errand.data_only
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.done = False  # the framing has ended
        self.rest = b""
        # stream
        self.stream: Any = None
        self.script: Script | None = None
        self.position = 0
        self.merged_from = 0  # the first of the events in the last data block
        self.policy = "coalesce"
        self.error_seen = False
        self.sent_away = False  # by an event with the id to resume with
        self.gaps: list[tuple[int, int]] = []
        self.ids: deque[int] = deque(maxlen=64)  # the last ids seen

    @property
    def begun(self) -> bool:
        return bool(self.status or self._head)

    @property
    def streaming(self) -> bool:
        return self._prefix != b"" and not self.done

    def feed(self, data: bytes) -> None:
        if self._mode == "head":
            data = self._take_head(data)
        if self._mode == "head" or self.done:
            return
        if self._mode == "chunked":
            self._take_chunks(data)
        elif self._mode == "length":
            self._take_length(data)
        elif data:
            self._payload(data)

    def close(self) -> None:
        """The connection ended."""
        if self._mode == "close" and not self.done:
            self.done = True

    def _take_head(self, data: bytes) -> bytes:
        self._head += data
        while True:
            head, found, rest = self._head.partition(b"\r\n\r\n")
            if not found:
                return b""
            lines = head.split(b"\r\n")
            self.status = int(lines[0].split(b" ")[1])
            if not lines[0].startswith(b"HTTP/1.1 ") or b"\n" in head.replace(b"\r\n", b""):
                raise Violation(f"a malformed head: {head!r}")
            if self.status >= 200:
                break
            self._head = rest
        for line in lines[1:]:
            name, _, value = line.partition(b": ")
            if name.lower() in self.headers and name.lower() in (b"content-length", b"transfer-encoding"):
                raise Violation(f"two framings: {head!r}")
            self.headers[name.lower()] = value
        self._choose_framing(rest)
        self._begin_stream()
        return b"" if self.done else rest

    def _choose_framing(self, rest: bytes) -> None:
        unread = (
            self.status in (408, 503) and self.headers.get(b"connection") == b"close"
        )  # perhaps not even the method
        if self.errand.method == "HEAD" and unread:
            self._mode = "close"
        elif self.errand.method == "HEAD" or self.status in (204, 304):
            self._mode, self.done, self.rest = "none", True, rest
        elif self.headers.get(b"transfer-encoding") == b"chunked":
            if b"content-length" in self.headers or self.errand.http10:
                raise Violation("chunked with a length, or to HTTP/1.0")
            self._mode = "chunked"
        elif b"content-length" in self.headers:
            self._mode, self._left = "length", int(self.headers[b"content-length"])
            if not self._left:
                self.done, self.rest = True, rest
        else:
            self._mode = "close"
            if self.headers.get(b"connection") != b"close":
                raise Violation("a body until close without Connection: close")

    def _begin_stream(self) -> None:
        stream_id = self.headers.get(b"x-stream-id", b"").decode()
        if self.status not in (200, 201) or not stream_id:
            return
        errand, world = self.errand, self.world
        if errand.stream_id and errand.stream_id != stream_id and errand.last is not None:
            raise Violation(f"resumed {errand.stream_id}, got {stream_id}")
        errand.stream_id = stream_id
        if errand.method == "HEAD" or errand.kind == "publish":
            return
        self.stream, self.script = world.find(stream_id)
        self._prefix = b"id: %b:" % stream_id.encode()
        self.position = min(errand.start, self.stream.log.seq_next)
        wishes = [wish[17:].decode() for wish in errand.wishes if wish.startswith(b"X-Stream-Policy: ")]
        if wishes or errand.method == "GET":
            self.policy = wishes[0] if wishes else self.stream.terms.policy.value
        world.known(stream_id)

    # -- framings

    def _take_length(self, data: bytes) -> None:
        self._payload(data[: self._left])
        rest = data[self._left :]
        self._left -= min(self._left, len(data))
        if not self._left:
            self.done, self.rest = True, rest

    def _take_chunks(self, data: bytes) -> None:
        raw = self._raw + data
        at = 0
        pieces = []
        while True:
            line_end = raw.find(b"\r\n", at)
            if line_end < 0:
                break
            try:
                size = int(raw[at:line_end], 16)
            except ValueError:
                raise Violation(f"no size of a chunk: {raw[at:line_end]!r}") from None
            end = line_end + 2 + size
            if len(raw) < end + 2:
                break
            if raw[end : end + 2] != b"\r\n":
                raise Violation(f"a chunk without its end: {raw[at : end + 2]!r}")
            at = end + 2
            if not size:
                self.done, self.rest = True, raw[at:]
                break
            pieces.append(raw[line_end + 2 : end])
        self._raw = b"" if self.done else raw[at:]
        if pieces:
            self._payload(b"".join(pieces))

    def _payload(self, data: bytes) -> None:
        if not self._prefix:
            self.body += data
            return
        text = self._text + data
        at = 0
        while True:
            end = text.find(b"\n\n", at)
            if end < 0:
                break
            self._block(text[at : end + 2])
            at = end + 2
        self._text = text[at:]

    # -- events

    def _block(self, block: bytes) -> None:
        if self._data_only:
            self._data_block(block)
            return
        while block[:1] == b":" or block[:6] == b"retry:":
            block = block[block.find(b"\n") + 1 :]
        prefix = self._prefix
        if not block.startswith(prefix):
            self._loose_block(block)
            return
        line_end = block.find(b"\n")
        seq = int(block[len(prefix) : line_end])
        event = block[line_end + 1 :]
        script = self.script
        if (
            script is not None
            and seq == self.position
            and seq <= len(script.events)
            and script.events[seq - 1] == event
        ):
            self._pass(seq)
            return
        self._unusual(seq, event)

    def _data_block(self, block: bytes) -> None:
        """An event without an id: it follows the last event, and its content tells how many events it merges."""
        if any(not line.startswith(b"data: ") for line in block[:-2].split(b"\n")):
            raise Violation(f"a line that isn't data: {block[:200]!r}")
        if self.script is None:
            self.script = self.world.script_of(self.errand.stream_id)
        events = self.script.events if self.script is not None else []
        if self.position <= len(events) and data_of(events[self.position - 1]) == block and not self.error_seen:
            self.merged_from = self.position
            self._pass(self.position)
        elif block.startswith(b'data: {"gap":'):
            self._unusual(json.loads(block[6:])["gap"]["to"], block)
        elif b'"last_id"' in block:
            self._loose_block(block)
        elif b'"error"' in block or (not events and self.world.is_plain(block)):
            self._unusual(self.position, block)
        else:
            self._unusual(self._end_of(block, events), block)
            self.world.seen["a reader of data lines gets texts merged"] += 1

    def _end_of(self, block: bytes, events: list[bytes]) -> int:
        """The last of the events that were merged into this block.

        An event without a text can belong to the block before it as well as to this block: both readings are tried.
        """
        start, position = self.merged_from, self.position
        while True:
            for end in range(position, len(events) + 1):
                if merges_to(events[position - 1 : end], block):
                    self.merged_from = self.position = position
                    return end
            told = events[start - 1 : position - 1]
            if position >= len(events) or not told or effects(told) != effects(events[start - 1 : position]):
                break
            position += 1
        raise Violation(f"no events at {self.position} of {len(events)} merge to {block[:300]!r}")

    def _pass(self, seq: int) -> None:
        self.position = seq + 1
        self.ids.append(seq)

    def _loose_block(self, block: bytes) -> None:
        if block in HEARTBEATS and not self._data_only:
            return
        if b'"last_id"' in block and (self.world.stopping or self.errand.right_s):
            last_id = json.loads(block.partition(b"data: ")[2])["error"]["last_id"]
            if last_id != f"{self.errand.stream_id}:{self.position - 1}":
                raise Violation(f"sent away with {last_id} at position {self.position}")
            self.error_seen = self.sent_away = True
            return
        raise Violation(f"no id of {self._prefix!r} on {block[:200]!r}")

    def _unusual(self, seq: int, event: bytes) -> None:
        if self.script is None:
            self.script = self.world.script_of(self.errand.stream_id)
        if self.script is not None:
            self.script.confirm(self.stream)
        if self.error_seen:
            raise Violation(f"an event after the error: {event[:200]!r}")
        if seq < self.position:
            raise Violation(f"seq {seq} at position {self.position}: {event[:200]!r}")
        if b'"gap"' in event and self._is_gap(seq, event):
            return
        events = self.script.events if self.script is not None else []
        if seq > len(events) or (seq == self.position and events[seq - 1] != event):
            self._last(seq, event, events)
        elif seq == self.position or effects([event]) == (wanted := effects(events[self.position - 1 : seq])):
            pass
        else:
            raise Violation(f"{self.position}..{seq} coalesced to {event!r}, {effects([event])}, not {wanted}")
        self._pass(seq)

    def _is_gap(self, seq: int, event: bytes) -> bool:
        name = event.split(b"\n", 1)[0]
        if name not in (b"event: gap", b"event: ping") and not name.startswith(b'data: {"gap":'):
            return False
        gap = json.loads(event.partition(b"data: ")[2])["gap"]
        first, last = gap["from"], gap["to"]
        if first != self.position or last < first or last != seq:
            raise Violation(f"gap {first}..{last} with id {seq} at position {self.position}")
        if self.policy != "drop_oldest" and last >= self.stream.log.seq_first:
            raise Violation(
                f"gap {first}..{last}, policy {self.policy}, but the log begins at {self.stream.log.seq_first}"
            )
        if last >= self.stream.log.seq_next:
            raise Violation(f"gap {first}..{last} beyond the stream's end")
        self.gaps.append((first, last))
        self._pass(last)
        return True

    def _last(self, seq: int, event: bytes, events: list[bytes]) -> None:
        """An event that no upstream sent: the error that ends a stream, and in front of it JSON that is no answer."""
        stream = self.stream
        if seq == 1 == self.position and not events and self.world.is_plain(event):
            return
        is_last = seq == stream.log.seq_next - 1
        if not (is_last and b'"error"' in event and seq == self.position):
            wanted = events[seq - 1] if 0 < seq <= len(events) else None
            raise Violation(f"seq {seq} at {self.position} of {self.errand.stream_id}: {event[:300]!r}, not {wanted!r}")
        first = self.world.finals.setdefault(stream.id, event)
        if first != event:
            raise Violation(f"two ends of one stream: {event!r} and {first!r}")
        self.error_seen = True
        self.world.ends_badly.append(stream)  # the seal follows its last event

    # -- the end

    def check_end(self) -> None:
        """The framing has ended: check that the stream has, too."""
        if not self._prefix:
            return
        stream = self.stream
        if self._mode == "chunked":
            if stream.reason is None or not stream.ended_clean:
                raise Violation(f"a clean end of {stream.id}, which is {stream.reason}")
            if self.position != stream.log.seq_next:
                raise Violation(f"a clean end at {self.position} of {stream.log.seq_next} of {stream.id}")
        if self._text.strip() and not self._text.startswith((b":", b"retry:")) and self._mode == "chunked":
            raise Violation(f"half an event at a clean end: {self._text!r}")


class Reader:
    """A connection: the peer of a ClientConnection."""

    __slots__ = (
        "_expected",
        "_inbox",
        "_inbox_bytes",
        "_scolded",
        "_serial",
        "answer",
        "errand",
        "healed",
        "over",
        "sure",
        "temper",
        "transport",
        "world",
    )

    def __init__(self, world: World, errand: Errand) -> None:
        self.world = world
        self.errand = errand
        self.temper = weighted(world.rng, TEMPERS)
        self.transport: Transport | None = None
        self.over = False
        self.healed = False
        self.answer: Answer | None = None
        self._expected: deque[Errand] = deque()
        self._inbox: list[bytes] = []
        self._inbox_bytes = 0
        self.sure = 0  # the position when it last read everything
        self._serial = 0
        self._scolded = False

    # -- going out

    def begin(self) -> None:
        world = self.world
        if world.closed:
            self._finish("never")
            return
        self.transport = transport = Transport(world.loop, self, ("10.0.0.1", 1024), world.touched)
        transport.protocol = world.client_connection()
        world.readers[self] = None
        world.keep(transport)
        world.loop.steps += 1
        transport.protocol.connection_made(transport)
        self.ask(self.errand)

    def ask(self, errand: Errand) -> None:
        """Send a request, in pieces now and then, and schedule the behaviour of this reader's temper."""
        rng, world = self.world.rng, self.world
        self.errand = errand
        errand.asked_at = world.loop.now
        self._expected.append(errand)
        self._serial += 1
        data = errand.request()
        if errand.kind == "broken":
            data = rng.choice(
                (b"GET\r\n\r\n", b"GET /x HTTP/1.1\nHost: x\n\n", data[: len(data) // 2], b"\x16\x03\x01\x02")
            )
        pieces = [data]
        if rng.random() < 0.15:
            cut = rng.randrange(len(data) + 1)
            pieces = [data[:cut], data[cut:]]
        delay = 0.0
        for piece in pieces:
            slow = rng.random() < 0.02 and errand.kind != "publish"
            delay += rng.uniform(0, 4) if slow else rng.random() * 0.01
            if piece:
                world.loop.io(delay, self._send, piece)
        if errand.kind == "publish" and not errand.deletes:
            lines = rng.randrange(300, 900) if world.crowded and rng.random() < 0.3 else rng.randrange(60)
            world.loop.io(delay + 0.01, self._publish, errand, lines)
        if errand.kind in ("small", "plain", "generate") and not errand.http10 and rng.random() < 0.04:
            self._pipeline(delay)
        if self.temper != "calm":
            world.loop.io(rng.expovariate(1 / world.patience_s), self._act, self._serial)

    def _publish(self, errand: Errand, left: int) -> None:
        """The next line of a published stream, in two pieces now and then; the last line is [DONE], or missing."""
        rng, world = self.world.rng, self.world
        if self.over or self.transport is None or self.errand is not errand:
            return
        if not left and rng.random() < 0.2:
            self.break_off()
            return
        body = b'{"delta":"%b"}' % rng.choice(TEXTS) if left else b"[DONE]"
        chunk = b"%x\r\n%b\n\r\n" % (len(body) + 1, body)
        cut = (
            rng.randrange(len(chunk) - 2) if rng.random() < 0.2 else 0
        )  # in front of the bytes that make the line whole
        if cut:
            self._send(chunk[:cut])
        if self.over or self.transport is None:
            return
        world.published(errand, body)
        self._send(chunk[cut:] + (b"" if left else b"0\r\n\r\n"))
        if left:
            burst = rng.random() < 0.1
            pace_s = 0.005 if left > 60 else world.pace_s
            world.loop.io(0.0 if burst else rng.expovariate(1 / pace_s), self._publish, errand, left - 1)

    def _pipeline(self, delay: float) -> None:
        """Further requests right after the first: a few, or more than a client may send."""
        rng, world = self.world.rng, self.world
        if rng.random() < 0.04:
            world.loop.io(
                delay + rng.random(), self._send, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * rng.randrange(300, 900)
            )
            self._scolded = self.healed = True  # its end counts for neither side
            return
        for _ in range(rng.randrange(1, 4)):
            errand = Errand("small", "GET", rng.choice(("/healthz", "/nowhere")), "p")
            self._expected.append(errand)
            world.loop.io(delay + 0.001, self._send, errand.request())

    def _send(self, data: bytes) -> None:
        if self.transport is not None and not self.over:
            self.transport.receive(data)

    def _act(self, serial: int) -> None:
        """The next action of a reader of this temper."""
        transport, rng, world = self.transport, self.world.rng, self.world
        if self.over or transport is None or serial != self._serial:
            return
        temper = self.temper
        again = rng.expovariate(1 / world.patience_s)
        if temper == "stutters":
            transport.room = rng.randrange(4000) if transport.room > 1 << 30 else 0
            world.loop.io(again, self._take_more, serial, 1 << 50)
        elif temper == "trickles":
            if transport.room > 1 << 30:
                transport.room = rng.randrange(200)
            world.loop.io(again / 4, self._take_more, serial, rng.randrange(1, 600))
        elif temper == "stalls":
            transport.room = rng.randrange(2000) if transport.room > 1 << 30 else 0
            world.loop.io(again * 10, self._take_more, serial, 1 << 50)
        elif temper == "breaks":
            self.break_off()
        elif temper == "vanishes":
            transport.room = min(transport.room, rng.randrange(3000))
            world.loop.io(rng.uniform(5, 40), self.break_off)

    def _take_more(self, serial: int, length: int) -> None:
        if self.over or self.transport is None or serial != self._serial:
            return
        self.transport.grant(length)
        self._read()
        if self.over or self.transport is None:
            return
        if self.temper == "trickles" and self.world.rng.random() < 0.05:
            self.transport.grant(1 << 50)
        self.world.loop.io(self.world.rng.expovariate(1 / self.world.patience_s), self._act, serial)

    def heal(self) -> None:
        """Take all bytes from now on."""
        self._serial += 1
        self.healed = True
        if self.transport is not None:
            self.transport.grant(1 << 50)

    def break_off(self) -> None:
        """FIN, RST, or the network is lost."""
        transport, rng = self.transport, self.world.rng
        if self.over or transport is None:
            return
        self._serial += 1
        roll = rng.random()
        if roll < 0.5:
            transport.receive_eof()
            if rng.random() < 0.5:  # a half-close, and it goes on reading for a while
                self.world.loop.io(rng.uniform(0, 8), self.break_off)
                return
            self.world.loop.io(0.01, self._reset, ConnectionResetError(104, "Connection reset by peer"))
        elif roll < 0.8:
            self._reset(ConnectionResetError(104, "Connection reset by peer"))
        else:
            self._reset(TimeoutError(110, "Connection timed out"))

    def _reset(self, exc: OSError) -> None:
        if self.over or self.transport is None:
            return
        if self.transport.hears_nothing:
            self.world.loop.io(UNHEARD_S, self._reset, exc)
            return
        self.transport.receive_reset(exc)
        if self.transport.gone:
            self._read()
            self._finish("reset")

    # -- coming in

    def took(self, data: bytes) -> None:
        if self.over:
            return
        self._inbox.append(data)
        self._inbox_bytes += len(data)
        batched = self._inbox_bytes < BATCH_BYTES and self.answer is not None and self.answer.streaming
        if not batched or data[-5:] == b"0\r\n\r\n" or b'"gap"' in data or b'"error"' in data:
            self._read()

    def delivers(self, length: int) -> None:
        """Nothing to record: a reader's bytes belong to no script."""

    def _read(self) -> None:
        if not self._inbox:
            return
        data = b"".join(self._inbox)
        self._inbox.clear()
        self._inbox_bytes = 0
        while data:
            answer = self.answer
            if answer is None:
                if not self._expected:
                    if self._scolded or data.startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 503 ")):
                        self._scolded = True  # for an incomplete head
                        return
                    raise Violation(f"bytes without a request: {data[:200]!r}")
                answer = self.answer = Answer(self.world, self._expected.popleft())
            answer.feed(data)
            if not answer.done:
                if self.transport is not None and self.transport.room > 1 << 30:
                    self.sure = answer.position
                return
            data = answer.rest
            self.answer = None
            self._judge(answer, "done")

    @property
    def waits(self) -> bool:
        """Whether another answer comes before the answer that is being written."""
        return bool(self._expected)

    def ask_more(self, errand: Errand) -> None:
        """Send another request on the same connection."""
        if not self.over and self.transport is not None:
            self.ask(errand)

    def keeps_alive(self, answer: Answer) -> bool:
        return (
            not self.over
            and not self._expected
            and not self._scolded
            and not answer.errand.http10
            and answer.headers.get(b"connection") != b"close"
        )

    def catch_up(self) -> Answer | None:
        """Parse all bytes that have arrived."""
        self._read()
        return self.answer

    def ended(self, how: str) -> None:
        """The relay closed; the bytes it wrote before have arrived."""
        if self.over:
            return
        self._read()
        self._finish(how)

    def _finish(self, how: str) -> None:
        self.over = True
        self._serial += 1
        answer, self.answer = self.answer, None
        transport, self.transport = self.transport, None
        if answer is not None:
            if how == "fin":
                answer.close()
            self._judge(answer, "done" if answer.done else how, transport)
        else:
            self.world.unanswered(self, self.errand, how)
        self.world.readers.pop(self, None)
        self.world.reader_over(self)

    def _judge(self, answer: Answer, how: str, transport: Transport | None = None) -> None:
        """An answer is over: judge it, and let its reader go on."""
        if how == "done":
            answer.check_end()
        self.world.judge(self, answer, how)
