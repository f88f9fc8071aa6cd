"""The PROXY protocol, version 2 (haproxy's proxy-protocol.txt, 2.2): the header that a proxy sends first.

    12 bytes signature | version 2, command | family, transport | length, 2 bytes | addresses | TLVs, skipped

Read only from peers that are configured to send it, and then always: if it were optional, a client behind the proxy
could write a header of its own. Version 1 has its own error text, since a proxy set to it is the likeliest mistake.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass, field
from typing import Final

SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"
# Most bytes of addresses and TLVs: addresses take 216 bytes at most (Unix), TLVs are a checksum, an id, and with TLS a
# name or a certificate's subject.
LENGTH_MAX: Final = 4096

_HEAD = struct.Struct("!12sBBH")
_VERSION_2: Final = 2
_LOCAL: Final = 0
_PROXY: Final = 1
_UNSPECIFIED: Final = 0x00  # AF_UNSPEC, any transport: the proxy doesn't know its client's address
_TCP4: Final = 0x11
_TCP6: Final = 0x21
_UNIX: Final = 0x31
# family and transport → size of the two addresses (and ports)
_ADDRESSES_BYTES: Final = {_UNSPECIFIED: 0, _TCP4: 12, _TCP6: 36, _UNIX: 216}


class ProxyHeaderError(Exception):
    """The peer sent no PROXY v2 header, or a broken one: close without an answer. The text is for the log."""


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """A whole header: the source of the connection, and the number of bytes that the header took."""

    bytes_read: int
    local: bool  # the proxy's own connection (a health check), or of unknown source: its real peer counts
    address: str | None = None  # None if `local`, and for a client on a Unix socket of the proxy
    port: int = 0
    unnamed: bool = field(default=False, compare=False)  # a client's connection, without the client's address


def parse_proxy_v2(buffer: bytes) -> ProxyHeader | None:
    """The header at the start of the buffer; None: not whole yet. ProxyHeaderError once it can't become a header.

    The caller keeps at most `_HEAD.size + LENGTH_MAX` bytes: a buffer of that size is never "not whole yet".
    """
    if not buffer.startswith(SIGNATURE[: len(buffer)]):
        raise ProxyHeaderError(
            "PROXY protocol version 1; set the proxy to version 2"
            if buffer.startswith(b"PROXY")
            else "no PROXY v2 header"
        )
    if len(buffer) < _HEAD.size:
        return None
    _, version_command, family, length = _HEAD.unpack_from(buffer)
    version, command = version_command >> 4, version_command & 15
    if version != _VERSION_2 or command not in (_LOCAL, _PROXY):
        raise ProxyHeaderError(f"PROXY header with version {version}, command {command}")
    if length > LENGTH_MAX:
        raise ProxyHeaderError(f"PROXY header of {length} bytes; at most {LENGTH_MAX} are taken")
    # A LOCAL header's addresses are to be skipped, whatever they are.
    if command == _PROXY and length < _ADDRESSES_BYTES.get(family, length + 1):
        raise ProxyHeaderError(f"PROXY header of family {family:#04x} and {length} bytes")
    end = _HEAD.size + length
    if len(buffer) < end:
        return None
    if command == _LOCAL or family == _UNSPECIFIED:
        return ProxyHeader(end, local=True, unnamed=command == _PROXY)
    return _source(buffer, family, end)


def _source(buffer: bytes, family: int, end: int) -> ProxyHeader:
    at = _HEAD.size
    if family == _TCP4:
        port = int.from_bytes(buffer[at + 8 : at + 10], "big")
        return ProxyHeader(end, False, str(ipaddress.IPv4Address(buffer[at : at + 4])), port)
    if family == _TCP6:
        port = int.from_bytes(buffer[at + 32 : at + 34], "big")
        address = ipaddress.IPv6Address(buffer[at : at + 16])
        return ProxyHeader(end, False, str(address.ipv4_mapped or address), port)
    return ProxyHeader(end, local=False, unnamed=True)
