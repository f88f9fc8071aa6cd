"""Facts: all that another member has to know of a stream to serve its copy, beside the log.

They stand in each entry that starts over, as JSON of some 400 bytes; VERSION tells the form. A member that reads a
newer version keeps its hands off the copy. Facts that it doesn't know under its own version it passes over: a fact that
has to be understood takes a new version. What is read here is untrusted.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import orjson

from streamd.core.snapshot import TIME_S_MAX
from streamd.core.stream import CountedStream, Stream
from streamd.core.terms import Terms
from streamd.engine.entry import NewerVersion
from streamd.policy import Policy
from streamd.wire.dialect import Dialect, dialect_named
from streamd.wire.event_id import valid_name, valid_stream_id

VERSION: Final = 1

# A finished stream stays at a node that followed it for this time after its last reader; the engine keeps it longer.
COPY_KEPT_S: Final = 10.0

# Bounds of the texts, as where they come from: models' and upstreams' names, principals.
_TEXT_CHARS_MAX: Final = 256


class StreamFacts(NamedTuple):
    """A stream without its log. Times are unix times, durations seconds."""

    id: str
    epoch: str  # of a chosen name; "": the id was drawn
    dialect: Dialect
    owner: str  # the principal
    public: bool
    published: bool
    counted: bool  # its readers count bytes
    model: str
    upstream: str
    policy: Policy
    retention_s: float
    opened_unix: float

    def terms(self, catchup_bytes_max: int) -> Terms:
        """The terms of a stream that follows the copy."""
        return Terms(
            owner=self.owner,
            name_public=self.public,
            published=self.published,
            is_copy=True,
            model=self.model,
            policy=self.policy,
            retention_s=min(self.retention_s, COPY_KEPT_S),
            catchup_bytes_max=catchup_bytes_max,
        )


def facts_of(stream: Stream, now: float, now_unix: float) -> StreamFacts:
    """The facts of a stream of this process. `now` in monotonic seconds, `now_unix` the same instant as unix time."""
    terms = stream.terms
    return StreamFacts(
        id=stream.id,
        epoch=stream.epoch,
        dialect=stream.dialect,
        owner=terms.owner,
        public=terms.name_public,
        published=terms.published,
        counted=isinstance(stream, CountedStream),
        model=terms.model[:_TEXT_CHARS_MAX],
        upstream=stream.upstream[:_TEXT_CHARS_MAX],
        policy=terms.policy,
        retention_s=terms.retention_s,
        opened_unix=now_unix - (now - stream.opened_at),
    )


def pack_facts(facts: StreamFacts) -> bytes:
    """The facts as an entry holds them."""
    row = facts._asdict() | {"dialect": facts.dialect.value, "policy": facts.policy.value, "version": VERSION}
    return orjson.dumps(row)


def parse_facts(json: bytes) -> StreamFacts:
    """The facts in an entry. Raises NewerVersion, or ValueError for values that no stream has."""
    try:
        given = orjson.loads(json)
    except orjson.JSONDecodeError:
        raise ValueError("facts that are not JSON") from None
    if not isinstance(given, dict) or type(given.get("version")) is not int:
        raise ValueError("facts without a version")
    if given.pop("version") > VERSION:
        raise NewerVersion("the copy was written by a newer version of streamd")
    if not given.keys() >= set(StreamFacts._fields):
        raise ValueError("facts without a fact that every version writes")
    given = {name: given[name] for name in StreamFacts._fields}  # a later version may know more
    texts = ("id", "epoch", "dialect", "owner", "model", "upstream", "policy")
    if not all(type(given[name]) is str and len(given[name]) <= _TEXT_CHARS_MAX for name in texts):
        raise ValueError("a text among the facts that is none, or too long")
    if not all(type(given[name]) is bool for name in ("public", "published", "counted")):
        raise ValueError("a flag among the facts that is none")
    if not all(_is_time(given[name]) for name in ("retention_s", "opened_unix")):
        raise ValueError("a time among the facts that can't be")
    name = given["id"].encode("utf-8", "replace")
    if not (valid_stream_id(name) and not given["epoch"]) and not (valid_name(name) and len(given["epoch"]) == 6):
        raise ValueError("facts of an id that no stream has")
    if given["dialect"] not in [dialect.value for dialect in Dialect]:
        raise ValueError("facts of a dialect that this version doesn't know")
    given["dialect"], given["policy"] = dialect_named(given["dialect"]), Policy(given["policy"])
    if not given["upstream"].isprintable() or not given["upstream"].isascii():
        raise ValueError("an upstream's name that can't be a header")  # X-Upstream
    return StreamFacts(**given)


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= TIME_S_MAX
