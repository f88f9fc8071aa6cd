"""Complaints: the lines with which a command ends that can't do its work, on standard error.

Under journald a line begins with its priority (systemd.exec(5), sd-daemon(3)), so that `journalctl -p err` shows why a
daemon didn't start. No log is set up yet, or the command has none.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from streamd.daemon.logs import is_journal


def complain(text: str, environ: Mapping[str, str] = os.environ) -> None:
    """Write the text, after the program's name; each line of it by itself."""
    write_lines("\n".join(f"streamd: {line}" for line in text.splitlines()), environ)


def write_lines(text: str, environ: Mapping[str, str] = os.environ) -> None:
    """Write the lines as they are, each of them as an error."""
    head = "<3>" if is_journal(2, environ.get("JOURNAL_STREAM")) else ""
    for line in text.splitlines():
        print(f"{head}{line}", file=sys.stderr)
