import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.wire.proxy_v2 import LENGTH_MAX, SIGNATURE, ProxyHeader, ProxyHeaderError, parse_proxy_v2

TCP4 = bytes([192, 0, 2, 1, 10, 0, 0, 1]) + b"\x12\x67\x01\xbb"
TCP6 = ipaddress.ip_address("2001:db8::1").packed + bytes(16) + b"\x12\x67\x01\xbb"
MAPPED = ipaddress.ip_address("::ffff:192.0.2.1").packed + bytes(16) + b"\x12\x67\x01\xbb"
TLV = b"\x04\x00\x05hello"


def header(version_command: int, family: int, rest: bytes, length: int | None = None) -> bytes:
    size = len(rest) if length is None else length
    return SIGNATURE + bytes([version_command, family]) + size.to_bytes(2, "big") + rest


@pytest.mark.parametrize(
    ("buffer", "local", "address", "port"),
    [
        (header(0x21, 0x11, TCP4), False, "192.0.2.1", 4711),
        (header(0x21, 0x11, TCP4 + TLV), False, "192.0.2.1", 4711),
        (header(0x21, 0x21, TCP6), False, "2001:db8::1", 4711),
        (header(0x21, 0x21, TCP6 + TLV * 100), False, "2001:db8::1", 4711),
        (header(0x21, 0x21, MAPPED), False, "192.0.2.1", 4711),
        (header(0x21, 0x31, bytes(216)), False, None, 0),
        (header(0x21, 0x00, b""), True, None, 0),
        (header(0x21, 0x00, TLV), True, None, 0),
        (header(0x20, 0x00, b""), True, None, 0),
        (header(0x20, 0x11, TCP4), True, None, 0),
        (header(0x20, 0xFF, b"xyz"), True, None, 0),
        (header(0x21, 0x11, TCP4 + bytes(LENGTH_MAX - 12)), False, "192.0.2.1", 4711),
    ],
)
def test_a_header_is_parsed_in_any_cut_and_with_bytes_after_it(
    buffer: bytes, local: bool, address: str | None, port: int
) -> None:
    expected = ProxyHeader(len(buffer), local, address, port)
    assert parse_proxy_v2(buffer) == expected
    assert parse_proxy_v2(buffer + b"GET / HTTP/1.1\r\n") == expected
    for cut in range(len(buffer)):
        assert parse_proxy_v2(buffer[:cut]) is None


@pytest.mark.parametrize(
    ("buffer", "text"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "no PROXY v2 header"),
        (b"G", "no PROXY v2 header"),
        (b"\r\n\r\nGET", "no PROXY v2 header"),
        (b"\x16\x03\x01", "no PROXY v2 header"),
        (b"PROXY TCP4 192.0.2.1 10.0.0.1 4711 443\r\n", "version 1; set the proxy to version 2"),
        (SIGNATURE[:-1] + b"\r", "no PROXY v2 header"),
        (header(0x11, 0x11, TCP4), "version 1, command 1"),
        (header(0x31, 0x11, TCP4), "version 3"),
        (header(0x22, 0x11, TCP4), "command 2"),
        (header(0x2F, 0x11, TCP4), "command 15"),
        (header(0x21, 0x12, TCP4), "family 0x12"),  # for datagrams
        (header(0x21, 0x41, TCP4), "family 0x41"),
        (header(0x21, 0x10, TCP4), "family 0x10"),
        (header(0x21, 0x11, TCP4[:-1]), "family 0x11 and 11 bytes"),
        (header(0x21, 0x21, TCP4), "family 0x21 and 12 bytes"),
        (header(0x21, 0x31, bytes(215)), "family 0x31"),
        (header(0x21, 0x11, b"", LENGTH_MAX + 1), "at most 4096"),
        (header(0x20, 0x00, b"", 0xFFFF), "at most 4096"),
    ],
)
def test_a_broken_header_is_refused_as_soon_as_the_fault_shows(buffer: bytes, text: str) -> None:
    with pytest.raises(ProxyHeaderError, match=text):
        parse_proxy_v2(buffer)
    cut = min(len(buffer), 16)
    with pytest.raises(ProxyHeaderError):
        parse_proxy_v2(buffer[:cut])


@given(st.binary(max_size=64), st.booleans())
def test_any_bytes_are_parsed_or_refused(rest: bytes, signed: bool) -> None:
    buffer = SIGNATURE + rest if signed else rest
    try:
        found = parse_proxy_v2(buffer)
    except ProxyHeaderError:
        return
    assert found is None or 16 <= found.bytes_read <= len(buffer)


def test_a_header_that_fills_the_buffer_is_decided_at_once() -> None:
    assert parse_proxy_v2(header(0x21, 0x00, bytes(LENGTH_MAX))) is not None
    with pytest.raises(ProxyHeaderError):
        parse_proxy_v2(header(0x21, 0x00, bytes(LENGTH_MAX), LENGTH_MAX + 1))
