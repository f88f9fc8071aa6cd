"""Check the Python that an installation is about to be built on: can the daemon's account run it?

    interpreter.py [DESTDIR]

A virtual environment only links to its Python. A Python below a home directory (pyenv, uv, conda) gives an installation
that root can run and nobody else, and that the unit's sandbox (ProtectHome) hides even from root. Exit status 1 and a
sentence, or with a DESTDIR, which may be for another machine, the sentence alone.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

# The folders that ProtectHome=yes hides (systemd.exec(5)).
HOMES = ("/home", "/root", "/run/user")

REMEDY = "build on a Python of the system: make install PYTHON=/usr/bin/python3"


def why_unfit(paths: list[Path]) -> str:
    """Why another account can't run a Python that consists of these files and folders; "" if it can."""
    for path in paths:
        if any(path.is_relative_to(home) for home in HOMES):
            return f"{path} is below a home directory, which the unit's sandbox hides (ProtectHome=yes)"
        for each in (*reversed(path.parents), path):
            mode = os.stat(each).st_mode
            wanted = stat.S_IXOTH if each.is_dir() else stat.S_IROTH
            if not mode & wanted:
                return f"{each} has mode {stat.S_IMODE(mode):04o}: other accounts can't use {path}"
    return ""


def main(destdir: str) -> int:
    """Tell what is wrong with this Python; returns the exit status."""
    base = getattr(sys, "_base_executable", sys.executable)
    why = why_unfit([Path(base).resolve(), Path(os.__file__).resolve()])
    if why:
        print(f"this Python can't carry the daemon: {why}\n{REMEDY}", file=sys.stderr)
    return 1 if why and not destdir else 0


if __name__ == "__main__":
    sys.exit(main("".join(sys.argv[1:])))
