"""Bodies by their framing: whole, byte by byte, in any cut, with bytes after them; and the same bytes through h11."""

from __future__ import annotations

import sys
from itertools import pairwise

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamd.wire.chunked import (
    EXTENSION_BYTES_MAX,
    LAST_CHUNK,
    TRAILER_BYTES_MAX,
    TRAILERS_MAX,
    BodyDecoder,
    ChunkedDecoder,
    LengthDecoder,
    UntilCloseDecoder,
    decoder_for,
    encode_chunk,
)
from streamd.wire.http1 import Framing, RemoteProtocolError

ONE_OF_EACH = b'5\r\nhello\r\n0a;a="b"\r\n0123456789\r\n400\r\n' + b"x" * 1024 + b"\r\n1\r\n!\r\n"
PAYLOAD = b"hello0123456789" + b"x" * 1024 + b"!"


def decode(wire: bytes, *cuts: int) -> tuple[bytes, bool, bytes]:
    """The payload of a chunked body read in those cuts, whether it ended, and the bytes after it."""
    decoder = ChunkedDecoder()
    payload = b""
    edges = [0, *sorted(cuts), len(wire)]
    for start, end in pairwise(edges):
        if decoder.done:
            return payload, True, decoder.rest + wire[start:]
        payload += b"".join(decoder.feed(wire[start:end]))
    return payload, decoder.done, decoder.rest


def refusal(wire: bytes) -> str:
    """The code of the refusal, the same whole and byte by byte."""
    codes = []
    for cuts in ((), range(len(wire))):
        with pytest.raises(RemoteProtocolError) as caught:
            decode(wire, *cuts)
        assert caught.value.status == 400
        codes.append(caught.value.code)
    assert codes[0] == codes[1]
    return codes[0]


@pytest.mark.parametrize("behind", [b"", b"\r\n", b"GET / HTTP/1.1\r\n"])
@pytest.mark.parametrize("trailers", [b"", b"X: y\r\n", b"X:\r\nContent-Length: 5\r\n"])
def test_a_chunked_body_is_read_whole_byte_by_byte_and_with_bytes_after_it(trailers: bytes, behind: bytes) -> None:
    wire = ONE_OF_EACH + b"0\r\n" + trailers + b"\r\n" + behind
    assert decode(wire) == (PAYLOAD, True, behind)
    assert decode(wire, *range(len(wire))) == (PAYLOAD, True, behind)


@given(st.lists(st.integers(0, len(ONE_OF_EACH) + 8)))
@settings(max_examples=200, deadline=None)
def test_any_cut_gives_the_same_payload(cuts: list[int]) -> None:
    wire = ONE_OF_EACH + LAST_CHUNK + b"behind"
    assert decode(wire, *[min(at, len(wire)) for at in cuts]) == (PAYLOAD, True, b"behind")


@given(st.lists(st.binary(min_size=1, max_size=1500), max_size=8), st.lists(st.integers(0, 12_000)))
@settings(max_examples=100, deadline=None)
def test_an_encoded_body_decodes_to_itself(payloads: list[bytes], cuts: list[int]) -> None:
    wire = b"".join(map(encode_chunk, payloads)) + LAST_CHUNK
    assert decode(wire, *[min(at, len(wire)) for at in cuts]) == (b"".join(payloads), True, b"")


@pytest.mark.parametrize("size", [1, 9, 10, 15, 16, 200, 255, 256, 1023, 1024, 70_000])
def test_a_whole_chunk_is_one_piece_and_the_decoder_stays_at_its_boundary(size: int) -> None:
    decoder = ChunkedDecoder()
    for _ in range(3):
        assert decoder.feed(encode_chunk(b"\r" * size)) == [b"\r" * size]
        assert decoder.at_boundary
    assert not decoder.done


def test_each_of_several_whole_chunks_is_one_piece() -> None:
    decoder = ChunkedDecoder()
    assert decoder.feed(encode_chunk(b"a") + encode_chunk(b"b" * 999) + b"1\r\nc") == [b"a", b"b" * 999, b"c"]
    assert not decoder.at_boundary
    assert decoder.feed(b"\r\n2\r\nde\r\n") == [b"de"]
    assert decoder.at_boundary


def test_the_decoder_is_at_a_boundary_only_before_a_size_line() -> None:
    wire = b"2\r\nab\r\n0\r\nX: y\r\n\r\n"
    decoder = ChunkedDecoder()
    boundaries = []
    for at, byte in enumerate(wire):
        if decoder.at_boundary:
            boundaries.append(at)
        decoder.feed(bytes([byte]))
    assert boundaries == [0, 7]
    assert decoder.done
    assert not decoder.at_boundary


def test_an_end_before_the_last_chunk_is_not_a_clean_end() -> None:
    wire = b"5\r\nhello\r\n0\r\nX: y\r\n\r\n"
    for at in range(len(wire)):
        decoder = ChunkedDecoder()
        decoder.feed(wire[:at])
        assert not decoder.eof()
    decoder = ChunkedDecoder()
    decoder.feed(wire)
    assert decoder.eof()


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"", "bad_chunk_line"),
        (b"0x5", "bad_chunk_size"),
        (b"+5", "bad_chunk_size"),
        (b"-5", "bad_chunk_size"),
        (b"5_0", "bad_chunk_size"),
        (b" 5", "bad_chunk_size"),
        (b"5 ", "bad_chunk_size"),
        (b"5\t", "bad_chunk_size"),
        (b"g", "bad_chunk_size"),
        (b"100000000", "bad_chunk_size"),
        (b"00000000000000005", "bad_chunk_size"),
        (b"5\n", "bad_chunk_line"),
        (b"5;a\nb", "bad_chunk_line"),
        (b"5;a\rb", "bad_chunk_line"),
        (b"5;", "bad_chunk_extension"),
        (b"5;=b", "bad_chunk_extension"),
        (b'5;a="b', "bad_chunk_extension"),
        (b"5;a\x00", "bad_chunk_extension"),
        (b"5;" + b"a" * EXTENSION_BYTES_MAX, "bad_chunk_extension"),
    ],
)
def test_a_bad_size_line_is_refused_with_its_fault(line: bytes, code: str) -> None:
    if not line:  # a lone CR can't begin a size line: refused at once, in either cut, as a size
        with pytest.raises(RemoteProtocolError):
            decode(b"\r\nhello\r\n")
        return
    assert refusal(line + b"\r\nhello\r\n0\r\n\r\n") == code


def test_lines_without_end_are_bounded() -> None:
    assert refusal(b"0" * 300) == "bad_chunk_size"
    assert refusal(b"5;" + b"a" * 300) == "bad_chunk_extension"
    assert refusal(b"0\r\n" + b"a" * (TRAILER_BYTES_MAX + 1)) == "bad_trailer"
    assert refusal(b"0\r\n" + b"a: b\r\n" * (TRAILERS_MAX + 1) + b"\r\n") == "bad_trailer"
    assert refusal(b"0\r\n" + (b"a: " + b"b" * 995 + b"\r\n") * 5) == "bad_trailer"


@pytest.mark.parametrize("trailer", [b"a", b"a : b", b": b", b"a: b\n", b"a: b\rc", b"a: \x00", b" a: b", b"\xe4: b"])
def test_bad_trailers_are_refused(trailer: bytes) -> None:
    assert refusal(b"0\r\n" + trailer + b"\r\n\r\n") == "bad_trailer"


@pytest.mark.parametrize("end", [b"XX", b"\n\r", b"\r\r", b"\n", b"0\r\n"])
def test_data_ends_with_crlf_at_its_size(end: bytes) -> None:
    assert refusal(b"5\r\nhello" + end + b"5\r\nhello\r\n") == "bad_chunk_end"


def test_a_body_with_a_length_ends_at_its_length() -> None:
    decoder = LengthDecoder(5)
    assert (decoder.feed(b"he"), decoder.done, decoder.eof()) == ([b"he"], False, False)
    assert decoder.feed(b"") == []
    assert (decoder.feed(b"llo+rest"), decoder.done, decoder.rest) == ([b"llo"], True, b"+rest")
    assert decoder.eof()


def test_a_body_until_the_close_ends_with_the_connection() -> None:
    decoder = UntilCloseDecoder()
    assert (decoder.feed(b"he"), decoder.feed(b""), decoder.done) == ([b"he"], [], False)
    assert (decoder.eof(), decoder.done, decoder.rest) == (True, True, b"")


@pytest.mark.parametrize(
    ("framing", "length", "kind", "done"),
    [
        (Framing.NONE, 0, LengthDecoder, True),
        (Framing.LENGTH, 0, LengthDecoder, True),
        (Framing.LENGTH, 5, LengthDecoder, False),
        (Framing.CHUNKED, 0, ChunkedDecoder, False),
        (Framing.UNTIL_CLOSE, 0, UntilCloseDecoder, False),
    ],
)
def test_the_framing_chooses_the_decoder(framing: Framing, length: int, kind: type[BodyDecoder], done: bool) -> None:
    decoder = decoder_for(framing, length)
    assert type(decoder) is kind
    assert decoder.done is done


@pytest.mark.parametrize("decoder", [ChunkedDecoder(), LengthDecoder(1), UntilCloseDecoder()])
def test_a_decoder_is_small_and_takes_nothing_after_its_end(decoder: BodyDecoder) -> None:
    assert not hasattr(decoder, "__dict__")
    assert sys.getsizeof(decoder) <= 16 + 9 * 8 + 16  # nine slots, the object's header, the collector's header
    if isinstance(decoder, ChunkedDecoder):
        decoder.feed(LAST_CHUNK)
    else:
        decoder.feed(b"x")
        decoder.eof()
    with pytest.raises(AssertionError):
        decoder.feed(b"x")


# streamd refuses each chunked body that h11 refuses, except these.
DIFFERENCES = {
    "h11 checks framing fields among the trailers; streamd drops all trailers": (
        b"content-length",
        b"transfer-encoding",
    ),
}


def through_h11(wire: bytes) -> tuple[bytes, bool, bytes] | None:
    """The same as `decode`, by h11; None if h11 refuses."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    connection.next_event()
    connection.receive_data(wire)
    payload = b""
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Data):
                payload += event.data
            elif isinstance(event, h11.EndOfMessage):
                return payload, True, connection.trailing_data[0]
            else:
                return payload, False, b""
    except h11.RemoteProtocolError:
        return None


FRAGMENTS = [
    *[b"5\r\nhello\r\n", b"1\r\nx\r\n", b"0\r\n\r\n", b"0\r\n", b"00a;b=c\r\n0123456789\r\n", b'2;q="\\""\r\nab\r\n'],
    *[
        b"\r\n",
        b"\r",
        b"\n",
        b"0",
        b"5",
        b"a",
        b"F",
        b"g",
        b";",
        b"x",
        b" ",
        b"\t",
        b"=",
        b'"',
        b"+",
        b"_",
        b"\x00",
        b"\xff",
    ],
    *[b"X: y\r\n", b"Content-Length: x\r\n", b"X : y\r\n", b" y\r\n", b"hello", b"3\r\nab", b"ffffffff\r\n"],
]


@given(st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=8).map(b"".join))
@example(b"0\r\nContent-Length: x\r\n\r\n")
@example(b"5\r\nhelloXX0\r\n\r\n")
@settings(max_examples=1000, deadline=None)
def test_a_chunked_body_that_h11_refuses_is_refused(wire: bytes) -> None:
    expected = through_h11(wire)
    try:
        ours = decode(wire)
    except RemoteProtocolError:
        return  # stricter than h11, by the rules tested above
    if expected is None:
        assert any(field in wire.lower() for fields in DIFFERENCES.values() for field in fields)
    else:
        assert ours == expected


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=8).map(b"".join))
@settings(max_examples=300, deadline=None)
def test_a_cut_never_changes_the_outcome(wire: bytes) -> None:
    outcomes = []
    for cuts in ((), range(len(wire))):
        try:
            outcomes.append(decode(wire, *cuts))
        except RemoteProtocolError as error:
            outcomes.append(error.status)
    assert outcomes[0] == outcomes[1]


# -- blanks behind a size, in answers

PADDED = [b"5 \r\nhello\r\n0\r\n\r\n", b"5\t \t\r\nhello\r\n0     \r\n\r\n", b"5   ;a=b\r\nhello\r\n000 \r\n\r\n"]


@pytest.mark.parametrize("step", [1, 2, 3, 100])
@pytest.mark.parametrize("wire", PADDED)
def test_blanks_behind_a_size_are_taken_in_answers_and_refused_in_requests(wire: bytes, step: int) -> None:
    pieces = [wire[at : at + step] for at in range(0, len(wire), step)]
    loose = ChunkedDecoder(loose=True)
    assert b"".join(payload for piece in pieces for payload in loose.feed(piece)) == b"hello"
    assert loose.done and loose.rest == b""
    strict = ChunkedDecoder()
    with pytest.raises(RemoteProtocolError, match="hexadecimal digits"):
        for piece in pieces:
            strict.feed(piece)


@pytest.mark.parametrize(
    "line", [b" 5", b"5 5", b"5 x", b" ", b"5\x0b", b"5\xa0", b"0x5 ", b"5 \r", b"-5 ", b"5 ,", b"5" * 17 + b" "]
)
def test_no_other_blanks_are_taken_around_a_size(line: bytes) -> None:
    for step in (1, 100):
        decoder = ChunkedDecoder(loose=True)
        wire = line + b"\r\nhello\r\n"
        with pytest.raises(RemoteProtocolError):
            for at in range(0, len(wire), step):
                decoder.feed(wire[at : at + step])


def test_a_size_lines_blanks_are_bounded() -> None:
    decoder = ChunkedDecoder(loose=True)
    with pytest.raises(RemoteProtocolError):
        for _ in range(1000):
            decoder.feed(b"5" if decoder.at_boundary else b" ")


def test_answers_decode_alike_with_and_without_the_tolerance() -> None:
    wire = b"5;a=b\r\nhello\r\nA\r\n0123456789\r\n0\r\nx: y\r\n\r\n"
    assert ChunkedDecoder(loose=True).feed(wire) == ChunkedDecoder().feed(wire) == [b"hello", b"0123456789"]
