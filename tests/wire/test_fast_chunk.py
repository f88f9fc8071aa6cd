"""one_chunk() and several_chunks(): the same payloads as the chunked decoder's, or nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.wire.chunked import ChunkedDecoder, encode_chunk
from streamd.wire.fast_chunk import CHUNKS_MAX, chunk_bytes, one_chunk, several_chunks
from streamd.wire.http1 import RemoteProtocolError

EVENT = b'data: {"choices":[{"delta":{"content":"hello"}}]}\n\n'


def long_way(read: bytes) -> list[bytes] | None:
    """The payloads of a read from a boundary by ChunkedDecoder; None if the read doesn't end at a boundary."""
    decoder = ChunkedDecoder()
    try:
        payloads = decoder.feed(read)
    except RemoteProtocolError:
        return None
    return payloads if decoder.at_boundary and not decoder.done else None


@pytest.mark.parametrize("size", [16, 17, 254, 255, 256, 257, 1023, 4095])
def test_a_read_of_a_single_chunk_gives_its_payload(size: int) -> None:
    payload = b"data: " + b"x" * (size - 8) + b"\n\n"
    assert one_chunk(encode_chunk(payload)) == payload
    assert one_chunk(b"%X\r\n%b\r\n" % (size, payload)) == payload


@pytest.mark.parametrize(
    "read",
    [
        b"",
        encode_chunk(EVENT)[:-1],
        encode_chunk(EVENT) + b"0",
        encode_chunk(EVENT) * 2,
        encode_chunk(b"data: x\n\n"),
        encode_chunk(b"data: " + b"x" * 4096 + b"\n\n"),
        b"0" + encode_chunk(EVENT),
        b"+" + encode_chunk(EVENT),
        encode_chunk(EVENT)[:-2] + b"xx",
        encode_chunk(b"\n" + EVENT),
        b"0\r\n\r\n",
    ],
)
def test_other_reads_are_left_to_the_decoder(read: bytes) -> None:
    assert one_chunk(read) is None


@given(
    payload=st.binary(min_size=1, max_size=600).map(lambda tail: b"data: " + tail),
    before=st.sampled_from([b"", b"0", b"+", b" ", b"0x"]),
    after=st.sampled_from([b"", b"\r", b"\r\n", b"0\r\n\r\n", b"5"]),
)
def test_the_payload_is_the_same_as_the_decoders(payload: bytes, before: bytes, after: bytes) -> None:
    read = before + encode_chunk(payload) + after
    quick = one_chunk(read)
    if quick is not None:
        assert long_way(read) == [quick]
    elif not before and not after and 16 <= len(payload) <= 4095:
        raise AssertionError("an ordinary chunk took the long way")


@pytest.mark.parametrize("count", [1, 2, CHUNKS_MAX])
@pytest.mark.parametrize("size", [16, 255, 256, 4095])
def test_a_read_of_whole_chunks_gives_their_payloads(size: int, count: int) -> None:
    payloads = [b"data: " + b"%d" % (k % 10) * (size - 8) + b"\n\n" for k in range(count)]
    assert several_chunks(b"".join(map(encode_chunk, payloads))) == payloads
    assert several_chunks(b"".join(b"%X\r\n%b\r\n" % (size, payload) for payload in payloads)) == payloads
    assert [chunk_bytes(payload) for payload in payloads] == [len(encode_chunk(payload)) for payload in payloads]


@pytest.mark.parametrize(
    "end",
    [
        b"0\r\n\r\n",
        b"5",
        encode_chunk(EVENT)[:-1],
        encode_chunk(EVENT)[:-2] + b"xx",
        encode_chunk(b"data: x\n\n"),
        encode_chunk(EVENT) * CHUNKS_MAX,
    ],
)
def test_a_read_with_more_than_whole_chunks_is_left_to_the_decoder(end: bytes) -> None:
    assert several_chunks(encode_chunk(EVENT) * 2 + end) is None


@given(
    payloads=st.lists(st.binary(max_size=300).map(lambda tail: b"data: " + tail), max_size=5),
    after=st.sampled_from([b"", b"\r", b"\r\n", b"0\r\n\r\n", b"5", b"+5\r\nhello\r\n"]),
)
def test_several_payloads_are_the_same_as_the_decoders(payloads: list[bytes], after: bytes) -> None:
    read = b"".join(map(encode_chunk, payloads)) + after
    quick = several_chunks(read)
    assert quick is None or quick == long_way(read)
