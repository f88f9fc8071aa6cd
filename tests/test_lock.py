"""The lock file pins the packages of setup.cfg, each file by its hash, and doesn't name its index."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

PROJECT = Path(__file__).parents[1]
LOCK = (PROJECT / "requirements.lock").read_text()
PINNED = dict(re.findall(r"^([a-z0-9-]+)==(\S+) \\$", LOCK, re.M))


def wanted() -> dict[str, str]:
    """Name and least version of the packages that the daemon needs to run."""
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    lines = setup["options"]["install_requires"].split()
    return {name.lower(): least for name, least in (re.sub(r"\[.*\]", "", line).split(">=") for line in lines)}


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def test_every_needed_package_is_pinned() -> None:
    assert set(wanted()) <= set(PINNED)
    assert all(numbers(PINNED[name]) >= numbers(least) for name, least in wanted().items())


def test_every_pin_has_its_hashes() -> None:
    blocks = re.split(r"^(?=[a-z])", LOCK, flags=re.M)[1:]
    assert len(blocks) == len(PINNED) >= len(wanted())
    for block in blocks:
        first, *hashes = block.rstrip().splitlines()
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+ \\", first)
        assert hashes and all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}(?: \\)?", line) for line in hashes)


def test_the_lock_file_names_no_package_index() -> None:
    assert not re.search(r"://|--index|--find|file:|@ |/", LOCK)
