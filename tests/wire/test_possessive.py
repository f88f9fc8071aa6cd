"""Possessive groups: the guard for Pythons before 3.11.5, and no pattern without it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import streamd
from streamd.wire.possessive import compiled, guarded

SOURCE = Path(streamd.__file__).parent


@pytest.mark.parametrize(
    "pattern, expected",
    [
        (r"(?:ab?c)*+", r"(?:ab?c|(?!))*+"),
        (r"((a)++|b)?+(c)", r"((a|(?!))++|b|(?!))?+(c)"),
        (r"(a){1,3}+", r"(a|(?!)){1,3}+"),
        (r"a*+[a()*+]*+\)*+[]()*+]", r"a*+[a()*+]*+\)*+[]()*+]"),
        (r"[^]\])*+](a|\))*+", r"[^]\])*+](a|\)|(?!))*+"),
        (r"(?:a)*(?:b)+(?:c)?", r"(?:a)*(?:b)+(?:c)?"),
    ],
)
def test_only_possessive_groups_are_guarded(pattern: str, expected: str) -> None:
    assert guarded(pattern) == expected
    assert guarded(pattern.encode()) == expected.encode()


@given(st.text("abc", max_size=9))
def test_a_guarded_group_takes_whole_repetitions_as_an_atomic_group_does(text: str) -> None:
    expected = re.compile("(?>(?:ab?c)*)(?>(?:ba)?)").match(text)
    assert expected is not None
    for found in (re.match(guarded("(?:ab?c)*+(?:ba)?+"), text), compiled("(?:ab?c)*+(?:ba)?+").match(text)):
        assert found is not None and found[0] == expected[0]


def test_every_module_with_possessive_groups_compiles_them_with_the_guard() -> None:
    for path in SOURCE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if path.name != "possessive.py" and guarded(source) != source:
            assert "re.compile(" not in source, f"{path.name}: use streamd.wire.possessive.compiled"
