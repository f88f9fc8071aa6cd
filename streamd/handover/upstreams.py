"""Connections to upstreams as records. The asker and the stream have records of their own."""

from __future__ import annotations

from typing import Final

from streamd.handover.record import RecordKind
from streamd.handover.values import Bytes, Flag, Maybe, Seconds, Text, WholeNumber, Word
from streamd.handover.wire_kinds import DECODER, HEAD, HELD_BYTES_MAX, SPLITTER
from streamd.net.upstream import INTERIM_ANSWERS_MAX, UpstreamState
from streamd.net.upstream_place import UpstreamPlace

UPSTREAM: Final = RecordKind(
    "upstream",
    UpstreamPlace,
    {
        "at": Word(UpstreamState),
        "method": Text(64, str.isascii),
        "read": Maybe(Bytes(HELD_BYTES_MAX)),
        "head": Maybe(HEAD),
        "decoder": Maybe(DECODER),
        "splitter": Maybe(SPLITTER),
        "keep_alive": Flag(),
        "any_byte": Flag(),
        "answers": WholeNumber(),
        "interim_answers": WholeNumber(0, INTERIM_ANSWERS_MAX),
        "idle_since": Seconds(),
        "touched_at": Seconds(),
        "read_at": Seconds(),
    },
)
"""A connection to an upstream, idle or in the middle of a request."""
