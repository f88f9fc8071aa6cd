"""Clients' connections as records: between two requests, in a body, or with an answer under way."""

from __future__ import annotations

from typing import Final

from streamd.handover.record import RecordKind
from streamd.handover.streams import READER
from streamd.handover.values import Bytes, Flag, Maybe, Seconds, Text, TupleOf, WholeNumber, Word
from streamd.handover.wire_kinds import DECODER, HEAD, HELD_BYTES_MAX
from streamd.net.answer import AnswerState
from streamd.net.client import ClientState
from streamd.net.client_place import AnswerPlace, ClientPlace, IntakePlace
from streamd.wire.heads import Framing

_COUNT: Final = WholeNumber()

ANSWER: Final = RecordKind(
    "answer",
    AnswerPlace,
    {
        "state": Word(AnswerState),
        "framing": Word(Framing),
        "body_bytes": _COUNT,
        "wrote_at": Seconds(),
        "reader": Maybe(READER),
    },
)
"""An answer that has begun, or is awaited."""

INTAKE: Final = RecordKind(
    "intake",
    IntakePlace,
    {
        "decoder": DECODER,
        "came_bytes": _COUNT,
        "thrown_bytes": _COUNT,
        "windows": _COUNT,
        "held": Maybe(Bytes(HELD_BYTES_MAX)),
    },
)
"""A request's body that has begun."""

CLIENT: Final = RecordKind(
    "client",
    ClientPlace,
    {
        "at": Word(ClientState),
        "listener": Text(32, str.isalpha),
        "price_bytes": _COUNT,
        "is_tunnelled": Flag(),
        "remote": Maybe(TupleOf(Text(64), WholeNumber(0, 65535))),
        "is_opening": Flag(),
        "due_at": Seconds(or_never=True),
        "behind": Bytes(HELD_BYTES_MAX),
        "head": Maybe(HEAD),
        "answer": Maybe(ANSWER),
        "intake": Maybe(INTAKE),
    },
)
"""A client's connection, without its request."""
