"""What a worker's successor has to know beside the units: the shared facts of all connections, as a record.

    incarnation    so that ids of streams stay valid, and an id of a stream that has ended is answered as before
    health         of each upstream, by its name: a server that is out stays out, and no client finds that out again
    accounts       what each key has spent, and its buckets: a deploy refills no limit
    makers         of the objects that upstreams keep

The successor takes them before its first unit. What it doesn't know any more (an upstream that is gone, a key that has
left the file) is left out.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from streamd.core.health import PRINCIPALS_MAX, Fault, HealthState, ReputeState
from streamd.core.limits import TOTAL_MAX, AccountState, Bucket, Look
from streamd.core.makers import ID_CHARS_MAX, OBJECTS_MAX, Made
from streamd.handover.landing import House
from streamd.handover.record import RecordKind
from streamd.handover.values import Decimal, Flag, Many, Maybe, Seconds, Text, TupleOf, WholeNumber, Word


class WorkerFacts(NamedTuple):
    """The facts of a worker that its connections share."""

    incarnation: str
    health: tuple[tuple[str, HealthState], ...]  # by the upstream's name
    accounts: tuple[tuple[str, AccountState], ...]  # by the key's id
    makers: tuple[tuple[str, Made], ...]  # by the object's id


_NAME: Final = Text(256)
_COUNT: Final = WholeNumber()
_TOTAL: Final = WholeNumber(0, TOTAL_MAX)

_REPUTE: Final = RecordKind(
    "repute",
    ReputeState,
    {
        "failures": _COUNT,
        "since": Seconds(),
        "errors": _COUNT,
        "failed_at": Seconds(),
        "fault": Word(Fault),
        "out_until": Seconds(),
    },
)

_HEALTH: Final = RecordKind(
    "health",
    HealthState,
    {
        "all": _REPUTE,
        "by_principal": Many(TupleOf(_NAME, _REPUTE), PRINCIPALS_MAX),
        "is_doubtful": Flag(),
        "latest": Maybe(_NAME),
        "is_shared": Flag(),
        "blamed": Many(_NAME, 2),
        "judged_at": Seconds(),
        "since": Seconds(),
        "failures": _COUNT,
        "reason": Text(64),
        "error": Text(1 << 12),
    },
)

_BUCKET: Final = RecordKind("bucket", Bucket, {"level": Decimal(), "forgiven": Decimal(), "total": _TOTAL})

_ACCOUNT: Final = RecordKind(
    "account",
    AccountState,
    {
        "requests_total": _TOTAL,
        "tokens_total": _TOTAL,
        "look": Maybe(
            RecordKind(
                "look", Look, {"at": Seconds(), "number": _COUNT, "requests": Maybe(_BUCKET), "tokens": Maybe(_BUCKET)}
            )
        ),
    },
)

WORKER: Final = RecordKind(
    "worker",
    WorkerFacts,
    {
        "incarnation": Text(16),
        "health": Many(TupleOf(_NAME, _HEALTH)),
        "accounts": Many(TupleOf(_NAME, _ACCOUNT)),
        "makers": Many(
            TupleOf(Text(ID_CHARS_MAX), RecordKind("made", Made, {"principal": _NAME, "upstream": _NAME})), OBJECTS_MAX
        ),
    },
)
"""The facts of a worker that its connections share."""


def worker_facts(house: House) -> WorkerFacts:
    """The facts of this worker."""
    return WorkerFacts(
        house.runtime.hub.member[1:],
        tuple([(upstream.settings.name, upstream.health.state()) for upstream in house.upstreams]),
        house.rights.account_states(),
        tuple(house.kept.makers),
    )


def take(house: House, facts: WorkerFacts) -> None:
    """Go on with the facts of the worker before. Raises ValueError, with nothing taken, for facts that none has."""
    house.runtime.hub.take_incarnation(facts.incarnation)
    health = dict(facts.health)
    for upstream in house.upstreams:
        if upstream.settings.name in health:
            upstream.health.go_on_from(health[upstream.settings.name])
    for key_id, state in facts.accounts:
        if house.rights.key_of(key_id) is not None:
            house.rights.account_of(key_id).go_on_from(state)
    for object_id, made in facts.makers:
        house.kept.makers.learn(object_id, *made)
