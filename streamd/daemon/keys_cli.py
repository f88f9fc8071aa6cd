"""`streamd keys`: add, list and revoke the keys of a key file. The daemon notices a change by itself."""

from __future__ import annotations

import argparse
import math
import os
import re
import secrets
import string
import sys
import time
from pathlib import Path
from typing import Final

from streamd.core.auth import Key
from streamd.core.keys import SALT_BYTES, Keys, digest, format_expiry, parse_expiry, with_key, without_key
from streamd.daemon import keyfile

_LETTERS: Final = string.ascii_letters + string.digits
ID_CHARS: Final = 8  # 47 bits: ten thousand keys collide once in three million files, and then `add` refuses
SECRET_CHARS: Final = 32  # 190 bits; without `-` and `_`, so that a double click selects it
_DURATION = re.compile(r"([1-9][0-9]{0,5})([smhdw])")
_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Put the subcommand's arguments on its parser."""
    parser.add_argument("--file", type=Path, required=True, metavar="PATH", help="the key file")
    commands = parser.add_subparsers(dest="keys_command", required=True, metavar="COMMAND")
    add = commands.add_parser("add", help="make a key and print it; it is never shown again")
    add.add_argument("name", help="the name of its user, for logs and `list`")
    add.add_argument(
        "--route",
        action="append",
        metavar="PATTERN",
        help="a path it may use, such as /v1/chat/*; may be repeated (default: all)",
    )
    add.add_argument(
        "--model",
        action="append",
        metavar="PATTERN",
        help="a model it may use, such as llama-*; may be repeated (default: all)",
    )
    add.add_argument("--streams-max", type=int, metavar="N", help="streams at once (default: no limit)")
    add.add_argument("--rpm", type=int, metavar="N", help="requests per minute (default: no limit)")
    add.add_argument("--tpm", type=int, metavar="N", help="tokens per minute (default: no limit)")
    add.add_argument("--expires", metavar="WHEN", help="in 12h, 30d, 4w, or at 2030-01-31[T12:00:00Z] (default: never)")
    commands.add_parser("list", help="show the keys with their rights and limits, without their hashes")
    revoke = commands.add_parser("revoke", help="take a key out of the file")
    revoke.add_argument("id", help="the middle part of the key, as `list` shows it")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns 0, or 1 after a line on stderr with the reason."""
    try:
        _COMMANDS[args.keys_command](args)
    except (OSError, ValueError, keyfile.KeyFileModeError) as error:
        print(f"streamd keys: {error}", file=sys.stderr)
        return 1
    return 0


def parse_when(text: str, now_unix: float) -> float:
    """The Unix time of a duration from now (`30d`), or of a date or time. Raises ValueError with the allowed forms."""
    try:
        duration = _DURATION.fullmatch(text)
        if duration is None:
            return parse_expiry(text)
        return math.ceil(now_unix) + int(duration[1]) * _UNITS_S[duration[2]]
    except ValueError:
        raise ValueError(f"--expires {text}: give 12h, 30d, 4w, 2030-01-31 or 2030-01-31T12:00:00Z") from None


def _add(args: argparse.Namespace) -> None:
    now_unix = time.time()
    expires_unix = None if args.expires is None else parse_when(args.expires, now_unix)
    if expires_unix is not None and expires_unix <= now_unix:
        raise ValueError(f"--expires {args.expires}: that is in the past")
    key_id = _random(ID_CHARS)
    presented = f"sk-{key_id}-{_random(SECRET_CHARS)}"
    salt = secrets.token_bytes(SALT_BYTES)
    key = Key(
        id=key_id,
        name=args.name,
        salt=salt,
        digest=digest(salt, presented.encode()),
        routes=tuple(args.route or ("*",)),
        models=tuple(args.model or ("*",)),
        streams_max=args.streams_max,
        requests_per_minute=args.rpm,
        tokens_per_minute=args.tpm,
        expires_unix=expires_unix,
    )
    is_new = not args.file.exists()
    keyfile.change(args.file, lambda content: with_key(content, key))
    print(presented)
    print("Keep it now: only its hash is stored.", file=sys.stderr)
    if is_new and os.geteuid() == 0:
        text = f"{args.file} belongs to root. For a daemon with another account: chgrp streamd, chmod 640."
        print(text, file=sys.stderr)


def _list(args: argparse.Namespace) -> None:
    rows: list[tuple[str, ...]] = [("ID", "NAME", "ROUTES", "MODELS", "STREAMS", "RPM", "TPM", "EXPIRES")]
    rows += [_row(key) for key in Keys.parse(keyfile.read(args.file))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _row(key: Key) -> tuple[str, ...]:
    counts = (key.streams_max, key.requests_per_minute, key.tokens_per_minute)
    limits = ("-" if count is None else str(count) for count in counts)
    expires = "never" if key.expires_unix is None else format_expiry(key.expires_unix)
    return (key.id, key.name, ",".join(key.routes), ",".join(key.models), *limits, expires)


def _revoke(args: argparse.Namespace) -> None:
    if not args.file.exists():
        raise ValueError(f"{args.file} is not there")
    try:
        keyfile.change(args.file, lambda content: without_key(content, args.id))
    except KeyError:
        raise ValueError(f"no key has the id {args.id!r}; `streamd keys list` shows them") from None


def _random(chars: int) -> str:
    return "".join(secrets.choice(_LETTERS) for _ in range(chars))


_COMMANDS: Final = {"add": _add, "list": _list, "revoke": _revoke}
