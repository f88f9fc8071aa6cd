"""Readers of the simulation's nodes: an EventSource that comes back with its position, to any node, until it has all.

A reader judges each byte that it gets by the truth of its stream. The way from a request to a subscription is that of
api/streams.py, without HTTP: here or sought, sealed or ahead, 204, 410, 503.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sim_loop import must

from streamd.api.seeking import AHEAD_S, SEEK_S
from streamd.core.hub import Gone
from streamd.core.ring import Ring
from streamd.core.stream import Form, Policy, Stream, Subscriber, SubscriberState
from streamd.net.answer import Answer
from streamd.reasons import CloseReason

if TYPE_CHECKING:
    from sim_cluster import SimCluster
    from sim_generation import Generation
    from sim_node import Node

_GAP = re.compile(rb'"gap":\{"from":(\d+),"to":(\d+)\}').search
_LAST_ID = re.compile(rb'"last_id":"[^":]*:(\d+)"').search
TRIES_MAX = 40


class Connection(Answer):
    """A reader's connection: the sink of its subscriber, without HTTP.

    Why an Answer: followed streams send nothing else away.
    """

    __slots__ = ("client", "form", "is_open", "is_paused", "node")

    def __init__(self, client: Client, node: Node, form: Form) -> None:
        self.client = client
        self.node = node
        self.form = form
        self.is_open = True
        self.is_paused = False
        self.reader: Subscriber | None = None
        self.write = self._take

    def _take(self, frame: bytes) -> None:
        client = self.client
        if client.connection is not self:
            return  # the person has left
        if self.form is Form.CHUNKED:
            client.took(frame)
        else:
            client.took_raw(frame)
        rng, reader = client.cluster.rng, self.reader
        if reader is None or self.is_paused or not self.is_open or rng.random() >= 0.002:
            return
        if reader.state not in (SubscriberState.PAUSED, SubscriberState.BEHIND, SubscriberState.ENDED):
            self.is_paused = True
            reader.pause()
            client.cluster.loop.io(rng.choice((0.01, 0.5, 3.0)), self.node.loop.arrives, self._takes_more)

    def _takes_more(self) -> None:
        reader = self.reader
        self.is_paused = False
        if self.is_open and reader is not None and reader.state is not SubscriberState.ENDED:
            reader.resume()

    def write_large(self, parts: list[bytes | memoryview]) -> None:
        self._take(b"".join(parts))

    def soon(self, turn: Callable[[], None]) -> None:
        self.node.loop.call_soon(turn)

    def share_packets(self) -> None:
        pass

    def stream_ended(self, clean: bool) -> None:
        if self.client.connection is self:  # else the person has left meanwhile
            self.client.ended(clean)
        self.leave_soon(CloseReason.COMPLETE)

    def slow_consumer(self) -> None:
        assert self.reader is not None
        must(self.form is Form.RAW_BARE, "a reader that loses nothing is cut off")
        self.client.cut_off()
        self.leave_soon(CloseReason.SLOW_CONSUMER)

    def refused(self, error: Exception) -> None:
        raise error

    def send_away(self, reason: CloseReason, message: str, *, among: int | None = None) -> bool:
        reader = self.reader
        if not self.is_open or reader is None:
            return False
        reader.farewell(message=message, retry_ms=1000)
        self.client.sent_away(reason)
        self.leave_soon(reason)
        return True

    def leave_soon(self, reason: CloseReason) -> None:
        """The connection closes, in a callback of its own."""
        if self.is_open:
            self.is_open = False
            self.node.loop.call_soon(self._leave, reason)

    def _leave(self, reason: CloseReason) -> None:
        reader = self.reader
        assert reader is not None
        reader.end()
        self.node.hub.leave(reader, reason, self.node.loop.time())


class Seeker:
    """A request that waits for a stream of another node."""

    def __init__(self, client: Client, node: Node) -> None:
        self.client = client
        self.node = node
        self.is_over = False
        node.loop.call_later(SEEK_S, self._late)

    def _settle(self, then: Callable[..., None], *args: Any) -> None:
        must(not self.is_over, "a seeker hears two answers")
        self.is_over = True
        if self.client.seeker is self:
            self.client.seeker = None
            then(*args)

    def found(self, stream: Stream) -> None:
        self._settle(self.client.join, stream)

    def absent(self) -> None:
        self._settle(self.client.is_gone)

    def unreachable(self) -> None:
        self._settle(self.client.is_refused, "engine_unreachable")

    def _late(self) -> None:
        if not self.is_over:
            self.node.cluster.followed.give_up(self.client.generation.id, self)
            if not self.is_over:
                self._settle(self.client.is_refused, "engine_unreachable")


class Client:
    """A person's EventSource: it has a position, and comes back until it has the end."""

    def __init__(self, cluster: SimCluster, generation: Generation, *, raw: bool = False) -> None:
        self.cluster = cluster
        self.generation = generation
        self.form = Form.RAW_BARE if raw else Form.CHUNKED
        self.position = 1  # the seq that comes next
        self.is_told = False  # of its node's loss, behind the last position
        self.node: Node | None = None
        self.connection: Connection | None = None
        self.seeker: Seeker | None = None
        self.tries = 0
        self.joined_at = 0.0
        self.is_over = False
        self._gained = 0  # events of the try before
        generation.clients[self] = None
        cluster.clients[self] = None

    # -- asking

    def ask(self) -> None:
        """A request to a node that a balancer chooses."""
        cluster = self.cluster
        if self.is_over:
            return
        nodes = [node for node in cluster.nodes if node.is_serving]
        self.tries += 1
        if self.tries > TRIES_MAX and cluster.is_winding_down:
            self.finish("gives up")
            return
        if not nodes:
            self.again(1.0)
            return
        node = self.node = cluster.rng.choice(nodes)
        node.loop.arrives(self._arrive, node)

    def again(self, after_s: float) -> None:
        """Ask again, after about this time."""
        self.node = self.connection = self.seeker = None
        if not self.is_over:
            self.cluster.loop.io(after_s * self.cluster.rng.uniform(0.5, 1.5), self.ask)

    def _arrive(self, node: Node) -> None:
        if self.node is not node or self.is_over:
            return
        try:
            stream = node.hub.get(self.generation.id)
        except Gone:
            stream = None
        if stream is not None:
            self.join(stream)
            return
        self.cluster.seen["a stream is looked for"] += 1
        self.seeker = seeker = Seeker(self, node)
        if not node.cluster.followed.seek(self.generation.id, seeker):
            seeker._settle(self.is_refused, "engine_unreachable")

    def join(self, stream: Stream, until: float = 0.0) -> None:
        """As api/streams.py's join()."""
        node = self.node
        assert node is not None
        if node.loop.is_over:
            return
        position = self.position
        now = node.loop.time()
        if stream.terms.is_copy:
            if node.cluster.followed.is_stale(stream):
                self.is_refused("engine_unreachable")
                return
            if position > stream.log.seq_next and stream.reason is None:
                node.cluster.followed.awaited(stream, now)
                until = until or now + AHEAD_S
                if now >= until:
                    self.is_refused("engine_behind")
                else:
                    self.cluster.seen["a reader is ahead of the copy"] += 1
                    node.loop.call_later(0.25, self._join_later, node, stream, until)
                return
            self.cluster.seen["a reader is ahead of the end"] += position > stream.log.seq_next
        else:
            must(position <= stream.log.seq_next, "a reader is ahead of the owner", position, stream.log.seq_next)
        is_owed = stream.reason is CloseReason.NODE_LOST and not self.is_told
        if stream.reason is not None and position >= stream.log.seq_next and not is_owed:
            self._nothing_more(stream)
            return
        self._subscribe(node, stream, position)

    def _join_later(self, node: Node, stream: Stream, until: float) -> None:
        if self.node is not node or self.is_over:
            return
        if stream.reason is None and node.hub._streams.get(stream.id) is not stream:
            self.is_refused("engine_behind")
        else:
            self.join(stream, until)

    def _subscribe(self, node: Node, stream: Stream, position: int) -> None:
        connection = self.connection = Connection(self, node, self.form)
        reader = Subscriber(stream, connection, policy=Policy.COALESCE, ring=Ring(32, 32 * 1024), form=self.form)
        connection.reader = reader
        self.joined_at = self.cluster.loop.now
        if self.is_told and stream.reason is None:
            self.cluster.seen["a reader of a lost stream goes on"] += 1
        node.hub.rejoin(stream, reader)
        reader.start(position)

    # -- bytes that come

    def took(self, data: bytes) -> None:
        """Frames of the shared form."""
        at, end = 0, len(data)
        generation = self.generation
        while at < end:
            line = data.index(b"\r\n", at)
            start = line + 2
            stop = start + int(data[at:line], 16)
            piece = data[start:stop]
            at = stop + 2
            if not piece.startswith(b"id: "):
                self._took_farewell(piece)
                continue
            head, _, event = piece.partition(b"\n")
            number = head.rpartition(b":")[2]
            if number.endswith(b"!"):
                self._took_loss(int(number[:-1]))
                continue
            seq = int(number)
            if generation.covers(self.position, seq, event):
                self.position = seq + 1
                self.is_told = False
                self._gained += 1
            else:
                self._took_gap(seq, event)

    def took_raw(self, data: bytes) -> None:
        """Events' own bytes."""
        at, events = 0, self.generation.events
        while at < len(data):
            must(self.position <= len(events), "bytes beyond the truth", self._where())
            event = events[self.position - 1]
            must(data.startswith(event, at), "wrong bytes", self._where(), data[at : at + 200])
            at += len(event)
            self.position += 1
            self.is_told = False
            self._gained += 1

    def _took_gap(self, seq: int, event: bytes) -> None:
        gap = _GAP(event)
        must(gap is not None, "wrong event", self._where(), seq, event[:200])
        assert gap is not None
        first, last = int(gap[1]), int(gap[2])
        must(first == self.position and last == seq, "a gap at another place", self._where(), first, last)
        log = self.generation.stream.log
        # Every node keeps to the log's bounds by itself, and drops an eighth at once.
        is_full = log.seq_first > 1 or log.bytes_held * 4 > log.bytes_max * 3 or log.seq_next * 4 > log.events_max * 3
        must(is_full, "a gap in a log that has room", self._where(), first, last)
        self.cluster.seen["a gap is told"] += 1
        self.position = last + 1

    def _took_loss(self, seq: int) -> None:
        """The loss is told; the next request has this position."""
        must(self.generation.declared, "a loss that nobody declared", self._where())
        must(seq + 1 >= self.position, "a loss is told behind events that the reader has", self._where(), seq)
        self.is_told = True
        self.position = seq + 1

    def _took_farewell(self, piece: bytes) -> None:
        last = _LAST_ID(piece)
        must(last is not None and b"reconnect" in piece, "lines that are no event", self._where(), piece[:200])
        assert last is not None
        must(int(last[1]) == self.position - 1, "sent away with another position", self._where(), last[1])

    def _where(self) -> str:
        node = self.node.name if self.node is not None else "no node"
        return f"{self.generation.id} of {self.generation.node.name} at {node}, position {self.position}"

    # -- how it ends

    def ended(self, clean: bool) -> None:
        """The answer is over."""
        connection, generation, cluster = self.connection, self.generation, self.cluster
        assert connection is not None and connection.reader is not None
        stream = connection.reader.stream
        reason = stream.reason
        if reason is CloseReason.NODE_LOST:
            must(not clean, "a lost stream ends cleanly", self._where())
            cluster.told_of_loss(self, stream)
            self.is_told = True
            self.tries += 3
            if cluster.rng.random() < 0.6:
                self.again(cluster.rng.choice((0.2, 3.0, 15.0)))
            else:
                self.finish("lost")
            return
        must(reason is generation.reason and clean == generation.clean, "another end", self._where(), reason, clean)
        must(self.position == len(generation.events) + 1, "the end before all events", self._where())
        self.finish("has all")

    def _nothing_more(self, stream: Stream) -> None:
        """204."""
        if stream.reason is CloseReason.NODE_LOST:
            self.cluster.seen["204: the reader knows of the loss"] += 1
            self.finish("lost")
            return
        must(stream.reason is self.generation.reason, "204 with another end", self._where(), stream.reason)
        must(self.position >= len(self.generation.events) + 1, "204 before the end", self._where())
        self.finish("has all")

    def is_gone(self) -> None:
        """410."""
        self.cluster.judge_gone(self)
        self.finish("gone")

    def is_refused(self, code: str) -> None:
        """503 with Retry-After."""
        self.cluster.seen[f"503 {code}"] += 1
        self.cluster.judge_refusal(self, code)
        self.again(1.0)

    def cut_off(self) -> None:
        """A reader without gaps lost events: its log has dropped them."""
        self.finish("cut off")

    def sent_away(self, reason: CloseReason) -> None:
        """`event: reconnect`, or a cut for a reader of raw bytes."""
        if reason is CloseReason.ENGINE_UNREACHABLE:
            self.cluster.seen["reconnect is told"] += 1
            self.cluster.judge_sent_away(self)
        self.again(1.0)

    def broken(self) -> None:
        """The node is dead, and the connection with it."""
        if not self.is_over:
            self.again(0.5)

    def leave(self) -> None:
        """The person closes the page; perhaps it comes back."""
        connection, seeker, node = self.connection, self.seeker, self.node
        if self.is_over or node is None or node.loop.is_frozen or node.loop.is_over:
            return
        if seeker is not None:
            self.seeker = None
            seeker.is_over = True
            node.cluster.followed.give_up(self.generation.id, seeker)
        if connection is not None and connection.is_open:
            connection.leave_soon(CloseReason.READER_GONE)
        if self.cluster.rng.random() < 0.8:
            self.again(self.cluster.rng.choice((0.1, 2.0, 10.0)))
        else:
            self.finish("leaves")

    def finish(self, how: str) -> None:
        """The person has all that there is, or has no interest any more."""
        self.is_over = True
        self.node = self.connection = self.seeker = None
        self.cluster.seen[f"a reader {how}"] += 1
        self.generation.clients.pop(self, None)
        self.cluster.clients.pop(self, None)
