"""Certificates and private keys in PEM files."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NoReturn


class TlsFilesError(ValueError):
    """A certificate and a key that can't be used; the text names the file and the reason."""


def load_pair(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Let a context show the certificate. Raises TlsFilesError."""

    def no_password() -> NoReturn:
        """OpenSSL's question for the password of an encrypted key."""
        raise TlsFilesError(
            f"{key}: the key is encrypted; streamd reads unencrypted keys only (openssl pkey -in … -out …)"
        )

    try:
        context.load_cert_chain(cert, key, password=no_password)
    except ssl.SSLError as error:
        raise TlsFilesError(f"{cert} and {key}: {error.reason or error}") from None
    except OSError as error:
        raise TlsFilesError(f"{error.filename or cert}: {error.strerror}") from None
