"""The end of a certificate's validity, compared with what the cryptography package reads."""

from __future__ import annotations

import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from streamd.wire.certificate import first_expiry

KEY = ec.generate_private_key(ec.SECP256R1())
BEGIN = datetime.datetime(1960, 1, 1, tzinfo=datetime.UTC)


def made(until: datetime.datetime) -> bytes:
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "streamd.test")])
    cert = x509.CertificateBuilder(subject, subject, KEY.public_key(), 1, BEGIN, until).sign(KEY, hashes.SHA256())
    return cert.public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize("year", [1999, 2026, 2049, 2050, 2999])
def test_both_forms_of_time_are_read(year: int) -> None:
    until = datetime.datetime(year, 12, 31, 23, 59, 58, tzinfo=datetime.UTC)
    assert first_expiry(made(until)) == int(until.timestamp())


def test_of_a_chain_the_first_that_expires_counts_and_other_text_does_not() -> None:
    early, late = (datetime.datetime(year, 1, 1, tzinfo=datetime.UTC) for year in (2030, 2040))
    chain = b"a comment\n" + made(late) + b"\n" + made(early) + made(late)
    assert first_expiry(chain) == int(early.timestamp())


@given(st.binary(max_size=200))
def test_bytes_that_are_no_certificate_have_no_end(data: bytes) -> None:
    assert first_expiry(data) == 0
    assert first_expiry(b"-----BEGIN CERTIFICATE-----" + data + b"-----END CERTIFICATE-----") == 0


def test_a_certificate_that_is_cut_has_no_end() -> None:
    import base64

    whole = base64.b64decode(b"".join(made(datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)).splitlines()[1:-1]))
    for length in range(100):
        cut = base64.b64encode(whole[:length])
        assert first_expiry(b"-----BEGIN CERTIFICATE-----\n" + cut + b"\n-----END CERTIFICATE-----") == 0
