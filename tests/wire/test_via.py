"""The servers that a request has passed: how often streamd is among them."""

from __future__ import annotations

import pytest

from streamd.wire.via import OWN, PASSES_MAX, passes


@pytest.mark.parametrize(
    ("field", "count"),
    [
        (None, 0),
        (b"", 0),
        (b",", 0),
        (b"1.1 proxy.example", 0),
        (b"1.1 streamd.example", 0),
        (b"streamd", 0),
        (OWN, 1),
        (b"1.1 STREAMD", 1),
        (b"HTTP/1.1 streamd (a comment), 2 proxy", 1),
        (b"1.0 fred,1.1 streamd ,\t1.1 streamd", 2),
        (b", ".join([OWN] * PASSES_MAX), PASSES_MAX),
    ],
)
def test_each_pass_through_streamd_is_counted(field: bytes | None, count: int) -> None:
    assert passes(field) == count
