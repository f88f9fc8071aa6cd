"""gzip and deflate, undone piece by piece: any cut gives the same bytes, and no call gives more than its bound."""

from __future__ import annotations

import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.wire.chunked import BodyDecoder, decoder_for
from streamd.wire.content_coding import undone
from streamd.wire.http1 import Framing, RemoteProtocolError
from streamd.wire.inflate import OUTPUT_BYTES_MAX, InflatingDecoder


def raw_deflate(data: bytes) -> bytes:
    made = zlib.compressobj(wbits=-15)
    return made.compress(data) + made.flush()


CODINGS = {
    "gzip": (b"gzip", gzip.compress),
    "gzip of several members": (
        b"gzip",
        lambda data: b"".join(gzip.compress(data[k::1][:7]) for k in range(0, len(data), 7)),
    ),
    "deflate": (b"deflate", zlib.compress),
    "deflate without a header": (b"deflate", raw_deflate),
}
codings = pytest.mark.parametrize("kind", CODINGS)


def framed(body: bytes, framing: Framing, size: int) -> list[bytes]:
    """The reads of a body in this framing, cut into pieces of this size."""
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    if framing is Framing.CHUNKED:
        return [b"%x\r\n%b\r\n" % (len(part), part) for part in parts] + [b"0\r\n\r\n"]
    return parts


def fed(decoder: InflatingDecoder, reads: list[bytes]) -> bytes:
    out = []
    for read in reads:
        out += decoder.feed(read)
        while decoder.has_more:
            pieces = decoder.feed(b"")
            assert sum(map(len, pieces)) <= OUTPUT_BYTES_MAX
            out += pieces
    return b"".join(out)


def plain(framing: Framing, length: int) -> BodyDecoder:
    return decoder_for(framing, length)


@codings
@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize("framing", [Framing.CHUNKED, Framing.LENGTH, Framing.UNTIL_CLOSE])
def test_any_cut_in_any_framing_gives_the_same_bytes(kind: str, framing: Framing, size: int) -> None:
    coding, encode = CODINGS[kind]
    data = b"".join(b'data: {"n": %d}\n\n' % n for n in range(300))
    body = encode(data)
    decoder = InflatingDecoder(plain(framing, len(body)), coding)
    assert fed(decoder, framed(body, framing, size)) == data
    assert decoder.done or decoder.eof()


@codings
def test_an_empty_body_is_whole(kind: str) -> None:
    decoder = InflatingDecoder(plain(Framing.CHUNKED, 0), CODINGS[kind][0])
    assert decoder.feed(b"0\r\n\r\n") == [] and decoder.done


@codings
def test_a_body_cut_in_its_coding_is_broken_and_its_bytes_are_given(kind: str) -> None:
    coding, encode = CODINGS[kind]
    data = bytes(range(256)) * 4
    body = encode(data)
    decoder = InflatingDecoder(plain(Framing.UNTIL_CLOSE, 0), coding)
    assert data.startswith(fed(decoder, [body[:-9]])) and not decoder.eof()
    decoder = InflatingDecoder(plain(Framing.CHUNKED, 0), coding)
    with pytest.raises(RemoteProtocolError, match="no end") as caught:
        fed(decoder, [b"%x\r\n%b\r\n0\r\n\r\n" % (len(body) - 9, body[:-9])])
    assert b"".join(caught.value.before) in data


@pytest.mark.parametrize("body", [b"\x1f\x8bnonsense", b"nonsense"])
def test_bytes_that_are_not_encoded_are_named(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="coding can't be undone"):
        InflatingDecoder(plain(Framing.UNTIL_CLOSE, 0), b"gzip" if body[:1] == b"\x1f" else b"deflate").feed(body * 9)


@pytest.mark.parametrize("size", [1, 2, 1000])
@pytest.mark.parametrize("framing", [Framing.CHUNKED, Framing.LENGTH, Framing.UNTIL_CLOSE])
@pytest.mark.parametrize("body", [b"data: not encoded at all\n\n" * 9, b"{}", b"\x1f", b""])
def test_a_body_that_is_only_said_to_be_gzip_passes_as_it_is(body: bytes, framing: Framing, size: int) -> None:
    decoder = InflatingDecoder(plain(framing, len(body)), b"gzip")
    if framing is Framing.UNTIL_CLOSE and body == b"\x1f":
        assert fed(decoder, [body]) == b"" and not decoder.eof(), "it may have been cut"
        return
    assert fed(decoder, framed(body, framing, size)) == body
    assert decoder.done or decoder.eof() or (not body and framing is Framing.LENGTH)


@codings
def test_a_bomb_comes_out_in_bounded_pieces(kind: str) -> None:
    coding, _ = CODINGS[kind]
    data = bytes(3_000_000)
    encode = gzip.compress if coding == b"gzip" else CODINGS[kind][1]
    decoder = InflatingDecoder(plain(Framing.UNTIL_CLOSE, 0), coding)
    first = b"".join(decoder.feed(encode(data)))
    assert 0 < len(first) <= OUTPUT_BYTES_MAX
    assert first + fed(decoder, [b""]) == data


def test_empty_members_are_begun_a_few_at_a_time() -> None:
    decoder = InflatingDecoder(plain(Framing.UNTIL_CLOSE, 0), b"gzip")
    assert decoder.feed(gzip.compress(b"") * 1000 + gzip.compress(b"end")) == [] and decoder.has_more
    assert fed(decoder, [b""]) in (b"", b"end")


@given(st.binary(max_size=300), st.sampled_from([b"gzip", b"deflate"]), st.integers(1, 50))
def test_any_bytes_are_refused_or_undone(body: bytes, coding: bytes, size: int) -> None:
    decoder = InflatingDecoder(plain(Framing.UNTIL_CLOSE, 0), coding)
    try:
        fed(decoder, framed(body, Framing.UNTIL_CLOSE, size))
    except RemoteProtocolError as error:
        assert error.code == "bad_content_coding"


@pytest.mark.parametrize(
    ("value", "coding"),
    [
        (b"gzip", b"gzip"),
        (b" X-GZIP ", b"gzip"),
        (b"Deflate", b"deflate"),
        (b"identity, gzip", b"gzip"),
        (b"utf-8, gzip", b"gzip"),
        (b"gzip, gzip", None),
        (b"br", None),
        (b"zstd", None),
        (b"identity", None),
        (b"", None),
        (None, None),
    ],
)
def test_a_single_coding_that_is_known_can_be_undone(value: bytes | None, coding: bytes | None) -> None:
    assert undone(value) == coding
