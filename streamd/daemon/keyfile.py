"""The key file on disk: refused if other users can read it, changed under a lock and atomically.

A change holds an flock on the file itself, writes a new file beside it, and renames that over the old file: a daemon
that reads at any moment sees either the old content or the new content, whole. Because of the rename, a process that
waited for the lock may hold the lock of a file that is gone; so it compares the inode afterwards, and starts over if it
differs. No lock file is left behind.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from streamd.core.keys import KEYS_FILE_BYTES_MAX
from streamd.daemon import file_modes

MODE_NEW: Final = 0o600


class KeyFileModeError(Exception):
    """The file's type or mode isn't fit for keys; the text gives the remedy."""


def read(path: Path) -> bytes:
    """The file's content. Raises KeyFileModeError if other users may read or change the file, and OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        _check_mode(path, os.fstat(fd))
        return file.read(KEYS_FILE_BYTES_MAX + 1)


def read_public(path: Path, bytes_max: int) -> bytes:
    """The content of a file with public keys, at most `bytes_max` + 1 bytes. Raises KeyFileModeError if other users may
    change the file, and OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        _check_regular(path, status)
        if why := file_modes.why_refused(path, status.st_mode, public=True):
            raise KeyFileModeError(why)
        return file.read(bytes_max + 1)


def change(path: Path, edit: Callable[[bytes], bytes]) -> None:
    """Replace the content by `edit(content)`, under the lock. A missing file counts as empty. If `edit` raises, nothing
    changes.

    A symbolic link is followed: the file behind it is replaced, and not the link.
    """
    path = Path(os.path.realpath(path))
    with _locked(path) as fd:
        status = os.fstat(fd)
        _check_mode(path, status)
        _replace(path, edit(_read_all(fd)), status)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Lock the file that has this name now; yields its descriptor."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, MODE_NEW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if _is_current(path, fd):
                yield fd
                return
        finally:
            os.close(fd)


def _is_current(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise KeyFileModeError(f"{path} is no regular file")


def _check_mode(path: Path, status: os.stat_result) -> None:
    _check_regular(path, status)
    if why := file_modes.why_refused(path, status.st_mode):
        raise KeyFileModeError(why)


def _read_all(fd: int) -> bytes:
    with open(fd, "rb", closefd=False) as file:
        return file.read()


def _replace(path: Path, content: bytes, status: os.stat_result) -> None:
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE_NEW)
    try:
        with os.fdopen(fd, "wb") as file:
            # The daemon's group keeps its right to read.
            if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(fd, status.st_uid, status.st_gid)
            os.fchmod(fd, stat.S_IMODE(status.st_mode))
            file.write(content)
            file.flush()
            os.fsync(fd)
        os.rename(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
