"""Models that a body names for routers, beside `model`."""

from __future__ import annotations

import json

import pytest

from streamd.wire.dialect import APIS
from streamd.wire.json_scan import READ_BYTES_MAX, JsonError, Watched, scan
from streamd.wire.other_models import MEMBERS, models_beside, watched_with

WATCHED = watched_with(Watched({"model": None}))


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("null", []),
        ("[]", []),
        ('["a", "b"]', ["a", "b"]),
        ('[{"model": "a"}]', ["a"]),
        ('["a", 1]', ["a", None]),
        ('[{"model": "a", "api_base": "b"}]', [None]),
        ('[{"a": ["b"]}]', [None]),
        ('{"a": "b"}', [None]),
        ('"a"', [None]),
        ('["\\ud800"]', [None]),
        (json.dumps(["a"] * READ_BYTES_MAX), [None]),
    ],
)
def test_each_name_is_read_or_counts_as_a_name_that_cannot_be(member: str, value: str, named: list[str | None]) -> None:
    body = f'{{"model": "m", "{member}": {value}, "other": {{"{member}": ["deeper"]}}}}'.encode()
    assert models_beside(scan(body, WATCHED), body) == [(member, name) for name in named]


@pytest.mark.parametrize("spelling", ["Fallbacks", "fall_backs", "fallback\\u0073\\u0000"])
def test_another_spelling_of_a_member_is_refused(spelling: str) -> None:
    with pytest.raises(JsonError, match="could be taken for"):
        scan(f'{{"model": "m", "{spelling}": ["x"]}}'.encode(), WATCHED)


@pytest.mark.parametrize("api", APIS, ids=lambda api: type(api).__name__)
def test_what_an_api_watches_itself_stays_watched(api: object) -> None:
    own = api.watched  # type: ignore[attr-defined]
    assert own.members.items() <= watched_with(own).members.items()
