"""The charset of a JSON body: none, or UTF-8 in its usual spellings."""

from __future__ import annotations

import pytest

from streamd.wire.charset import is_foreign


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        b"",
        b"application/json",
        b"application/json;",
        b"application/json; charset=utf-8",
        b'Application/JSON ;q=1; Charset="UTF-8"',
        b"application/json;charset=utf8",
        b"application/json; charset=us-ascii",
        b"text/plain; charset=utf-16",
        b"multipart/form-data; boundary=charset",
    ],
)
def test_utf_8_and_other_types_pass(content_type: bytes | None) -> None:
    assert not is_foreign(content_type)


@pytest.mark.parametrize(
    "content_type",
    [
        b"application/json; charset=utf-7",
        b'application/json;charset="UTF-16"',
        b"application/json; charset=utf-8; charset=utf-7",
        b"application/json; charset=",
        b"application/json; charset",
        b"application/json; charset =utf-7",
        b"application/json; charset*=utf-8''utf-7",
        b'application/json; charset="utf-7;x"',
        b"application/json; charset=utf-8 utf-7",
    ],
)
def test_any_other_charset_of_json_is_foreign(content_type: bytes) -> None:
    assert is_foreign(content_type)
