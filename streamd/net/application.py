"""The decisions of the layers above for connections: the plan for a request, the work after its end, its handing over.

The arrows point one way: this module and net/client.py know the answer, the answer knows neither of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from streamd.net.answer import Answer
from streamd.net.request import Request
from streamd.reasons import CloseReason


class BodySink(Protocol):
    """Takes a request's body while it arrives (publishing)."""

    must_flow: bool  # whether the body has to come at its least rate, because all of it is held until its end

    @property
    def is_blocked(self) -> bool:
        """Whether the sink takes nothing in this turn of the loop."""

    def body_piece(self, piece: bytes) -> int:
        """The next bytes. Returns the work done, in pieces (net/turns.py). May raise HttpError."""

    def body_end(self) -> None:
        """The body is complete: answer."""

    def body_lost(self, reason: CloseReason) -> None:
        """The rest of the body will not come, and no answer is possible any more."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan for serving a request, made from its head alone.

    Exactly one of these is set: `answer`, called once the whole body has come; `take_body`, which may raise HttpError
    and returns a sink for a body that is processed as it arrives; `owner`, the slot of the worker that serves this
    request.

    A body is held only if `answer` takes it (`keeps_body`), and then only from those whom `check` lets send it; any
    other is thrown away as it comes.
    """

    answer: Callable[[Answer], None] | None = None
    take_body: Callable[[Answer], BodySink] | None = None
    owner: int | None = None
    keeps_body: bool = False
    passes_encoded: bool = False  # whether `answer` takes a body with a Content-Encoding, which is read nowhere here
    check: Callable[[Request], None] | None = None  # called with the head; raises HttpError
    body_bytes_max: int = 0  # for `answer`; 0: the configured limit


class Leaving(NamedTuple):
    """A connection for another worker to take over, with the request that has begun on it."""

    transport: asyncio.Transport
    listener: str
    price_bytes: int
    remote: tuple[str, int] | None
    data: bytes  # received so far, from the head's first byte on


@dataclass(slots=True)
class Application:
    """The layers above, as connections see them."""

    plan: Callable[[Answer], Plan]  # may raise HttpError
    ended: Callable[[Answer], None]  # the request is over, and its reason is known
    hand_over: Callable[[int, Leaving], None]  # afterwards the transport has left the connection; may raise HttpError
