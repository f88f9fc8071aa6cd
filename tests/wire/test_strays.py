"""Lines that are dropped are counted, with the names of their fields and no word of their text."""

from __future__ import annotations

import pytest

from streamd.wire.strays import NAMES_MAX, Strays


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (b"error: the prompt", "error"),
        (b"x-meta:1", "x-meta"),
        (b"event", "(text)"),
        (b"The capital of France: Paris", "(text)"),
        (b"a" * 33 + b": 1", "(text)"),
        (b" data: x", "(text)"),
        (b'{"content": "x"}', "(JSON)"),
        (b'"content": "x"', "(JSON)"),
        (b"]", "(JSON)"),
        ("é: x".encode(), "(text)"),
        (b"", "(text)"),
    ],
)
def test_only_the_name_of_a_field_is_kept_of_a_line(line: bytes, name: str) -> None:
    strays = Strays()
    strays.add(line + b"\n")
    assert (strays.lines, strays.bytes, strays.names) == (1, len(line) + 1, (name,))


def test_lines_add_up_and_names_are_kept_once_in_their_order_up_to_a_bound() -> None:
    strays = Strays()
    strays.add(b"b: 1\na: 2\n")
    strays.add(b"a: 3\n")
    assert (strays.lines, strays.bytes, strays.names) == (3, 15, ("b", "a"))
    for number in range(50):
        strays.add(b"f%d: x\n" % number)
    assert strays.lines == 53 and len(strays.names) == NAMES_MAX and strays.names[:3] == ("b", "a", "f0")
