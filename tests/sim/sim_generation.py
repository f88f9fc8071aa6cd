"""A stream of a node, and the truth about it: every event that its source gave, and its end."""

from __future__ import annotations

import random
from bisect import bisect_right
from typing import TYPE_CHECKING

from streamd.core.stream import Firsts, Stream
from streamd.core.terms import Terms
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect

if TYPE_CHECKING:
    from sim_client import Client
    from sim_cluster import SimCluster
    from sim_node import Node

# The shapes of events with text; neighbouring texts of a shape may reach a reader as one event.
_SHAPES = (
    b'data: {"id":"c1","choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n',
    b'data: {"id":"c1","choices":[{"index":0,"delta":{"reasoning_content":"%b"}}]}\n\n',
)
WHOLE = len(_SHAPES)  # the shape of all other events
_DONE = b"data: [DONE]\n\n"
LENGTHS = (3, 10, 40, 40, 120, 120, 400)
# Bytes of a text: mostly a token's, now and then more than an entry of a copy or a piece of a log holds.
_SIZES = (4,) * 60 + (40,) * 6 + (700,) * 2 + (5_000, 20_000)


def event_of(shape: int, text: bytes) -> bytes:
    """The event of this shape with this text."""
    return _SHAPES[shape] % text


class Generation:
    """The source of a stream, at the node that owns it."""

    needs_reader = False
    watch: Firsts | None = None

    def __init__(self, cluster: SimCluster, node: Node) -> None:
        rng = cluster.rng
        self.cluster = cluster
        self.rng: random.Random = rng
        self.node = node
        self.left = rng.choice(LENGTHS)
        self.pace_s = rng.choice((0.03, 0.1, 0.3))
        self.retention_s = rng.choice((1.0, 15.0, 40.0))
        terms = Terms(published=True, retention_s=self.retention_s, catchup_bytes_max=rng.choice((1024, 16 * 1024)))
        self.stream: Stream = node.hub.open(Dialect.CHAT, node.loop.time(), terms=terms)
        self.stream.source = self
        self.id = self.stream.id
        self.key = cluster.keys.log(self.id)
        self.server = cluster.server_of(self.id)
        # the truth
        self.events: list[bytes] = []
        self.shapes: list[int] = []
        self.texts: list[bytes] = []
        self.times: list[float] = []  # when each event came
        self.ended_at = 0.0
        self.reason: CloseReason | None = None
        self.clean = False
        self.declared = 0  # how often another member ended it
        self.clients: dict[Client, None] = {}
        self.is_removed = False
        self.is_cancelled = False
        cluster.loop.io(rng.random() * 0.2, self._go_on)

    # -- as the stream's source

    def cancel(self, reason: CloseReason) -> None:
        """As a Source."""
        self.is_cancelled = True

    def on_terminal(self, now: float) -> None:
        """As a Source."""

    # -- questions to the truth

    @property
    def is_owned(self) -> bool:
        """Whether the node that owns it lives."""
        return not self.node.loop.is_over

    def seq_at(self, time: float) -> int:
        """The last seq at this time."""
        return bisect_right(self.times, time)

    def covers(self, position: int, seq: int, event: bytes) -> bool:
        """Whether the event is that of these seqs, position <= seq: its own, or the texts of several in one."""
        if seq > len(self.events) or position < 1:
            return False
        if position == seq:
            return event == self.events[seq - 1]
        shape = self.shapes[seq - 1]
        if shape == WHOLE or self.shapes[position - 1 : seq] != [shape] * (seq - position + 1):
            return False
        return event == event_of(shape, b"".join(self.texts[position - 1 : seq]))

    # -- its life

    def _go_on(self) -> None:
        """The next events, or the end."""
        cluster, rng, loop = self.cluster, self.rng, self.cluster.loop
        if self.node.loop.is_over or self.is_cancelled or self.reason is not None:
            return
        if self.node.loop.is_frozen:
            loop.io(0.1, self._go_on)
            return
        if self.left <= 0:
            self._end()
            return
        count = min(self.left, rng.choice((1, 1, 1, 1, 1, 1, 1, 2, 5)))
        self.left -= count
        self._give([self._next() for _ in range(count)])
        silence = 1.0 if rng.random() > 0.01 else rng.choice((30.0, 100.0))
        loop.io(self.pace_s * silence * rng.expovariate(1.0), self._go_on)
        if cluster.is_winding_down:
            self.left = 0

    def _next(self) -> tuple[int, bytes]:
        rng = self.rng
        size = rng.choice(_SIZES)
        if rng.random() < 0.03:
            return WHOLE, b"x" * (200_000 if rng.random() < 0.005 else size)
        shape = 0 if rng.random() < 0.97 else 1
        return shape, b"%d " % len(self.events) + b"t" * rng.randrange(size)

    def _give(self, given: list[tuple[int, bytes]]) -> None:
        """Append these events, which are the truth from now on."""
        loop, stream = self.cluster.loop, self.stream
        events = []
        for shape, text in given:
            event = b'data: {"id":"c1","n":%d,"whole":"%b"}\n\n' % (len(self.events), text)
            if shape != WHOLE:
                event = event_of(shape, text)
            events.append(event)
            self._note(shape, text, event)
        now = self.node.loop.time()
        loop.steps += len(events)
        if len(events) == 1:
            stream.append(events[0], now)
        else:
            stream.append_all(events, now)
        self.cluster.check_local(self)

    def _note(self, shape: int, text: bytes, event: bytes) -> None:
        self.shapes.append(shape)
        self.texts.append(text)
        self.events.append(event)
        self.times.append(self.cluster.loop.now)

    def _end(self) -> None:
        rng, stream, now = self.rng, self.stream, self.node.loop.time()
        self.ended_at = self.cluster.loop.now
        self.cluster.loop.steps += 1
        fails = rng.random() < 0.15
        if fails:
            self.reason, self.clean = CloseReason.UPSTREAM_RESET, False
            event = stream._error(self.reason, "The upstream broke off.", stream._next_number())
            self._note(WHOLE, b"", event)
            stream.fail(self.reason, now, message="The upstream broke off.")
        else:
            if rng.random() < 0.8:
                self._note(WHOLE, b"", _DONE)
                stream.append(_DONE, now)
            self.reason, self.clean = CloseReason.COMPLETE, True
            stream.seal(self.reason, now, clean=True)
        self.cluster.check_local(self)

    def stop(self) -> None:
        """Its node drains: the generation is cut."""
        if self.reason is not None or self.is_cancelled:
            return
        stream = self.stream
        self.ended_at = self.cluster.loop.now
        self.reason, self.clean = CloseReason.RESTARTED, False
        event = stream._error(self.reason, "The node restarts.", stream._next_number())
        self._note(WHOLE, b"", event)
        stream.fail(self.reason, self.node.loop.time(), message="The node restarts.")
