"""The check of a client's handshake: real hellos pass in any cut, costly hellos are refused at first sight."""

from __future__ import annotations

import contextlib
import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.wire.client_hello import (
    CLEAR_BYTES_MAX,
    HELLO_BYTES_MAX,
    SESSIONS_MAX,
    ClientHelloCheck,
    HelloRefused,
)

X25519, P256, P384, FFDHE2048, FFDHE8192, X25519MLKEM768 = 0x1D, 0x17, 0x18, 0x0100, 0x0104, 0x11EC


def vector(size_bytes: int, content: bytes) -> bytes:
    return len(content).to_bytes(size_bytes, "big") + content


def extension(kind: int, content: bytes) -> bytes:
    return kind.to_bytes(2, "big") + vector(2, content)


def shares(*groups: int) -> bytes:
    return extension(51, vector(2, b"".join(group.to_bytes(2, "big") + vector(2, b"k" * 32) for group in groups)))


def sessions(count: int) -> bytes:
    identities = b"".join(vector(2, b"t" * 40) + bytes(4) for _ in range(count))
    return extension(41, vector(2, identities) + vector(2, b"binder"))


VERSIONS = extension(43, b"\x04\x03\x04\x03\x03")


def hello(*extensions: bytes, session_id: bytes = b"s" * 32) -> bytes:
    body = b"\x03\x03" + b"r" * 32 + vector(1, session_id) + vector(2, b"\x13\x01") + vector(1, b"\0")
    return b"\x01" + vector(3, body + vector(2, b"".join(extensions)))


def records(message: bytes, size: int = 16384, kind: int = 22) -> bytes:
    return b"".join(
        bytes((kind, 3, 1)) + vector(2, message[at : at + size]) for at in range(0, len(message) or 1, size)
    )


def real_hello(version: ssl.TLSVersion) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = version
    into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(into, out, server_hostname="streamd.test").do_handshake()
    return out.read()


PASS = {
    "a browser's": hello(VERSIONS, shares(0x2A2A, X25519MLKEM768, X25519)),
    "an old client's": hello(),
    "P-256 alone": hello(VERSIONS, shares(P256)),
    "a resumed session": hello(VERSIONS, shares(P384), sessions(2)),
    "no session id": hello(VERSIONS, shares(X25519), session_id=b""),
    "as large as may be": hello(VERSIONS, extension(21, bytes(HELLO_BYTES_MAX - 200))),
    "an extension cut off": hello(VERSIONS, b"\0\x33\x40\0"),
    "as many sessions as may be": hello(VERSIONS, sessions(SESSIONS_MAX)),
}

REFUSED = {
    "announces 128 KiB": b"\x01" + (131_000).to_bytes(3, "big") + b"\x03\x03" + b"r" * 32,
    "too large": hello(VERSIONS, extension(21, bytes(HELLO_BYTES_MAX))),
    "a finite field of 8,192 bits": hello(VERSIONS, shares(FFDHE8192)),
    "a finite field behind a curve": hello(VERSIONS, shares(X25519, FFDHE2048)),
    "shares in front of the versions": hello(shares(FFDHE8192), VERSIONS),
    "too many sessions": hello(VERSIONS, shares(X25519), sessions(SESSIONS_MAX + 1)),
    "another message announces much": b"\x10" + (100_000).to_bytes(3, "big"),
    "behind a hello": hello(VERSIONS) + b"\x0b" + (100_000).to_bytes(3, "big"),
    "a second hello": hello(VERSIONS) + hello(VERSIONS, shares(FFDHE8192)),
}


@pytest.mark.parametrize("name", PASS)
@pytest.mark.parametrize("size", [1, 7, 16384])
def test_real_hellos_pass(name: str, size: int) -> None:
    ClientHelloCheck().feed(records(PASS[name], max(size, len(PASS[name]) // 2000)))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_the_hello_of_openssl_passes(version: ssl.TLSVersion) -> None:
    ClientHelloCheck().feed(real_hello(version))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("size", [3, 50, 16384])
@pytest.mark.parametrize("piece", [1, 100_000])
def test_costly_hellos_are_refused_in_any_cut(name: str, size: int, piece: int) -> None:
    wire = records(REFUSED[name], max(size, len(REFUSED[name]) // 2000))
    check = ClientHelloCheck()
    with pytest.raises(HelloRefused):
        for at in range(0, len(wire), piece):
            check.feed(wire[at : at + piece])


def test_a_second_hello_is_checked_behind_a_change_of_cipher_of_tls_1_3() -> None:
    check = ClientHelloCheck()
    check.feed(records(hello(VERSIONS)) + records(b"\x01", kind=20))
    with pytest.raises(HelloRefused):
        check.feed(records(hello(VERSIONS, shares(FFDHE8192))))


def test_encrypted_bytes_of_tls_1_2_are_no_hello() -> None:
    check = ClientHelloCheck()
    check.feed(records(hello()) + records(b"\x10" + vector(3, b"k" * 66)) + records(b"\x01", kind=20))
    check.feed(records(b"\x01\xff\xff\xff" + b"x" * 40))


def test_records_in_the_clear_are_bounded_together() -> None:
    check, empty = ClientHelloCheck(), records(b"")
    with pytest.raises(HelloRefused):
        for _ in range(CLEAR_BYTES_MAX // len(empty) + 1):
            check.feed(empty)


@given(st.binary(max_size=300), st.integers(1, 50))
def test_any_bytes_are_taken_or_refused(data: bytes, size: int) -> None:
    for wire in (data, records(data, size), records(b"\x01" + vector(3, data))):
        with contextlib.suppress(HelloRefused):
            ClientHelloCheck().feed(wire)
