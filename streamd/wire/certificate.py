"""The end of a certificate's validity, read from its PEM text (RFC 5280 4.1.2.5, RFC 7468).

Why here and not by a library: Python's ssl tells it only for a peer's certificate, and the cryptography package takes
10 MiB. Whether the certificate can be used is OpenSSL's decision, and was made before.
"""

from __future__ import annotations

import binascii
import re
from datetime import UTC, datetime
from typing import Final

_CERTIFICATE: Final = re.compile(rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----(.*?)-----END ", re.S)

# Tags of DER (X.690): a version is [0] explicit, times are UTCTime and GeneralizedTime.
_SEQUENCE: Final = 0x30
_VERSION: Final = 0xA0
_UTC_TIME: Final = 0x17
_GENERALIZED_TIME: Final = 0x18


def first_expiry(pem: bytes) -> int:
    """The first time, in whole seconds of Unix time, at which a certificate of the chain is no longer valid.

    0 if the text has no certificate, or none that can be read.
    """
    return min((found for body in _CERTIFICATE.findall(pem) if (found := _not_after(body))), default=0)


def _not_after(body: bytes) -> int:
    try:
        certificate = _content(binascii.a2b_base64(body), _SEQUENCE)
        signed = _content(certificate, _SEQUENCE)
        if signed[:1] == bytes((_VERSION,)):
            signed = _rest(signed)
        validity = _content(_rest(_rest(_rest(signed))), _SEQUENCE)  # behind serial number, algorithm, issuer
        return _time(_rest(validity))
    except (ValueError, IndexError, OverflowError):
        return 0


def _time(data: bytes) -> int:
    text = _content(data, data[0]).decode("ascii")
    if data[0] == _UTC_TIME:
        text = ("19" if text[:2] >= "50" else "20") + text
    elif data[0] != _GENERALIZED_TIME:
        raise ValueError("no time")
    return int(datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp())


def _bounds(data: bytes) -> tuple[int, int]:
    """Where the content of the first element begins and ends. Raises ValueError and IndexError."""
    length, begin = data[1], 2
    if length & 0x80:
        begin += length & 0x7F
        length = int.from_bytes(data[2:begin], "big")
    if begin + length > len(data):
        raise ValueError("cut short")
    return begin, begin + length


def _content(data: bytes, tag: int) -> bytes:
    begin, end = _bounds(data)
    if data[0] != tag:
        raise ValueError("another element")
    return data[begin:end]


def _rest(data: bytes) -> bytes:
    """The elements behind the first."""
    return data[_bounds(data)[1] :]
