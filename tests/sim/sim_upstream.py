"""The upstreams of the simulation: servers that answer by a script, late, in pieces, wrongly, or not at all."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

from sim_script import PATHS, Script, Wire
from sim_transport import UNHEARD_S, Transport

if TYPE_CHECKING:
    from sim_world import World

EVENT_BYTES_MAX = 8 * 1024  # of the settings; an event of a script may be larger
LONG = 800  # tokens of an answer that a crowd reads

# The fates of an answer, with their weights.
FATES = (
    *(
        ("proper", 60),
        ("no_end", 3),
        ("cut_fin", 4),
        ("cut_reset", 4),
        ("silent", 3),
        ("bad_chunk", 2),
        ("too_large", 2),
    ),
    *(("json", 4), ("error", 5), ("busy", 5), ("limited", 3), ("no_answer", 2), ("reset_first", 3), ("bad_head", 1)),
)
PLAIN_FATES = (("json", 70), ("error", 8), ("busy", 6), ("no_answer", 3), ("reset_first", 5), ("cut_json", 8))


def weighted(rng: random.Random, table: tuple[tuple[Any, int], ...]) -> Any:
    """A word of the table, drawn by its weight."""
    left = rng.randrange(sum(weight for _, weight in table))
    for word, weight in table:
        left -= weight
        if left < 0:
            return word
    raise AssertionError


class Server:
    """An inference server."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.links: dict[Link, None] = {}

    async def connect(self, factory: Any) -> Any:
        """The simulated create_connection(): the connection is made some time after the first turn, or never."""
        world, rng = self.world, self.world.rng
        waiter = world.loop.create_future()
        roll = rng.random()
        link: Link | None = None
        if roll < 0.03:
            world.loop.io(rng.random() * 0.05, _refuse, waiter)
        elif roll >= 0.04:  # else the server never answers
            link = Link(self, waiter, factory)
            world.loop.io(rng.random() * 0.01, link.establish)
        try:
            made = await waiter
        except BaseException:
            if link is not None:
                link.give_up()
            raise
        finally:
            del waiter  # an error's traceback holds this frame
        return made


def _refuse(waiter: asyncio.Future[Any]) -> None:
    if not waiter.done():
        waiter.set_exception(ConnectionRefusedError(111, "Connection refused"))


class Link:
    """The server's side of a connection."""

    def __init__(self, server: Server, waiter: asyncio.Future[Any], factory: Any) -> None:
        self.server = server
        self.world = server.world
        self._waiter: asyncio.Future[Any] | None = waiter
        self._factory: Any = factory
        self.transport: Transport | None = None
        self._request = b""
        self.busy = False
        self.connecting = False
        self.fresh = True  # no request was sent on it yet
        self._over = False  # nothing is sent any more
        self._answers = 0
        # answer
        self.script: Script | None = None
        self.newest: Script | None = None  # also when all of it was delivered, which the relay may process later
        self._wire: Wire | None = None
        self._fate = ""
        self._fate_at = 0
        self._left: bytes = b""  # made but not sent yet
        self._cut = 0  # of these bytes, the number that goes out in a write of its own; 0: no matter
        self._made = 0  # bytes of the connection made so far
        self._read = 0  # of these, the bytes read by the relay
        self.asked_at = 0.0  # when the request had arrived
        self.read_at = 0.0  # when the relay last read bytes
        self._keep_alive = True
        self._chunked = True
        self._opened = False

    # -- connection

    def establish(self) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        world = self.world
        self.transport = Transport(world.loop, self, (self.server.name, 8000), world.touched)
        self.transport.protocol, self._factory = self._factory(), None
        self.server.links[self] = None
        self.connecting = True
        world.loop.call_soon(self._established)

    def _established(self) -> None:
        transport, waiter = self.transport, self._waiter
        assert transport is not None and waiter is not None
        if transport.closing:
            return
        transport.protocol.connection_made(transport)
        self._waiter = None
        self.connecting = False
        if not waiter.done():
            waiter.set_result((transport, transport.protocol))
        if self.world.rng.random() < 0.01:
            self.world.loop.io(0.0, self._hang_up, self.world.rng.random() < 0.5)

    def give_up(self) -> None:
        """The connecting task was cancelled."""
        self._waiter = None
        if self.transport is not None:
            self.transport.abort()

    def ended(self, how: str) -> None:
        self._over = True
        self.server.links.pop(self, None)
        if self.script is not None:
            self.script.lose()
        self.transport = None

    def _hang_up(self, fin: bool) -> None:
        transport = self.transport
        self._over = True
        if transport is None:
            return
        if not fin and transport.hears_nothing:
            self.world.loop.io(UNHEARD_S, self._hang_up, fin)
            return
        if fin:
            if self.script is not None and not self._chunked:
                self.script.ended = self.script.read_whole = True  # as far as the relay can tell
            transport.receive_eof()
        else:
            transport.receive_reset(ConnectionResetError(104, "Connection reset by peer"))
            self.ended("reset")

    # -- requests

    def took(self, data: bytes) -> None:
        self._request += data
        if self.busy or self._over:
            return
        head, found, body = self._request.partition(b"\r\n\r\n")
        if not found:
            return
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        if len(body) < int(fields.get(b"content-length", b"0")):
            return
        self._request = b""
        self.busy = True
        self.script = self.newest = None
        self.asked_at = self.world.loop.now
        words = head.split(b"\r\n", 1)[0].split(b" ")
        rng = self.world.rng
        wants_stream = b'"stream":true' in body
        path = words[1].decode()
        dialect = next((name for name, of in PATHS.items() if of == path), "unknown")
        fate = weighted(rng, FATES if wants_stream else PLAIN_FATES)
        if path == "/v1/models":
            fate = "models"
        rid = fields.get(b"x-request-id", b"").decode()
        reused, self.fresh = not self.fresh and fate == "reset_first", False
        self.world.asked(self, rid, body, repeats=fate in ("busy", "limited") or reused)
        self._fate = fate
        delay = rng.expovariate(1 / 0.15) if rng.random() < 0.9 else rng.uniform(0.5, 5)
        self.world.loop.io(delay, self._answer, dialect, rid)

    def _answer(self, dialect: str, rid: str) -> None:
        world, rng, fate = self.world, self.world.rng, self._fate
        if self._over or self.transport is None or fate == "no_answer":
            return
        self._read = self._made = 0
        if fate == "reset_first":
            self._hang_up(rng.random() < 0.5)
        elif fate == "bad_head":
            self._send(b"HTTP/1.1 2x0 what\r\n\r\n")
        elif fate in ("busy", "limited", "error", "json", "cut_json", "models"):
            self._plain(fate, rid)
        else:
            total = min(int(rng.expovariate(1 / world.tokens_mean)), LONG - 1)
            if world.crowded and rng.random() < 0.04:
                total = rng.randrange(LONG, 2 * LONG)
            self.script = self.newest = Script(rng, dialect, rid, total)
            self._fate_at = rng.randrange(total + 1)
            self._begin(self.script)

    def _plain(self, fate: str, rid: str) -> None:
        """An answer that is not a stream."""
        rng = self.world.rng
        status, extra = {"busy": (503, b"retry-after: 99\r\n"), "limited": (429, b""), "error": (500, b"")}.get(
            fate, (200, b"")
        )
        body = b'{"error":{"message":"no"}}' if status != 200 else b'{"data":[{"id":"m%d"}]}' % rng.randrange(3)
        if fate in ("json", "cut_json"):
            body = self.world.plain_body(rid)
        how = rng.randrange(3)
        head = b"HTTP/1.1 %d Whatever\r\ncontent-type: application/json\r\n%b" % (status, extra)
        if how == 0:
            wire = head + b"content-length: %d\r\n\r\n" % len(body) + body
        elif how == 1:
            wire = head + b"transfer-encoding: chunked\r\n\r\n"
            for at in range(0, len(body), 3000):
                piece = body[at : at + 3000]
                wire += b"%x\r\n%b\r\n" % (len(piece), piece)
            wire += b"0\r\n\r\n"
        else:
            wire = head + b"connection: close\r\n\r\n" + body
        self._keep_alive = how != 2
        if fate == "cut_json":
            if how == 2:  # the relay could not tell such an end from a proper end
                how = 1
                wire = head + b"transfer-encoding: chunked\r\n\r\n%x\r\n" % len(body) + body
            wire = wire[: len(wire) - rng.randrange(1, min(200, len(wire) - 20))]
        self._pour(wire, fin=how == 2 or fate == "cut_json")

    def _pour(self, wire: bytes, *, fin: bool) -> None:
        """Send the bytes in pieces, as a network delivers them."""
        rng = self.world.rng
        if self._over or self.transport is None:
            return
        length = len(wire) if rng.random() < 0.6 else rng.randrange(1, len(wire) + 1)
        length = min(length, 64 * 1024)
        self._send(wire[:length])
        if length < len(wire):
            self.world.loop.io(rng.random() * 0.02, lambda: self._pour(wire[length:], fin=fin))
        elif fin:
            self.world.loop.io(rng.random() * 0.02, self._hang_up, rng.random() < 0.9)
        else:
            self._rest()

    # -- streams

    def _begin(self, script: Script) -> None:
        rng = self.world.rng
        self._chunked = rng.random() < 0.9
        framing = b"transfer-encoding: chunked\r\n" if self._chunked else b"connection: close\r\n"
        self._keep_alive = self._chunked
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n" + framing + b"\r\n"
        if rng.random() < 0.1:
            head = b"HTTP/1.1 102 Processing\r\n\r\n" + head
        self._made += len(head)
        self._wire = Wire(rng, chunked=self._chunked, offset=self._made, first_id=script.dialect != "unknown")
        self.world.stream_begins(self, script)
        # The relay opens a stream of an unknown dialect when it sees the head: before that there is no stream to name.
        if script.dialect == "unknown":
            self._send(head)
            self.world.stream_begins(self, script)
            self.world.loop.io(rng.random() * 0.01, self._tick)
            return
        opening = self._encode(script.opening()) if rng.random() < 0.7 else b""
        self._opened = bool(opening)
        self._left = head + opening
        self._go_on()

    def _encode(self, events: list[bytes]) -> bytes:
        assert self._wire is not None and self.script is not None
        if not events:
            return b""
        wire = self._wire.encode(events, self.script)
        if self._wire.cut:
            self._cut = len(self._left) + self._wire.cut
        self._made = self._wire.offset
        return wire

    def _tick(self) -> None:
        script, rng = self.script, self.world.rng
        if self._over or self.transport is None or script is None:
            return
        if not self._opened:
            self._opened = True
            self._left += self._encode(script.opening())
        elif script.said >= self._fate_at and self._fate != "proper":
            self._meet_fate(script)
            return
        elif script.said >= script.total:
            self._left += self._encode(script.closing())
            if self._chunked and rng.random() < 0.04:
                self._leave_open()
            else:
                self._finish()
            return
        else:
            count = 1 if rng.random() < 0.93 else rng.randrange(2, 12)
            self._left += self._encode([script.token() for _ in range(count)])
            if rng.random() < 0.005 and self._wire is not None:
                self._left += self._wire.comment()
                self._made = self._wire.offset
        self._go_on()

    def _go_on(self) -> None:
        """Send the bytes made so far, mostly whole; then wait for the next token's time."""
        rng = self.world.rng
        left = self._left
        if self._over or self.transport is None:
            return
        cut, self._cut = self._cut, 0
        if cut:  # the rest comes as a read of its own
            self.world.loop.io(self._pause_s(), self._go_on)
        else:
            cut = len(left) if rng.random() < 0.93 else rng.randrange(len(left) + 1)
            self.world.loop.io(self._pause_s(), self._tick)
        self._left = left[cut:]
        self._send(left[:cut])

    def _pause_s(self) -> float:
        """The time until the next token: mostly the model's pace; now and then none, or a long pause."""
        rng = self.world.rng
        roll = rng.random()
        if roll < 0.1:  # several reads in as many turns, as after a stall
            return 0.0
        if roll > 0.995:
            return rng.uniform(0.5, 6.0)
        pace = 0.005 if self.script is not None and self.script.total >= LONG else self.world.pace_s
        return rng.uniform(0.5, 1.5) * pace

    def _meet_fate(self, script: Script) -> None:
        rng, fate = self.world.rng, self._fate
        if fate == "silent":
            return
        if fate == "too_large":
            self._left += self._encode([b"data: " + b"y" * (EVENT_BYTES_MAX + 1) + b"\n\n"])
            script.pending.pop()
        elif fate == "no_end":
            self._finish()
            return
        elif fate == "bad_chunk" and self._chunked:
            self._left += b"zz\r\nwhat\r\n"
        elif self._chunked:  # an answer that lasts until the close can't be cut
            self._left = self._left[: rng.randrange(len(self._left) + 1)]
        self._send(self._left)
        self._left = b""
        self.world.loop.io(0.0, self._hang_up, fate == "cut_fin")

    def _finish(self) -> None:
        """The framing's proper end."""
        script = self.script
        assert script is not None
        if self._chunked:
            self._left += b"0\r\n\r\n"
            self._made += 5
            script.ended = True
            self._pour_end()
        else:
            self._send(self._left)
            self._left = b""
            self.world.loop.io(0.0, self._hang_up, True)

    def _leave_open(self) -> None:
        """All events of the answer, but not the framing's end: it comes never, or the connection breaks off first."""
        rng = self.world.rng
        self._send(self._left)
        self._left = b""
        if rng.random() < 0.5:
            self.world.loop.io(rng.random() * 2, self._hang_up, rng.random() < 0.5)

    def _pour_end(self) -> None:
        rng = self.world.rng
        left = self._left
        if self._over or self.transport is None:
            return
        cut = len(left) if rng.random() < 0.8 else rng.randrange(1, len(left) + 1)
        self._left = left[cut:]
        self._send(left[:cut])
        if self._left:
            self.world.loop.io(rng.random() * 0.02, self._pour_end)
        else:
            self._rest()

    def _send(self, data: bytes) -> None:
        if data and self.transport is not None and not self._over:
            self.transport.receive(data)

    def delivers(self, length: int) -> None:
        self._read += length
        self.read_at = self.world.loop.now
        script = self.script
        if script is not None:
            script.given(self._read, self.read_at)
            script.read_whole = script.ended and self._read == self._made

    def _rest(self) -> None:
        """The answer is out: wait for another request, for a while."""
        rng = self.world.rng
        if self._over:
            return
        self.busy = False
        self._answers += 1
        if self._read == self._made:
            self.script = None  # else the relay has yet to read its end, when its turn comes
        self._wire = None
        self._opened = False
        self.world.loop.io(rng.choice((0.001, 0.5, 2.0, 5.0, 20.0)), self._idle_end, self._answers)
        if self._request:
            data, self._request = self._request, b""
            self.took(data)

    def _idle_end(self, answers: int) -> None:
        if not self.busy and self._answers == answers and not self._over:
            self._hang_up(self.world.rng.random() < 0.8)
