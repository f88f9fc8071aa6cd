"""Certificates for tests: made here, trusted nowhere else, valid for a day."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


def make_certificate(folder: Path, name: str = "streamd.test") -> tuple[Path, Path]:
    """A certificate for `name` and 127.0.0.1, and its key: cert.pem and key.pem of the folder, replaced if there."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName(name), x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))])
    cert = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return _replace(folder / "cert.pem", cert.public_bytes(pem)), _replace(folder / "key.pem", private)


def _replace(path: Path, content: bytes) -> Path:
    beside = path.with_suffix(".new")
    beside.write_bytes(content)
    beside.chmod(0o600)
    beside.rename(path)
    return path


def client_context(cert: Path) -> ssl.SSLContext:
    """A client that trusts this certificate alone, whatever the name."""
    context = ssl.create_default_context(cafile=str(cert))
    context.check_hostname = False
    return context
