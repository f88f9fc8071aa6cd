"""Handshakes: TLS handshakes have a share of each turn of the loop, and wait for it.

A step of a handshake is the dearest thing that a stranger can ask for: a signature and a key exchange take 0.3 ms with
an elliptic curve, and 4 to 7 ms with an RSA key of 4,096 bits, for a hello that was prepared once. So the steps wait
here, round robin by the client's address, and a turn does HANDSHAKES_S_MAX of them, at least one. Their cost depends on
the certificate and the machine; that's why it is measured and not counted, as other work is (net/turns.py).

The queue is bounded by HANDSHAKES_MAX, and the wait by head_timeout, which runs from accept. When the queue is full,
the newest handshake of the address that has most in it is given up: a flood from an address displaces itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, Protocol

from streamd.net.turns import Rotation

# A quarter of the 20 ms between two tokens of a fast model.
HANDSHAKES_S_MAX: Final = 0.005

# 10 s of head_timeout hold 1,400 handshakes with the dearest usual key; more would wait in vain.
HANDSHAKES_MAX: Final = 2048


class Shaking(Protocol):
    """A connection in its handshake."""

    def shake(self) -> None:
        """Do the next step, with all bytes that have come. The connection may be gone."""

    def give_up(self) -> None:
        """The queue is full: close the connection."""


class Handshakes:
    """One per loop."""

    __slots__ = ("_clock", "_is_due", "_loop", "_on_bug", "_rotation")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_bug: Callable[[str, Exception], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._loop = loop
        self._on_bug = on_bug
        self._clock = clock  # of the loop's own there is one reading a turn
        self._rotation: Rotation[Shaking] = Rotation()
        self._is_due = False  # _turn() is scheduled

    @property
    def waiting(self) -> int:
        """The number of handshakes that wait."""
        return self._rotation.count

    def wait(self, member: Shaking, address: str) -> None:
        """Call the member's shake() when it is its turn. The member waits at most once."""
        self._rotation.add(address, member)
        if self._rotation.count > HANDSHAKES_MAX:
            self._rotation.pop_surplus().give_up()
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._is_due = False
        until = self._clock() + HANDSHAKES_S_MAX
        while self._rotation.count:
            try:
                self._rotation.pop().shake()
            except Exception as error:
                self._on_bug("handshakes.shake", error)
            if self._clock() >= until:
                break
        if self._rotation.count and not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._turn)
