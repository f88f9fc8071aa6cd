"""Files with credentials: API keys, the secret and the key set of tokens, TLS certificates and their keys.

The files are read at start and at every reload, which fails as a whole if any of them is unusable. They are also
polled every second, since people renew certificates and revoke keys without thinking of a daemon. A changed file that
is unusable changes nothing: its previous version stays in use, and the log gives the reason, once. Files that belong
together (certificate and key) are read together; when they are replaced one after the other, the first attempt fails
and the second succeeds.

Secret files (the keys' hashes, the token secret, the certificates' keys) are refused if other users may read them. A
key set is no secret, but a user that may write it opens every stream: it is refused if other users may change it.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from streamd.api.rights import Rights
from streamd.config import ConfigError, Settings, UpstreamSettings
from streamd.core.keys import KeyFileError, Keys
from streamd.daemon import keyfile, logs
from streamd.files import why_unreadable
from streamd.net.in_turns import Steps, at_once, in_turns
from streamd.net.runtime import Runtime
from streamd.net.tls import load_context
from streamd.net.tls_files import TlsFilesError
from streamd.net.upstream import context_of
from streamd.net.upstreams import Upstreams
from streamd.sources import ConfigProblem
from streamd.wire.certificate import first_expiry

if TYPE_CHECKING:
    from streamd.core.tokens import Verifier

# Poll interval: a revoked key stops working within this time. A poll costs one stat() per file.
LOOK_EVERY_S = 1.0

# As much of a chain's file as is searched for the time of its expiry; a certificate has 2 KB, a chain 3 of them.
CHAIN_BYTES_MAX = 64 * 1024

Stamp = tuple[int, ...] | None


Take = Callable[[Any], None]


class Unusable(Exception):
    """A file that can't be used. `key` is the setting that names it; the text gives the reason."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(why)
        self.key = key


@dataclass(slots=True)
class Group:
    """Files that are read together into one object. Without files the feature is off."""

    paths: tuple[Path, ...]
    read: Callable[[], Steps[Any]]  # raises Unusable
    take: Callable[[Any], None]
    stamps: tuple[Stamp, ...] = field(default=())  # of the files at the last read, which may have failed

    def load(self) -> Steps[Any]:
        # Stamps first: a file that changes while it is read is read again.
        self.stamps = tuple(map(_stamp, self.paths))
        return (yield from self.read()) if self.paths else None

    def changed(self) -> bool:
        return self.stamps != tuple(map(_stamp, self.paths))


class ShownCertificate(NamedTuple):
    """A certificate to show to peers."""

    context: ssl.SSLContext
    until: int  # Unix time at which the first certificate of its chain expires


LoadedFiles = tuple[tuple[Group, Any], ...]  # each group with its object


class CredentialFiles:
    """The files of the current settings. The sweep's on_tick calls `watch`."""

    def __init__(self, runtime: Runtime, rights: Rights, upstreams: Upstreams) -> None:
        self._runtime = runtime
        self._rights = rights
        self._upstreams = upstreams
        self._groups: tuple[Group, ...] = ()
        self._reading: set[int] = set()  # ids of the groups that are being read again
        self._look_at = 0.0
        self.certificate_until = 0  # Unix time at which the first certificate of tls_cert expires; 0: there is none

    def load(self, settings: Settings) -> None:
        """Read all files of `settings` and use them from now on. If it raises ConfigError, nothing has changed."""
        self.take(at_once(self.read(settings)))

    def read(self, settings: Settings) -> Steps[LoadedFiles]:
        """Read all files of `settings`, in slices, without using them yet. Raises ConfigError."""
        takes = (self._rights.take_keys, self._rights.take_verifier, self._take_context)
        groups = (*_groups_of(settings, takes), *self._groups_of_upstreams(settings))
        loaded = yield from _load_all(groups)
        return tuple(zip(groups, loaded, strict=True))

    def take(self, files: LoadedFiles) -> None:
        """Use these files from now on."""
        for group, value in files:
            group.take(value)
        self._groups = tuple(group for group, _ in files)

    def watch(self, now: float, lag_s: float) -> None:
        """Once a second: read again each group with a file that has changed on disk."""
        if now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY_S
        for group in self._groups:
            if id(group) not in self._reading and group.changed():
                self._read_again(group)

    def _read_again(self, group: Group) -> None:
        """Read a group in slices: the loop goes on meanwhile."""
        files = tuple(map(str, group.paths))

        def done(value: Any) -> None:
            self._reading.discard(id(group))
            if group in self._groups:  # else a reload has brought others meanwhile
                group.take(value)
                logs.event(logs.INFO, "file read again", file=files)

        def failed(error: Exception) -> None:
            self._reading.discard(id(group))
            if not isinstance(error, Unusable):
                self._runtime.bug("credential_files", error)
            logs.event(logs.ERROR, "file refused; its previous version stays in use", file=files, error=str(error))

        self._reading.add(id(group))
        in_turns(self._runtime.loop, group.load(), done, failed)

    def _groups_of_upstreams(self, settings: Settings) -> Iterator[Group]:
        """The files by which streamd shows itself to each upstream, with those that it trusts there."""
        for each in settings.upstreams:
            if each.client_cert:
                paths = _paths(each.client_cert, each.client_key, each.ca_file)
                read = partial(_in_one, partial(_client_context, each))
                yield Group(paths, read, partial(self._take_client_context, each.name))

    def _take_client_context(self, name: str, shown: ShownCertificate) -> None:
        for upstream in self._upstreams:
            if upstream.settings.name == name:
                upstream.renew(*shown)

    def _take_context(self, shown: ShownCertificate | None) -> None:
        # For connections that are accepted from now on.
        self._runtime.tls, self.certificate_until = shown or (None, 0)


def _groups_of(s: Settings, takes: tuple[Take, Take, Take]) -> tuple[Group, ...]:
    """The groups for keys, tokens and certificate. `takes` has the function that gets the object of each."""
    return (
        Group(_paths(s.keys_file), lambda: _keys(Path(s.keys_file)), takes[0]),
        Group(_paths(s.token_secret_file, s.token_jwks_file), lambda: _in_one(lambda: _verifier(s)), takes[1]),
        Group(_paths(s.tls_cert, s.tls_key), lambda: _in_one(lambda: _context(s)), takes[2]),
    )


def _in_one(read: Callable[[], Any]) -> Steps[Any]:
    """A file that is read in a single slice."""
    yield
    return read()


def _load_all(groups: tuple[Group, ...]) -> Steps[list[Any]]:
    """The object of each group. Raises ConfigError with the problems of all groups."""
    loaded: list[Any] = []
    problems: list[ConfigProblem] = []
    for group in groups:
        try:
            loaded.append((yield from group.load()))
        except Unusable as error:
            problems.append(ConfigProblem("credential files", error.key, "", str(error)))
    if problems:
        raise ConfigError(problems)
    return loaded


def _paths(*names: str) -> tuple[Path, ...]:
    return tuple(Path(name) for name in names if name)


def _stamp(path: Path) -> Stamp:
    """Numbers that change when a file or its mode is changed; None if the file can't be found."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode


def _secret(key: str, path: Path) -> bytes:
    """The content of a file that other users must not be able to read."""
    try:
        return keyfile.read(path)
    except keyfile.KeyFileModeError as error:
        raise Unusable(key, str(error)) from None
    except OSError as error:
        raise Unusable(key, why_unreadable(path) or f"{path}: {error.strerror}") from None


def _keys(path: Path) -> Steps[Keys]:
    content = _secret("keys_file", path)
    yield
    try:
        return (yield from Keys.parse_in_slices(content))
    except KeyFileError as error:
        raise Unusable("keys_file", f"{path}: {error}") from None


def _verifier(settings: Settings) -> Verifier:
    from streamd.core import tokens  # Why here: it imports the cryptography package, which only tokens need

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
    """The content of a file that others may read and not change. A file too large gives `bytes_max` + 1 bytes."""
    try:
        return keyfile.read_public(path, bytes_max)
    except keyfile.KeyFileModeError as error:
        raise Unusable(key, str(error)) from None
    except OSError as error:
        raise Unusable(key, why_unreadable(path) or f"{path}: {error.strerror}") from None


def _context(settings: Settings) -> ShownCertificate:
    # These check the files' kind and mode; OpenSSL reads them by itself.
    _secret("tls_key", Path(settings.tls_key))
    pem = _public("tls_cert", Path(settings.tls_cert), CHAIN_BYTES_MAX)
    try:
        return ShownCertificate(load_context(Path(settings.tls_cert), Path(settings.tls_key)), first_expiry(pem))
    except TlsFilesError as error:
        raise Unusable("tls_cert", str(error)) from None


def _client_context(upstream: UpstreamSettings) -> ShownCertificate:
    _secret("upstream.client_key", Path(upstream.client_key))
    pem = _public("upstream.client_cert", Path(upstream.client_cert), CHAIN_BYTES_MAX)
    try:
        return ShownCertificate(context_of(upstream), first_expiry(pem))
    except OSError as error:
        raise Unusable("upstream.client_cert", error.strerror or str(error)) from None
