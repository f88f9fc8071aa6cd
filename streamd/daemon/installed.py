"""Installed files: whether the files that this daemon was started from are still there.

Workers are started by exec and read the files anew. When an update has replaced them under a running daemon, the
successor of a worker that dies would speak another version's messages to its parent and its peers, and die again and
again. So the parent compares before it starts a worker.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import streamd

PACKAGE = Path(streamd.__file__).parent


def fingerprint(package: Path = PACKAGE) -> str:
    """A text that changes with any source file of the package: path, size and time of each. 200 files take 2 ms.

    A file that goes or comes meanwhile counts as a change, and none of it raises.
    """
    found = hashlib.blake2b(digest_size=16)
    for folder, folders, names in os.walk(package):
        folders.sort()
        for name in sorted(names):
            if not name.endswith(".py"):
                continue
            path = os.path.join(folder, name)
            try:
                status = os.stat(path)
            except OSError:
                continue
            found.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest()
