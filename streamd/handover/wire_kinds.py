"""Kinds of records for the parsers of wire/: a body, an event stream and a head between two reads, and an answer's
progress.
"""

from __future__ import annotations

from typing import Final

from streamd.handover.record import AnyOf, RecordKind
from streamd.handover.values import Bytes, Flag, Many, Mask, Maybe, Text, TupleOf, WholeNumber, Word
from streamd.wire.chunked import (
    TRAILER_BYTES_MAX,
    TRAILERS_MAX,
    ChunkedState,
    ChunkPart,
    LengthState,
    UntilCloseState,
)
from streamd.wire.dialects.api import CHOICE_INDEX_MAX, ProgressState
from streamd.wire.dialects.members import TOKENS_MAX
from streamd.wire.http1 import LEADING_LINES_MAX, HeadState
from streamd.wire.inner import InnerState
from streamd.wire.json_lines import LinesState
from streamd.wire.sse import Edge, SplitterState
from streamd.wire.strays import NAMES_MAX, StraysState

# Any one of a connection's parts: event_bytes_max may be 64 MiB, and the new process holds its own bounds.
HELD_BYTES_MAX: Final = 1 << 30

_HELD: Final = Bytes(HELD_BYTES_MAX)

DECODER: Final = AnyOf(
    RecordKind(
        "chunked",
        ChunkedState,
        {
            "is_loose": Flag(),
            "at": Word(ChunkPart),
            "data_bytes_left": WholeNumber(0, (1 << 32) - 1),
            "line": Bytes(TRAILER_BYTES_MAX),
            "trailers": WholeNumber(0, TRAILERS_MAX),
            "trailer_bytes": WholeNumber(0, TRAILER_BYTES_MAX),
        },
    ),
    RecordKind("length", LengthState, {"bytes_left": WholeNumber()}),
    RecordKind("until_close", UntilCloseState, {}),
)
"""A body's decoder. That of an encoded body can't be told: zlib has no words for its state."""

EVENTS: Final = RecordKind("events", SplitterState, {"held": _HELD, "edge": Word(Edge)})

SPLITTER: Final = AnyOf(
    EVENTS,
    RecordKind("inner_events", InnerState, {"splitter": EVENTS, "next_seq": WholeNumber(1)}),
    RecordKind("json_lines", LinesState, {"splitter": EVENTS, "line": _HELD}),
)
"""The splitter of an upstream's events."""

HEAD: Final = RecordKind("head", HeadState, {"held": _HELD, "leading_lines": WholeNumber(0, LEADING_LINES_MAX)})
"""A head that has begun."""

# An id of a response has 55 characters; the field is the upstream's, and its events are bounded.
_NAME: Final = Text(1 << 20)

_STRAYS: Final = RecordKind(
    "strays", StraysState, {"lines": WholeNumber(), "bytes": WholeNumber(), "names": Many(Text(64), NAMES_MAX)}
)

PROGRESS: Final = RecordKind(
    "progress",
    ProgressState,
    {
        "complete": Flag(),
        "terminal": Flag(),
        "failed": Flag(),
        "begun": Mask(CHOICE_INDEX_MAX + 1),
        "finished": Mask(CHOICE_INDEX_MAX + 1),
        "strays": Maybe(_STRAYS),
        "usage": Maybe(TupleOf(WholeNumber(0, TOKENS_MAX), WholeNumber(0, TOKENS_MAX))),
        "usage_at": WholeNumber(-1),
        "text_events": WholeNumber(),
        "text_bytes": WholeNumber(),
        "response_id": Maybe(_NAME),
        "sequence_number": Maybe(WholeNumber(-(2**63), 2**63 - 1)),
        "chunk_head": _HELD,
    },
)
"""How far an answer has come, by its dialect's rules."""
