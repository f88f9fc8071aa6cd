"""The key file on disk: read only if nobody else can, changed under a lock and in one step.

A change holds an flock on the file itself, writes a new file beside it, and renames it over: a daemon that reads at
any moment sees the old content or the new one, whole. Because of the rename, who waited for the lock may hold that of
a file that is gone; so the inode is compared afterwards, and if it differs the wait begins anew. No lock file is left
behind.
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

MODE_NEW: Final = 0o600
# Hashes of random keys can't be turned back, but names, rights and limits are nobody's business; and who can write is
# in.
MODE_REFUSED: Final = stat.S_IRWXO | stat.S_IWGRP


class KeyFileModeError(Exception):
    """The file is not fit to hold keys; the text says what to do."""


def read(path: Path) -> bytes:
    """The file's content. KeyFileModeError if others may read or change it; OSError as it comes."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        _check_mode(path, os.fstat(fd))
        return file.read(KEYS_FILE_BYTES_MAX + 1)


def change(path: Path, edit: Callable[[bytes], bytes]) -> None:
    """Replace the content by `edit(content)`, alone; no file is an empty one. If `edit` raises, nothing changes.

    A symbolic link is followed, so that the file behind it is replaced and not the link.
    """
    path = Path(os.path.realpath(path))
    with _locked(path) as fd:
        status = os.fstat(fd)
        _check_mode(path, status)
        _replace(path, edit(_read_all(fd)), status)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """A descriptor of the file that has the name now, and its lock."""
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


def _check_mode(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise KeyFileModeError(f"{path} is no regular file")
    if status.st_mode & MODE_REFUSED:
        mode = stat.S_IMODE(status.st_mode)
        raise KeyFileModeError(f"{path} has mode {mode:04o}; others may read or change it: chmod 600 (or 640) {path}")


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
