"""Two workers of a daemon, in the test's own loop: each has its own listener, so that a test chooses the worker of a
connection, and `p.name_of(p.b)` is a name that lives in b.

They share only the means of two processes: datagrams with descriptors, and the mapping.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from loopback import FAST, PATIENCE_S, Daemon

from streamd.addresses import parse_address
from streamd.config import Settings, UpstreamSettings
from streamd.core.admission import SharedNumber
from streamd.daemon import listen, logs, shared
from streamd.daemon.budget import admission_of, budget_of
from streamd.daemon.shared import Shared
from streamd.daemon.worker import Worker
from streamd.mockllm import MockOptions, MockServer, start_mock
from streamd.net import client, inquiry
from streamd.net.peers import Peers


class Pair:
    """Workers a (slot 0) and b (slot 1)."""

    def __init__(self, mock: MockServer) -> None:
        self.mock = mock
        self.a: Daemon
        self.b: Daemon
        self.boards: list[Shared] = []
        self.peers: list[Peers] = []

    @property
    def both(self) -> tuple[Daemon, Daemon]:
        return self.a, self.b

    def slot_of(self, daemon: Daemon) -> int:
        return self.both.index(daemon)

    def name_of(self, daemon: Daemon, stem: str = "name") -> str:
        """A chosen name that this worker owns."""
        names = (f"{stem}-{k}" for k in range(1000))
        return next(name for name in names if self.peers[0].owner_of_name(name) == self.slot_of(daemon))

    @property
    def handed_over(self) -> int:
        return sum(each.runtime.counters.handed_over for each in self.both)

    def deaf(self, daemon: Daemon) -> None:
        """Stop this worker from reading its messages."""
        daemon.loop.remove_reader(self.peers[self.slot_of(daemon)]._inbox.fileno())

    def hears_again(self, daemon: Daemon) -> None:
        self.peers[self.slot_of(daemon)].start()


@contextlib.asynccontextmanager
async def pair(
    options: MockOptions = FAST,
    *,
    unix: Path | None = None,
    check: bool = True,
    answer_s: float = PATIENCE_S,
    **settings: Any,
) -> AsyncIterator[Pair]:
    """Both listen, on 127.0.0.1 or as unix/a and unix/b. Settings are the attributes of `Settings`, unchecked.

    `check`: nothing may be left at the end in either worker. `answer_s`: the time that a worker waits for the other's
    answer; with the usual second, a worker that a busy machine held up would be missing in lists.
    """
    level, broken_end_s, usual_answer_s = logs._sink.level, client.BROKEN_END_S, inquiry.ANSWER_S
    inquiry.ANSWER_S = answer_s
    logs.set_level("error")
    client.BROKEN_END_S = 0.0
    loop = asyncio.get_running_loop()
    mock = await start_mock(loop, options=options)
    given = Settings(upstreams=(UpstreamSettings(name="mock", url=mock.url),), workers=2, **settings)
    ends = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    fd = shared.create(2)
    p = Pair(mock)
    made = [await _worker(p, slot, given, fd, ends, unix) for slot in range(2)]
    p.a, p.b = made
    try:
        yield p
        if check:
            for conn in (*p.a._conns, *p.b._conns):
                conn.close()  # a connection may have moved to the other worker
            for each in p.both:
                await each.until(lambda each=each: not any(each.left().values()))
                for upstream in each.worker.upstreams:
                    upstream.close_idle()
            for each in p.both:
                await each.check_nothing_is_left()
    finally:
        for each, peers in zip(p.both, p.peers, strict=True):
            peers.stop()
            each.runtime.sweep.stop()
            each.close_listeners()
        for near, far in ends:
            near.close()
            far.close()
        os.close(fd)
        mock.close()
        logs._sink.level, client.BROKEN_END_S, inquiry.ANSWER_S = level, broken_end_s, usual_answer_s


async def _worker(
    p: Pair,
    slot: int,
    settings: Settings,
    fd: int,
    ends: list[tuple[socket.socket, socket.socket]],
    unix: Path | None,
) -> Daemon:
    loop = asyncio.get_running_loop()
    board = Shared(fd, 2, ["mock"], slot)
    board.started_at = loop.time()
    rng, budget = random.Random(slot), budget_of(settings)
    slots = len(SharedNumber)
    row, other = board.rows[slot], board.rows[1 - slot]
    admission = admission_of(settings, budget, row[:slots], [other[:slots]])  # type: ignore[index]
    worker = Worker(loop, settings, slot=slot, budget=budget, admission=admission, rng=rng)
    outlets, runtime = [end for _, end in ends], worker.runtime
    peers = Peers(loop, slot, board, ends[slot][0], outlets, runtime.counters, receiver=worker, on_bug=runtime.bug)
    worker.join(peers, board)
    p.boards.append(board)
    p.peers.append(peers)
    address = f"unix:{unix / 'ab'[slot]}" if unix is not None else "127.0.0.1:0"
    sock = listen.bind(parse_address(address))
    port = 0 if unix is not None else sock.getsockname()[1]
    await worker.listen([sock])
    worker.start()
    board.beat(loop.time())
    return Daemon(worker, p.mock, port)
