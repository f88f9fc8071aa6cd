"""Files that say who comes in: API keys, tokens' secret and key set, the certificate and its key.

Read at start and at every reload, which fail as a whole if one of them isn't right; and looked at every second, since
people renew certificates and revoke keys without thinking of a daemon. A changed file that isn't right changes nothing:
what was read before holds, and the log says why, once. Files that belong together (certificate and key) are read
together; when they are replaced one after the other, the first attempt fails and the second doesn't.

What is secret must not be readable by others: keys' hashes, the token secret and the certificate's key are refused
otherwise.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamd.api.access import Access
from streamd.config import ConfigError, Settings
from streamd.core.keys import KeyFileError, Keys
from streamd.daemon import keyfile, logs
from streamd.net.runtime import Runtime
from streamd.net.tls import TlsFilesError, load_context
from streamd.sources import Problem

if TYPE_CHECKING:
    from streamd.core.tokens import Verifier

# A revoked key is out within so long; a look is one stat() a file.
LOOK_EVERY_S = 1.0

Stamp = tuple[int, int, int, int] | None


Take = Callable[[Any], None]


class Unusable(Exception):
    """A file that can't be used: which setting names it, and why."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(why)
        self.key = key


@dataclass(slots=True)
class Group:
    """Files that are read together, and what is made of them. No files: the feature is off."""

    paths: tuple[Path, ...]
    read: Callable[[], Any]  # raises Unusable
    take: Callable[[Any], None]
    stamps: tuple[Stamp, ...] = field(default=())  # of the files that were last read, well or not

    def load(self) -> Any:
        # Stamps first: a file that changes while it is read is read again.
        self.stamps = tuple(map(_stamp, self.paths))
        return self.read() if self.paths else None

    def changed(self) -> bool:
        return self.stamps != tuple(map(_stamp, self.paths))


LoadedFiles = tuple[tuple[Group, Any], ...]  # with the content of each group


class AccessFiles:
    """The files of the current settings. `watch` is for the sweep's on_tick."""

    def __init__(self, runtime: Runtime, access: Access) -> None:
        self._runtime = runtime
        self._access = access
        self._groups: tuple[Group, ...] = ()
        self._look_at = 0.0

    def load(self, settings: Settings) -> None:
        """Read all files of `settings` and take them up together. Raises ConfigError, and then nothing has changed."""
        self.take(self.read(settings))

    def read(self, settings: Settings) -> LoadedFiles:
        """Read all files of `settings`, and change nothing. Raises ConfigError."""
        takes = (self._access.take_keys, self._access.take_verifier, self._take_context)
        groups = _groups_of(settings, takes)
        return tuple(zip(groups, _load_all(groups), strict=True))

    def take(self, files: LoadedFiles) -> None:
        """Use these files from now on."""
        for group, value in files:
            group.take(value)
        self._groups = tuple(group for group, _ in files)

    def watch(self, now: float, lag_s: float) -> None:
        """Once a second: read again what has changed on disk."""
        if now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY_S
        for group in self._groups:
            if group.changed():
                self._read_again(group)

    def _read_again(self, group: Group) -> None:
        files = tuple(map(str, group.paths))
        try:
            value = group.load()
        except Unusable as error:
            logs.event(logs.ERROR, "file refused; what was read before holds", file=files, error=str(error))
        else:
            group.take(value)
            logs.event(logs.INFO, "file read again", file=files)

    def _take_context(self, context: ssl.SSLContext | None) -> None:
        self._runtime.tls = context  # for connections that come from now on


def _groups_of(s: Settings, takes: tuple[Take, Take, Take]) -> tuple[Group, ...]:
    """Keys, tokens, certificate, and who takes what is made of each."""
    return (
        Group(_paths(s.keys_file), lambda: _keys(Path(s.keys_file)), takes[0]),
        Group(_paths(s.token_secret_file, s.token_jwks_file), lambda: _verifier(s), takes[1]),
        Group(_paths(s.tls_cert, s.tls_key), lambda: _context(s), takes[2]),
    )


def _load_all(groups: tuple[Group, ...]) -> list[Any]:
    """What each group is. Raises ConfigError with all that is wrong."""
    loaded: list[Any] = []
    problems: list[Problem] = []
    for group in groups:
        try:
            loaded.append(group.load())
        except Unusable as error:
            problems.append(Problem("access files", error.key, "", str(error)))
    if problems:
        raise ConfigError(problems)
    return loaded


def _paths(*names: str) -> tuple[Path, ...]:
    return tuple(Path(name) for name in names if name)


def _stamp(path: Path) -> Stamp:
    """What changes when a file is replaced or written to; None if it isn't there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _secret(key: str, path: Path) -> bytes:
    """The content of a file that others may not read."""
    try:
        return keyfile.read(path)
    except keyfile.KeyFileModeError as error:
        raise Unusable(key, str(error)) from None
    except OSError as error:
        raise Unusable(key, f"{path}: {error.strerror}") from None


def _keys(path: Path) -> Keys:
    try:
        return Keys.parse(_secret("keys_file", path))
    except KeyFileError as error:
        raise Unusable("keys_file", f"{path}: {error}") from None


def _verifier(settings: Settings) -> Verifier:
    from streamd.core import tokens  # Why here: it needs the cryptography package, which only tokens do

    keys: tuple[tokens.VerifyKey, ...] = ()
    name, path = "token_secret_file", settings.token_secret_file
    try:
        if path:
            keys += (tokens.load_secret(_secret(name, Path(path))),)
        name, path = "token_jwks_file", settings.token_jwks_file
        if path:
            keys += tokens.load_jwks(_public(name, Path(path), tokens.JWKS_BYTES_MAX))
    except tokens.TokenKeyError as error:
        raise Unusable(name, f"{path}: {error}") from None
    return tokens.Verifier(keys, audience=settings.token_audience, leeway_s=settings.token_leeway_s)


def _public(key: str, path: Path, bytes_max: int) -> bytes:
    """The content of a file that anybody may read, and one byte more if it is too large."""
    try:
        with path.open("rb") as file:
            return file.read(bytes_max + 1)
    except OSError as error:
        raise Unusable(key, f"{path}: {error.strerror}") from None


def _context(settings: Settings) -> ssl.SSLContext:
    _secret("tls_key", Path(settings.tls_key))  # for its mode; OpenSSL reads it by itself
    try:
        return load_context(Path(settings.tls_cert), Path(settings.tls_key))
    except TlsFilesError as error:
        raise Unusable("tls_cert", str(error)) from None
