import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.core.patterns import matches, matches_any


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("room-1", "room-1", True),
        ("room-1", "room-12", False),
        ("room-1", "Room-1", False),
        ("*", "", True),
        ("*", "anything/at all", True),
        ("", "", True),
        ("", "a", False),
        ("room-*", "room-", True),
        ("room-*", "oom-1", False),
        ("*-1", "room-1", True),
        ("a*a", "a", False),  # both ends may not share a character
        ("a*a", "aa", True),
        ("a*b*c", "a-c-b-c", True),
        ("a*b*c", "acb", False),
        ("a*b*bc", "abc", False),  # nor may the middle and the end
        ("a**c", "ac", True),
        ("/v1/*", "/v1", False),
        # Everything but the star stands for itself.
        ("room.1", "roomx1", False),
        ("room?", "room1", False),
        ("room[0-9]", "room1", False),
        ("room[0-9]", "room[0-9]", True),
        (r"\*", "*", False),
        (r"\*", "\\x", True),
        ("(a|b)+$", "a", False),
        ("room-*", "room-1\n", True),
        ("room-1", "room-1\n", False),
    ],
)
def test_a_star_matches_any_characters(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


@given(st.text("ab*.", max_size=8), st.text("ab.", max_size=12))
def test_a_pattern_matches_like_its_regular_expression(pattern: str, name: str) -> None:
    same = ".*".join(re.escape(part) for part in pattern.split("*"))
    assert matches(pattern, name) is (re.fullmatch(same, name) is not None)


def test_a_pattern_with_many_stars_matches_fast() -> None:
    # A backtracking matcher takes 2^100 steps here.
    assert not matches("*a" * 100 + "b", "a" * 200)


def test_an_empty_list_of_patterns_matches_nothing() -> None:
    assert not matches_any((), "")
    assert matches_any(("a", "b*"), "bc")
