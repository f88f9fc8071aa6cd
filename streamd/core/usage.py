"""Charge: the cost of a request to its key: the request itself, and the tokens of an answer that passes as bytes.

A stream's text events are counted as they come (core/hub.py). A whole answer is searched for its usage as it passes,
from its first byte to its last, because a client decides how much stands behind `usage`: servers say `metadata` and
tools back. It is neither parsed nor held up, and only the bytes of a number that may be cut are kept. The largest count
in it is charged, so that no echo in the client's hand lowers it; servers say usage once, or count upwards. A text in
the answer can't pass as the number: in a JSON string the quote behind the name would have a backslash in front of it.
Events that pass as bytes and state no usage cost a token each, or a request that asks for no stream would be free where
the server streams all the same.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from streamd.core.auth import Key
from streamd.core.limits import Account
from streamd.core.refusal import Refusal
from streamd.wire.dialects.api import tokens_made, tokens_read, tokens_stated

# The longest of: a name, a colon between spaces, a number. A few names have 20 characters.
OVERLAP_BYTES: Final = 128

_EVENT: Final = b"\ndata:"


class TallyState(NamedTuple):
    """A Tally between two pieces of an answer."""

    found: tuple[tuple[bytes, int], ...]
    tail: bytes


class ChargeState(NamedTuple):
    """A Charge between two pieces of an answer."""

    has_stream: bool
    events: int
    pays_tokens: bool
    tail: bytes
    tally: TallyState
    is_asked: bool


class Tally:
    """The tokens that an answer states, searched in its bytes as they pass."""

    __slots__ = ("_found", "_tail")

    def __init__(self) -> None:
        self._tail = b""
        self._found: dict[bytes, int] = {}  # the largest count of each name

    def state(self) -> TallyState:
        """What go_on_from() takes."""
        return TallyState(tuple(self._found.items()), self._tail)

    def go_on_from(self, state: TallyState) -> None:
        """Take the state of another tally. Raises ValueError for a state that none has."""
        if len(state.tail) > OVERLAP_BYTES or any(count < 0 for _, count in state.found):
            raise ValueError("a tally of tokens that can't be")
        self._found, self._tail = dict(state.found), state.tail

    def passed(self, piece: bytes) -> None:
        """The next bytes."""
        self._search(self._tail + piece)
        self._tail = (self._tail + piece[-OVERLAP_BYTES:])[-OVERLAP_BYTES:]

    def over(self) -> tuple[int, int]:
        """No more bytes come: the input and the output tokens."""
        self._search(self._tail + b" ")  # the answer may have been cut behind a number
        return tokens_read(self._found), tokens_made(self._found)

    def _search(self, data: bytes) -> None:
        for name, count in tokens_stated(data):
            self._found[name] = max(count, self._found.get(name, 0))


class Charge:
    """A counted request. Call `asked` when it reaches an upstream, and `over` once, at its end."""

    __slots__ = (
        "_account",
        "_events",
        "_has_stream",
        "_is_asked",
        "_is_over",
        "_key",
        "_pays_tokens",
        "_tail",
        "_tally",
    )

    def __init__(self, account: Account, key: Key, *, pays_tokens: bool) -> None:
        """Counts the request."""
        account.count_request()
        self._account = account
        self._key = key
        self._has_stream = False
        self._events = 0
        self._pays_tokens = pays_tokens
        self._tail = b""  # of a stream, in which events are counted
        self._tally = Tally()
        self._is_asked = False
        self._is_over = False

    def state(self) -> ChargeState:
        """What continued() takes."""
        return ChargeState(
            self._has_stream, self._events, self._pays_tokens, self._tail, self._tally.state(), self._is_asked
        )

    @classmethod
    def continued(cls, account: Account, key: Key, state: ChargeState) -> Charge:
        """A charge that goes on from this state; another process has counted its request, and gives
        its stream back, if it has one, with leave().

        Raises ValueError for a state that no charge has.
        """
        if len(state.tail) >= len(_EVENT) or state.events < 0 or (state.events and not state.has_stream):
            raise ValueError("a charge of an answer that can't be")
        if state.has_stream:
            account.adopt_stream()
        charge = cls.__new__(cls)
        charge._account, charge._key = account, key
        charge._has_stream, charge._events, charge._pays_tokens = state.has_stream, state.events, state.pays_tokens
        charge._tail, charge._tally = state.tail, Tally()
        charge._tally.go_on_from(state.tally)
        charge._is_asked, charge._is_over = state.is_asked, False
        return charge

    def leave(self) -> None:
        """The charge goes on in another process."""
        self._is_over = True
        if self._has_stream:
            self._account.close_stream()

    def asked(self) -> None:
        """The request has reached an upstream."""
        self._is_asked = True

    def open_stream(self) -> Refusal | None:
        """An answer that passes as bytes turns out to be a stream: it is one of the key's streams until its end."""
        refusal = self._account.open_stream(self._key)
        self._has_stream = refusal is None
        self._tail = b"\n"  # the first event begins a line
        return refusal

    def passed(self, piece: bytes) -> None:
        """The next bytes of an answer."""
        if self._pays_tokens:
            self._tally.passed(piece)
            if self._has_stream:
                self._events += (self._tail + piece).count(_EVENT)
                self._tail = (self._tail + piece[1 - len(_EVENT) :])[1 - len(_EVENT) :]

    def over(self) -> None:
        """Charge the tokens that the answer stated, or give back a request that reached no upstream."""
        if self._is_over:
            return
        self._is_over = True
        if not self._is_asked:
            self._account.give_back_request()
        if self._has_stream:
            self._account.close_stream()
        self._account.count_tokens(self._tally.over()[1] or self._events)
