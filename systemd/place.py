"""Put streamd's files in their places, or take them away, and touch nothing that a person changed.

    place.py install --prefix /opt/streamd [--destdir STAGE] FROM=TO…
    place.py uninstall --prefix /opt/streamd [--destdir STAGE]

A ledger under the prefix holds the SHA-256 of each file as it was last shipped. The rule, for all files, is dpkg's for
configuration:

    there now                     what happens
    nothing                       it is written
    what is shipped now           nothing
    what was shipped last         it is replaced
    a person's change             kept; if what is shipped has changed since, that is put beside it as FILE.new

`/opt/streamd` in a unit becomes the prefix. Files are replaced by rename: whoever reads one sees the old or the new.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

PREFIX = "/opt/streamd"  # as the units have it
LEDGER = "share/streamd/installed.sha256"  # below the prefix; `sha256sum --check` reads it


class Ledger:
    """Path on the target (without DESTDIR) → SHA-256 as last shipped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.shipped: dict[str, str] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                digest, _, target = line.partition("  ")
                self.shipped[target] = digest

    def save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{digest}  {target}\n" for target, digest in sorted(self.shipped.items())]
        _write(self._path, "".join(lines).encode())


def install(destdir: str, prefix: str, places: list[tuple[Path, str]]) -> Iterator[str]:
    """Place each (file, target); yields a line for all that a person should know."""
    ledger = Ledger(Path(destdir + prefix, LEDGER))
    for source, target in places:
        content = source.read_bytes().replace(PREFIX.encode(), prefix.encode())
        yield from _place(Path(destdir + target), target, content, ledger.shipped.get(target))
        ledger.shipped[target] = _digest(content)
    ledger.save()


def _place(there: Path, target: str, content: bytes, shipped_last: str | None) -> Iterator[str]:
    beside = there.with_name(there.name + ".new")
    now = _digest(there.read_bytes()) if there.exists() else None
    if now in (None, shipped_last, _digest(content)):
        if now != _digest(content):
            _write(there, content)
        beside.unlink(missing_ok=True)
    elif shipped_last == _digest(content):
        yield f"{target}: kept as you changed it"
    else:
        _write(beside, content)
        yield f"{target}: kept as you changed it; the new one is {target}.new"


def uninstall(destdir: str, prefix: str) -> Iterator[str]:
    """Remove what is as it was shipped; yields a line for all that stays."""
    ledger = Ledger(Path(destdir + prefix, LEDGER))
    for target, digest in ledger.shipped.items():
        there = Path(destdir + target)
        there.with_name(there.name + ".new").unlink(missing_ok=True)
        if not there.exists():
            continue
        if _digest(there.read_bytes()) == digest:
            there.unlink()
            _remove_empty(there.parent)
        else:
            yield f"{target}: kept, because you changed it"


def _remove_empty(folder: Path) -> None:
    """Only folders named after streamd, and below these: /etc/systemd/system may be empty and still be wanted."""
    while "streamd" in folder.parts and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.chmod(0o644)
    unfinished.replace(path)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _place_pair(text: str) -> tuple[Path, str]:
    source, _, target = text.rpartition("=")
    if not target.startswith("/"):
        raise argparse.ArgumentTypeError(f"{text}: FROM=/TO is wanted")
    return Path(source), target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("install", "uninstall"))
    parser.add_argument("--destdir", default="")
    parser.add_argument("--prefix", default=PREFIX)
    parser.add_argument("places", nargs="*", type=_place_pair, metavar="FROM=TO")
    told = parser.parse_intermixed_args()
    if told.action == "install":
        lines = install(told.destdir, told.prefix, told.places)
    else:
        lines = uninstall(told.destdir, told.prefix)
    for line in lines:
        print(line, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
