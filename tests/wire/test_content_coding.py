"""The codings of a body: which names mean none, and which single coding is undone."""

from __future__ import annotations

import pytest

from streamd.wire.content_coding import is_plain, undone


@pytest.mark.parametrize("field", [None, b"", b"identity", b"None", b" utf-8 ", b"identity, binary", b"identity,"])
def test_fields_that_name_no_coding_leave_a_body_plain(field: bytes | None) -> None:
    assert is_plain(field)
    assert undone(field) is None


@pytest.mark.parametrize("field", [b"gzip", b"br", b"gzip, identity", b"identity, br", b"utf-8,zstd", b"gzip, gzip"])
def test_a_single_coding_among_other_words_makes_a_body_encoded(field: bytes) -> None:
    assert not is_plain(field)


@pytest.mark.parametrize(
    ("field", "coding"),
    [
        (b"gzip", b"gzip"),
        (b"X-Gzip", b"gzip"),
        (b"deflate, identity", b"deflate"),
        (b"br", None),
        (b"gzip, deflate", None),
        (b"gzip, br", None),
    ],
)
def test_a_single_known_coding_is_undone_and_several_are_not(field: bytes, coding: bytes | None) -> None:
    assert undone(field) == coding
