"""Exchanges as records: a request that is out at an upstream, with its account and the time limits that run."""

from __future__ import annotations

from typing import Final

from streamd.api.relayed_ask import AskPlace
from streamd.api.relayed_request import RelayedPlace
from streamd.core.usage import OVERLAP_BYTES, ChargeState, TallyState
from streamd.handover.record import RecordKind
from streamd.handover.requests import FIELDS, METHOD, TARGET
from streamd.handover.values import Bytes, Flag, Many, Maybe, Seconds, Text, TupleOf, WholeNumber, Word
from streamd.handover.wire_kinds import HELD_BYTES_MAX
from streamd.net.attempt import AttemptPlace
from streamd.net.exchange import ExchangeState
from streamd.net.exchange_place import CollectedPlace, ExchangePlace
from streamd.policy import Policy
from streamd.wire.heads import Framing

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
        "collected": Maybe(
            RecordKind(
                "collected",
                CollectedPlace,
                {
                    "status": WholeNumber(100, 999),
                    "reason": Bytes(1 << 16),
                    "headers": FIELDS,
                    "framing": Word(Framing),
                    "content_length": WholeNumber(0, 2**63 - 1),
                    "keep_alive": Flag(),
                    "body": Bytes(HELD_BYTES_MAX),
                    "bytes_max": WholeNumber(1),
                },
            )
        ),
    },
)
"""An exchange whose request is out."""

ASK: Final = RecordKind(
    "ask",
    AskPlace,
    {
        "method": METHOD,
        "model": _NAME,
        "at": _NAME,
        "path": TARGET,
        "query": TARGET,
        "request_id": Bytes(1 << 10),
        "body": Bytes(HELD_BYTES_MAX),
        "is_bodiless": Flag(),
        "keeps_position": Flag(),
        "secrets": FIELDS,
        "passed": FIELDS,
    },
)
"""A request that may have to be sent once more."""

RELAYED: Final = RecordKind(
    "relayed",
    RelayedPlace,
    {
        "policy": Word(Policy),
        "grace_s": Seconds(),
        "interval_s": Seconds(),
        "is_adaptive": Flag(),
        "wants_whole": Flag(),
        "key": _NAME,
        "body_hash": Bytes(64),
    },
)
"""The possessions of an exchange's request."""
