"""The client's part of a TLS handshake, checked before OpenSSL sees it.

OpenSSL takes as much memory for a handshake message as its first four bytes announce, up to 128 KiB, before the message
has come; and it computes with any group that a client chooses, though 8,192-bit Diffie-Hellman takes it an eighth of a
second. Python's `ssl` can't bound either. So the records that are still in the clear are looked at here:

- a handshake message is at most HELLO_BYTES_MAX, and all records in the clear together at most CLEAR_BYTES_MAX;
- a hello's key shares are of elliptic curves (or hybrids with them), never of finite fields (RFC 7919);
- a hello offers few sessions to resume: each may cost a decryption.

Everything else, malformed hellos included, is OpenSSL's to judge. The check ends with the handshake, or where a TLS 1.2
client begins to encrypt.
"""

from __future__ import annotations

from typing import Final

# The largest hello of a browser with post-quantum key shares takes 1.8 KB; with a session ticket of 8 KB still below.
HELLO_BYTES_MAX: Final = 16 * 1024

# Two hellos (after a HelloRetryRequest, RFC 8446 4.1.2), and the records' heads.
CLEAR_BYTES_MAX: Final = 3 * HELLO_BYTES_MAX

SESSIONS_MAX: Final = 8  # clients offer the one or two newest

_CHANGE_CIPHER_SPEC: Final = 20
_HANDSHAKE: Final = 22
_CLIENT_HELLO: Final = 1
_PRE_SHARED_KEY: Final = 41
_SUPPORTED_VERSIONS: Final = 43
_KEY_SHARE: Final = 51
_FINITE_FIELDS: Final = range(0x0100, 0x0200)


class HelloRefused(Exception):
    """The handshake would cost too much; the text says why."""


class ClientHelloCheck:
    """Fed with the bytes of a connection until its handshake is done. Holds at most a hello."""

    __slots__ = ("_clear_bytes", "_head", "_is_1_3", "_kind", "_left", "_message", "_over")

    def __init__(self) -> None:
        self._clear_bytes = 0
        self._head = b""  # an unfinished record head
        self._kind = 0  # of the record whose payload comes next
        self._left = 0  # bytes of that payload
        self._message = bytearray()  # an unfinished handshake message
        self._is_1_3 = False
        self._over = False

    def feed(self, data: bytes) -> None:
        """The next bytes, in any cut. Raises HelloRefused."""
        at = 0
        while at < len(data) and not self._over:
            if not self._left:
                head = self._head + data[at : at + 5 - len(self._head)]
                at += len(head) - len(self._head)
                self._head = head
                if len(head) == 5:
                    self._begin_record(head)
                continue
            payload = data[at : at + self._left]
            at += len(payload)
            self._left -= len(payload)
            if self._kind == _HANDSHAKE:
                self._message += payload
                self._check_whole()

    def _begin_record(self, head: bytes) -> None:
        self._head = b""
        self._kind = head[0]
        self._left = int.from_bytes(head[3:5], "big")
        if self._kind == _CHANGE_CIPHER_SPEC and not self._is_1_3:
            self._over = True  # what follows is encrypted, and OpenSSL takes a Finished of 64 bytes at most
            return
        if self._kind == _HANDSHAKE:
            self._clear_bytes += 5 + self._left
            if self._clear_bytes > CLEAR_BYTES_MAX:
                raise HelloRefused("the handshake is too large")

    def _check_whole(self) -> None:
        message = self._message
        while len(message) >= 4:
            size = int.from_bytes(message[1:4], "big")
            if size > HELLO_BYTES_MAX:
                raise HelloRefused(f"a handshake message announces {size} bytes")
            if len(message) < 4 + size:
                return
            if message[0] == _CLIENT_HELLO:
                self._check_hello(bytes(message[4 : 4 + size]))
            del message[: 4 + size]

    def _check_hello(self, hello: bytes) -> None:
        for kind, content in _extensions(hello):
            if kind == _SUPPORTED_VERSIONS and b"\x03\x04" in content:
                self._is_1_3 = True
            elif kind == _KEY_SHARE:
                if any(group in _FINITE_FIELDS for group, _ in _pairs(content[2:])):
                    raise HelloRefused("the key share is no elliptic curve's")
            elif kind == _PRE_SHARED_KEY and _sessions(content) > SESSIONS_MAX:
                raise HelloRefused("the hello offers too many sessions")


def _extensions(hello: bytes) -> list[tuple[int, bytes]]:
    """(type, content) of a hello's extensions (RFC 8446 4.1.2); none of a malformed hello."""
    at = 34  # version and random
    for size_bytes in (1, 2, 1):  # session id, cipher suites, compression methods
        at += size_bytes + int.from_bytes(hello[at : at + size_bytes], "big")
    return _pairs(hello[at + 2 :])


def _pairs(data: bytes) -> list[tuple[int, bytes]]:
    """Pairs of a 16-bit number and bytes behind their 16-bit length, as far as they are whole."""
    found = []
    at = 0
    while at + 4 <= len(data):
        end = at + 4 + int.from_bytes(data[at + 2 : at + 4], "big")
        if end > len(data):
            break
        found.append((int.from_bytes(data[at : at + 2], "big"), data[at + 4 : end]))
        at = end
    return found


def _sessions(content: bytes) -> int:
    """The number of identities in a pre_shared_key extension (RFC 8446 4.2.11)."""
    end = min(2 + int.from_bytes(content[:2], "big"), len(content))
    at, count = 2, 0
    while at + 2 <= end:
        at += 2 + int.from_bytes(content[at : at + 2], "big") + 4
        count += 1
    return count
