"""Reads files that people and deployments put in place: a pipe, a device or a folder is refused, never waited for."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_regular(path: Path, bytes_max: int) -> bytes:
    """The content of a regular file; a larger file gives `bytes_max` + 1 bytes. Raises OSError.

    O_NONBLOCK: to open a pipe that nobody writes to would hold the loop, and with it everybody's tokens.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "no regular file", str(path))
    with os.fdopen(fd, "rb") as file:
        return file.read(bytes_max + 1)


def why_unreadable(path: Path) -> str:
    """Why this process can't read the file at an absolute path, with the remedy; "" if it can.

    A file that root made for the daemon is the usual case, so owner, mode and our own account are named.
    """
    for folder in reversed(path.parents):
        if not folder.exists():
            closed = next((each for each in reversed(folder.parents) if not _may(each, os.X_OK)), None)
            return f"the folder {folder} is missing" if closed is None else _closed(closed)
        if not _may(folder, os.X_OK):
            return _closed(folder)
    if not path.exists():
        return f"{path} is missing"
    if not path.is_file():
        return f"{path} is a folder" if path.is_dir() else f"{path} is no regular file"
    if _may(path, os.R_OK):
        return ""
    group = _group(os.getegid())
    return f"{path} {_owned(path)}: chgrp {group} {path} && chmod 640 {path}"


def _closed(folder: Path) -> str:
    return f"the folder {folder} {_owned(folder)}: chmod o+x {folder}"


def _may(path: Path, right: int) -> bool:
    return os.access(path, right, effective_ids=True)


def _owned(path: Path) -> str:
    """Owner, group and mode of a file, and our own account."""
    status = os.stat(path)
    owner, mode = f"{_user(status.st_uid)}:{_group(status.st_gid)}", stat.S_IMODE(status.st_mode)
    return f"belongs to {owner} with mode {mode:04o}, and streamd runs as {_user(os.geteuid())}"


def _user(uid: int) -> str:
    """The account's name; its number if it has none."""
    import pwd  # Why here: for this message alone

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    import grp  # Why here: for this message alone

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
