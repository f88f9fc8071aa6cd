"""Clients' connections as records, between two requests or in a head."""

from __future__ import annotations

from typing import Final

from streamd.handover.record import RecordKind
from streamd.handover.values import Bytes, Flag, Maybe, Seconds, Text, TupleOf, WholeNumber, Word
from streamd.handover.wire_kinds import HEAD, HELD_BYTES_MAX
from streamd.net.client import ClientState
from streamd.net.client_place import ClientPlace

CLIENT: Final = RecordKind(
    "client",
    ClientPlace,
    {
        "at": Word(ClientState),
        "listener": Text(32, str.isalpha),
        "price_bytes": WholeNumber(),
        "is_tunnelled": Flag(),
        "remote": Maybe(TupleOf(Text(64), WholeNumber(0, 65535))),
        "is_opening": Flag(),
        "due_at": Seconds(or_never=True),
        "behind": Bytes(HELD_BYTES_MAX),
        "head": Maybe(HEAD),
    },
)
"""A connection that expects a head, or the rest of a head."""
