"""Modes of files with credentials: which accounts may read or change them.

A look at a mode needs no more than stat(), so the main process does it before it listens: a daemon that won't start
answers no connection first. The workers look again whenever they read a file.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from streamd.config import ConfigError, Settings
from streamd.sources import ConfigProblem

# A random key can't be computed from its hash, but names, rights and limits are private too; and write permission is
# enough to add a key.
MODE_REFUSED: Final = stat.S_IRWXO | stat.S_IWGRP
# A key set is public: all may read it, and none but its owner may change it.
MODE_REFUSED_PUBLIC: Final = stat.S_IWOTH | stat.S_IWGRP

_SECRETS: Final = ("keys_file", "token_secret_file", "tls_key")
_PUBLIC: Final = ("token_jwks_file",)


def why_refused(path: Path, mode: int, *, public: bool = False) -> str:
    """The reason, with its remedy, why a file of this mode (st_mode) isn't fit; "" if it is."""
    shown = f"{path} has mode {stat.S_IMODE(mode):04o}"
    if public:
        return f"{shown}; others may write it: chmod 644 {path}" if mode & MODE_REFUSED_PUBLIC else ""
    return f"{shown}; others may read or change it: chmod 600 (or 640) {path}" if mode & MODE_REFUSED else ""


def check_modes(settings: Settings) -> None:
    """Look at the modes of the files that the settings name, as far as they are there. Raises ConfigError."""
    problems = []
    named = [(name, getattr(settings, name)) for name in (*_SECRETS, *_PUBLIC)]
    named += [("upstream.client_key", upstream.client_key) for upstream in settings.upstreams]
    for name, path in named:
        try:
            mode = os.stat(path).st_mode if path else 0
        except OSError:
            continue
        why = why_refused(Path(path), mode, public=name in _PUBLIC)
        if why:
            problems.append(ConfigProblem("credential files", name, "", why))
    if problems:
        raise ConfigError(problems)
