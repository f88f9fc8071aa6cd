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
