"""The quick path for a request's JSON against the scan: whatever it takes, the scan reads in the same way."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamd.wire.json_scan import DEPTH_MAX, DIGITS_MAX, READ_BYTES_MAX, JsonError, Watched, scan, scan_slowly
from streamd.wire.quick_json import BODY_BYTES_MAX

WATCHED = Watched({"model": None, "stream": None, "store": None, "max_tokens": None})
assert WATCHED.quick is not None
read = WATCHED.quick.read

names = st.sampled_from(
    ["model", "stream", "Stream", "mod_el", "model\0x", "maxTokens", "\u017ftream", "messages", "x", ""]
)
scalars = st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.floats(allow_nan=False) | st.text(max_size=6)
texts = st.sampled_from(["model", '"model"', "a\nb", "é\ud83d", "store"])
values = st.recursive(
    scalars | texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=9
)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Objects whose members may stand twice, damaged in up to two places."""
    members = draw(st.lists(st.tuples(names, values), max_size=5))
    ascii_only = draw(st.booleans())
    parts = [":".join(json.dumps(each, ensure_ascii=ascii_only) for each in member) for member in members]
    body = bytearray(f"{{{', '.join(parts)}}}".encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(body)))
        body[at : at + draw(st.integers(0, 2))] = draw(
            st.sampled_from([b"", b'"', b"\\", b"0", b"}", b",", b" ", b"\n"])
        )
    return bytes(body)


def agrees(body: bytes) -> bool:
    """Whether the quick path takes the body; then the scan gives the same fields."""
    quick = read(body)
    if quick is None:
        return False
    slow: dict[str, Any] = scan_slowly(body, WATCHED).fields(body)
    assert repr(sorted(slow.items())) == repr(sorted(quick.items()))
    return True


@given(bodies())
@example(b'{"model":"a","mod\\u0065l":"b"}')
@example(b'{"model":"a","x":{"model":"b"}}')
def test_what_the_quick_path_takes_the_scan_reads_in_the_same_way(body: bytes) -> None:
    agrees(body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","stream":true,"messages":[{"role":"user","content":"a \\"model\\" of\\nlines"}]}',
        b' {"messages":[{"role":"user","content":[{"type":"text","text":"\xc3\xa9"}]}],"n":0.5,"model":"m"}\n',
        b"{}",
    ],
)
def test_ordinary_bodies_are_taken(body: bytes) -> None:
    assert agrees(body)
    found = scan(body, WATCHED)
    assert found.places(body) == scan_slowly(body, WATCHED).found
    assert found.with_names(body, "model", {"m": "other"}) == body.replace(b'"m"', b'"other"')


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a","model":"b"}',
        b'{"model":"a","Model":"b"}',
        b'{"model":"a","mod\\u0065l":"b"}',
        b'{"maxTokens":1}',
        b'{"model\\u0000x":1}',
        b'{"\xc5\xbftream":true}',
        b'{"x":NaN}',
        b"[1]",
        b'\xef\xbb\xbf{"model":"a"}',
        b'{"x":%b}' % (b"1" * (DIGITS_MAX + 1)),
        b'{"x":%b%b}' % (b"[" * (DEPTH_MAX + 1), b"]" * (DEPTH_MAX + 1)),
        b'{"model":"%b"}' % (b"x" * (READ_BYTES_MAX + 1)),
        b'{"model":{"a":1}}',
        b'{"x":"%b"}' % (b"x" * BODY_BYTES_MAX),
        b"{%b}" % b",".join(b'"\\n%d":0' % k for k in range(1001)),
    ],
)
def test_everything_unusual_is_left_to_the_scan(body: bytes) -> None:
    assert read(body) is None


def test_a_body_that_comes_in_pieces_is_scanned() -> None:
    body = b'{"model":"a","model":"b"}'
    found = scan(b'{"model":"a"}', WATCHED)
    assert found.found == [] and found.fields(b'{"model":"a"}') == {"model": "a"}
    with pytest.raises(JsonError):
        scan_slowly(body, WATCHED)
