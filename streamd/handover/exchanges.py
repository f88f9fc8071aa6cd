"""Exchanges as records: a request that is out at an upstream, with its account and the time limits that run."""

from __future__ import annotations

from typing import Final

from streamd.core.usage import OVERLAP_BYTES, ChargeState, TallyState
from streamd.handover.record import RecordKind
from streamd.handover.values import Bytes, Flag, Many, Maybe, Seconds, Text, TupleOf, WholeNumber, Word
from streamd.net.attempt import AttemptPlace
from streamd.net.exchange import ExchangeState
from streamd.net.exchange_place import ExchangePlace
from streamd.policy import Policy

_NAME: Final = Text(256)

TALLY: Final = RecordKind(
    "tally",
    TallyState,
    {"found": Many(TupleOf(Bytes(OVERLAP_BYTES), WholeNumber()), 64), "tail": Bytes(OVERLAP_BYTES)},
)
"""The tokens that an answer has stated so far."""

CHARGE: Final = RecordKind(
    "charge",
    ChargeState,
    {
        "has_stream": Flag(),
        "events": WholeNumber(),
        "pays_tokens": Flag(),
        "tail": Bytes(OVERLAP_BYTES),
        "tally": TALLY,
        "is_asked": Flag(),
    },
)
"""A request that a key pays for."""

EXCHANGE: Final = RecordKind(
    "exchange",
    ExchangePlace,
    {
        "state": Word(ExchangeState),
        "policy": Word(Policy),
        "may_be_foreign": Flag(),
        "tried": Many(_NAME),
        "stale_links": WholeNumber(0, 1),
        "started_at": Seconds(),
        "due_at": Seconds(or_never=True),
        "ends_at": Seconds(or_never=True),
        "attempt": RecordKind(
            "attempt",
            AttemptPlace,
            {
                "upstream": _NAME,
                "method": Text(64, str.isascii),
                "principal": Maybe(_NAME),
                "began_at": Seconds(),
                "asked_at": Seconds(),
                "is_reused": Flag(),
            },
        ),
        "charge": Maybe(CHARGE),
        "tally": Maybe(TALLY),
    },
)
"""An exchange whose request is out."""
