"""Every key path of a TOML file has the line on which it stands."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.tomllines import lines_of

DOCUMENT = '''# a comment with "quotes" and [brackets]
plain = 1 # x = 2
dotted.inner = "x # y"
list = [
  "one",  # , ]
  'two',

  [3,
   4],
]
long = """
[no]
z = 1
\\""" still"""
raw = \'\'\'
k = 1\'\'\'
when = 1979-05-27 07:32:00Z
"quoted.key" = true
\'single\' = -1.5e3
empty = ""
[table]
inline = {x = 1, "y.z" = [1, {w = 2}]}
  [ table . "sub" ]  # blanks are allowed
  k = ""
[[rows]]
n = 1
[rows.of]
p = 1
[[rows]]
n = 2
  [[rows.inner]]
  o = """five quotes"""""
[[rows.inner]]
o = 2
'''


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_keys_of_every_form_have_their_line(newline: str) -> None:
    text = DOCUMENT.replace("\n", newline)
    tomllib.loads(text)
    assert lines_of(text) == {
        ("plain",): 2,
        ("dotted",): 3,
        ("dotted", "inner"): 3,
        ("list",): 4,
        ("list", 0): 5,
        ("list", 1): 6,
        ("list", 2): 8,
        ("list", 2, 0): 8,
        ("list", 2, 1): 9,
        ("long",): 11,
        ("raw",): 15,
        ("when",): 17,
        ("quoted.key",): 18,
        ("single",): 19,
        ("empty",): 20,
        ("table",): 21,
        ("table", "inline"): 22,
        ("table", "inline", "x"): 22,
        ("table", "inline", "y.z"): 22,
        ("table", "inline", "y.z", 0): 22,
        ("table", "inline", "y.z", 1): 22,
        ("table", "inline", "y.z", 1, "w"): 22,
        ("table", "sub"): 23,
        ("table", "sub", "k"): 24,
        ("rows",): 25,
        ("rows", 0): 25,
        ("rows", 0, "n"): 26,
        ("rows", 0, "of"): 27,
        ("rows", 0, "of", "p"): 28,
        ("rows", 1): 29,
        ("rows", 1, "n"): 30,
        ("rows", 1, "inner"): 31,
        ("rows", 1, "inner", 0): 31,
        ("rows", 1, "inner", 0, "o"): 32,
        ("rows", 1, "inner", 1): 33,
        ("rows", 1, "inner", 1, "o"): 34,
    }


def test_a_file_without_keys_has_no_lines() -> None:
    assert lines_of("") == lines_of("# nothing\n\n") == {}


def _paths(value: Any, path: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    """The paths that a walk over tomllib's own result finds."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = {path} if path else set()
    for name, child in children:
        found |= _paths(child, (*path, name))
    return found


_SCALARS = st.sampled_from(
    [
        "1",
        "true",
        "-0.5",
        "inf",
        '"a]}\\"#"',
        "'\\'",
        '"""\n]\n"""',
        "'''\n#'''",
        "1979-05-27 07:32:00",
        "07:32:00",
        '""',
    ]
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda entries: "[ # c ]\n" + " ,\n".join(entries) + "\n]"),
        st.lists(inner, max_size=3).map(
            lambda entries: "{" + ", ".join(f"k{at} = {entry}" for at, entry in enumerate(entries)) + "}"
        ),
    ),
    max_leaves=8,
)
_LINES = st.lists(
    st.tuples(st.sampled_from(["", "# = [\n", "\n\n", "[t{}]\n", "[[rows]]\n", "[[rows.sub]]\n"]), _VALUES)
)


@given(_LINES)
def test_the_paths_are_those_of_tomllib(lines: list[tuple[str, str]]) -> None:
    text = "[[rows]]\n"
    lines_by_key = {}
    for at, (before, value) in enumerate(lines):
        text += before.format(at)
        lines_by_key[f"key{at}"] = text.count("\n") + 1
        text += f"key{at} = {value}\n"
    found = lines_of(text)
    assert set(found) == _paths(tomllib.loads(text))
    for path, line in found.items():
        if path[-1] in lines_by_key:
            assert line == lines_by_key[str(path[-1])]
