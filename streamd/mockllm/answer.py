"""An answer in progress: its next step, the time of that step, and the fault that it shall have.

The server wakes an answer at `due`; the answer writes at most once, and says whether it is to be woken again. While its
connection takes no bytes it skips its turns: tokens are made when they are written, so a stalled reader costs no memory
here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain
from typing import Final, Protocol

from streamd.mockllm.options import MockOptions
from streamd.mockllm.shape import Cutter
from streamd.mockllm.wheel import SLOT_S
from streamd.wire import chunked

GARBAGE_STATUS: Final = b"HTTP/1.1 banana split\r\n\r\n"
BAD_CHUNK: Final = b"zz\r\n"
HEAD_UNSENT: Final = -1


class Body(Protocol):
    """The bytes of an answer's body, in steps (streamd.mockllm.shape)."""

    def preamble(self) -> bytes:
        """The bytes sent with the head."""

    def tokens(self) -> Iterator[bytes]:
        """The steps after the preamble, each sent when it is due."""

    def tail(self) -> bytes:
        """The last bytes."""


class Peer(Protocol):
    """The connection, as an answer sees it."""

    paused: bool

    def write(self, wire: bytes) -> None:
        """Send bytes."""

    def complete(self) -> None:
        """The answer is whole."""

    def break_off(self, reset: bool) -> None:
        """End the connection in the middle of the answer, with RST or FIN."""


class MockAnswer:
    """An answer. `due` is the time at which it wants to be woken (seconds, monotonic)."""

    __slots__ = (
        "_body",
        "_chunked",
        "_cutter",
        "_head",
        "_last",
        "_options",
        "_peer",
        "_random",
        "_sent",
        "_step_due",
        "_stop",
        "_tokens",
        "_writes",
        "due",
        "over",
    )

    def __init__(
        self,
        peer: Peer,
        head: bytes,
        body: Body,
        is_chunked: bool,
        options: MockOptions,
        due: float,
        draw: random.Random,
    ) -> None:
        # connection and server
        self._peer = peer
        self._random = draw
        # answer
        self._head = head
        self._body = body
        self._chunked = is_chunked
        self._options = options
        self._stop = options.faults.stops_after()
        self._cutter = _cutter(options, is_chunked)
        # progress
        self.due = self._step_due = due
        self.over = False
        self._sent = HEAD_UNSENT  # tokens sent; HEAD_UNSENT <= _sent <= _stop, if there is a _stop
        self._tokens: Iterator[bytes] = iter(())
        self._last = False  # the last step has been handed out
        self._writes: Iterator[bytes] | None = None  # the cutter's remaining writes of the last step

    def wake(self, now: float) -> bool:
        """Send the bytes that are due. Sets `due` and returns True, or returns False if nothing will be due again."""
        if self.over:
            return False
        if self._peer.paused:
            self._step_due = self.due = now + max(self._options.interval_s, SLOT_S)
            return True
        if self._writes is not None:
            return self._write_next(now)
        return self._begin(now) if self._sent == HEAD_UNSENT else self._step(now)

    def send_head_early(self) -> None:
        """Send the head before its time."""
        self._peer.write(self._head)
        self._head = b""

    def _begin(self, now: float) -> bool:
        faults = self._options.faults
        if faults.garbage_status or faults.reset_in_head:
            self._peer.write(GARBAGE_STATUS if faults.garbage_status else self._head[: len(self._head) // 2])
            self._break_off(reset=faults.reset_in_head)
            return False
        if faults.stall == 0:
            return False
        self._sent = 0
        self._tokens = self._body.tokens()
        return self._send(self._body.preamble(), now, last=False)

    def _step(self, now: float) -> bool:
        if self._stop is not None and self._sent >= self._stop:
            return self._fail()
        token = next(self._tokens, None)
        if token is not None:
            self._sent += 1
            return self._send(token, now, last=False)
        if self._stop is not None:
            return self._fail()
        return self._send(self._body.tail(), now, last=True)

    def _send(self, payload: bytes, now: float, last: bool) -> bool:
        """Send a step, behind the head if that is still unsent. `last`: the body ends with this step."""
        head, self._head = self._head, b""
        self._last = last
        self._plan(now)
        if self._cutter is not None:
            writes = self._cutter.step(payload, last)
            self._writes = chain(self._cutter.head(head), writes) if head else writes
            return self._write_next(now)
        wire = head + self._frame(payload) + (chunked.LAST_CHUNK if last and self._chunked else b"")
        if wire:
            self._peer.write(wire)
        return not last or self._complete()

    def _write_next(self, now: float) -> bool:
        """Do one of the cutter's writes; the next is due in the next loop turn, so that the peer reads them apart."""
        assert self._writes is not None
        wire = next(self._writes, None)
        if wire is not None:
            self._peer.write(wire)
            self.due = now
            return True
        self._writes = None
        self.due = self._step_due
        return not self._last or self._complete()

    def _plan(self, now: float) -> None:
        """Set the time of the next step: an even interval after the last step, but no burst after a delay."""
        options = self._options
        interval_s = options.interval_s
        if options.jitter_s:
            interval_s = max(0.0, interval_s + self._random.uniform(-options.jitter_s, options.jitter_s))
        self._step_due = self.due = max(self._step_due + interval_s, now)

    def _frame(self, payload: bytes) -> bytes:
        return chunked.encode_chunk(payload) if payload and self._chunked else payload

    def _complete(self) -> bool:
        self.over = True
        self._peer.complete()
        return False

    def _fail(self) -> bool:
        """Do the fault that ends the answer."""
        faults = self._options.faults
        wire = self._cutter.flush() if self._cutter is not None else b""
        if faults.half:
            event = next(self._tokens, None) or self._body.tail()
            wire += self._frame(event[: len(event) // 2])
        if faults.bad_chunk is not None:
            wire += BAD_CHUNK
        if wire:
            self._peer.write(wire)
        if faults.break_fin is not None or faults.break_rst is not None:
            self._break_off(reset=faults.break_rst is not None)
        return False

    def _break_off(self, reset: bool) -> None:
        self.over = True
        self._peer.break_off(reset)


def _cutter(options: MockOptions, is_chunked: bool) -> Cutter | None:
    faults = options.faults
    return Cutter(faults, is_chunked) if faults.bytewise or faults.cuts is not None else None
