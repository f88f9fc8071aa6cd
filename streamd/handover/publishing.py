"""Publishers and their requests as records."""

from __future__ import annotations

from typing import Final

from streamd.api.publish import PublisherPlace, PublishingPlace
from streamd.handover.record import RecordKind
from streamd.handover.values import Bytes, Flag, Maybe, Seconds, Text, WholeNumber
from streamd.handover.wire_kinds import EVENTS, HELD_BYTES_MAX
from streamd.wire.publish import PUBLICATIONS, PublicationState

_COUNT: Final = WholeNumber()

PUBLISHER: Final = RecordKind("publisher", PublisherPlace, {"fence": _COUNT, "due_at": Seconds(or_never=True)})
"""The source of a published stream."""

PUBLISHING: Final = RecordKind(
    "publishing",
    PublishingPlace,
    {
        "media_type": Text(64, PUBLICATIONS.__contains__),
        "publication": RecordKind(
            "publication",
            PublicationState,
            {
                "done": Flag(),
                "containers": _COUNT,
                "seen": _COUNT,
                "held": Bytes(HELD_BYTES_MAX),
                "splitter": Maybe(EVENTS),
            },
        ),
        "must_flow": Flag(),
        "seal": Text(16, ("", "finished", "failed").__contains__),
        "expected": Maybe(_COUNT),
        "fence": _COUNT,
        "held": Bytes(HELD_BYTES_MAX),
        "due_at": Seconds(or_never=True),
    },
)
"""A request that publishes, in the middle of its body."""
