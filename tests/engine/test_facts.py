"""Facts of a stream: another member serves it as its owner would, or refuses facts that no stream has."""

from __future__ import annotations

import dataclasses
from typing import Any

import orjson
import pytest
from sinks import new_hub

from streamd.core.stream import Stream
from streamd.core.terms import Terms
from streamd.engine.entry import NewerVersion
from streamd.engine.facts import VERSION, facts_of, pack_facts, parse_facts
from streamd.policy import Policy
from streamd.wire.dialect import Dialect


def stream() -> Stream:
    terms = Terms(owner="alice", name_public=True, model="m", policy=Policy.CLOSE, retention_s=60.0)
    return new_hub().open(Dialect.RESPONSES, 10.0, terms=terms)


def packed(**changes: Any) -> bytes:
    given = orjson.loads(pack_facts(facts_of(stream(), 12.0, 1e9))) | changes
    return orjson.dumps({name: value for name, value in given.items() if value is not None})


def test_facts_are_read_as_they_were_written() -> None:
    facts = facts_of(stream(), 12.0, 1e9)
    assert facts.opened_unix == 1e9 - 2.0 and len(pack_facts(facts)) < 500
    assert parse_facts(pack_facts(facts)) == facts


def test_the_terms_are_the_owners_but_for_its_account_and_graces() -> None:
    own = stream()
    terms = facts_of(own, 12.0, 1e9).terms(catchup_bytes_max=own.terms.catchup_bytes_max)
    assert terms == dataclasses.replace(own.terms, is_copy=True, retention_s=10.0)


def test_a_newer_version_is_told_apart_from_nonsense() -> None:
    with pytest.raises(NewerVersion):
        parse_facts(packed(version=VERSION + 1, id=7))


def test_facts_of_a_later_release_are_passed_over_and_none_may_be_missing() -> None:
    given = orjson.loads(packed())
    assert parse_facts(orjson.dumps(given | {"more": 1})) == parse_facts(orjson.dumps(given))
    for name in given.keys() - {"version"}:
        with pytest.raises(ValueError):
            parse_facts(orjson.dumps({each: value for each, value in given.items() if each != name}))


@pytest.mark.parametrize(
    "changes",
    [
        {"version": None},
        {"version": "1"},
        {"id": None},
        {"id": "a b"},
        {"id": 7},
        {"id": "news"},  # a chosen name without its epoch
        {"epoch": "aaaaaa"},  # a drawn id with one
        {"dialect": "other"},
        {"policy": "other"},
        {"public": 1},
        {"retention_s": -1},
        {"retention_s": "1"},
        {"retention_s": True},
        {"opened_unix": 1e300},
        {"upstream": "a\r\nb"},
        {"upstream": "é"},
        {"model": "x" * 257},
    ],
)
def test_facts_that_no_stream_has_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        parse_facts(packed(**changes))


@pytest.mark.parametrize("json", [b"", b"{", b"[]", b"1", b"{}"])
def test_bytes_that_are_no_facts_are_refused(json: bytes) -> None:
    with pytest.raises(ValueError):
        parse_facts(json)
