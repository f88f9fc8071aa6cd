"""Files that people put in place: only regular files are read, and nothing is waited for."""

from __future__ import annotations

import contextlib
import grp  # noqa: F401 (for the time without the rights to import it)
import os
import pwd  # noqa: F401
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamd.files import read_regular, why_unreadable


def test_a_regular_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"0123456789")
    link.symlink_to(file)
    assert read_regular(file, 10) == read_regular(link, 100) == b"0123456789"
    assert read_regular(file, 4) == b"01234"  # one more than the limit tells that it is larger


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "missing", "link to a pipe"])
def test_anything_else_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it"
    if kind == "pipe":
        os.mkfifo(path)  # nobody writes to it: to open it would wait for ever
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=r"no regular file|No such file|directory"):
        read_regular(path, 100)
    assert os.listdir("/proc/self/fd") == before


# -- why a file can't be read

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes another account's files")
NOBODY = 65534


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """This process has no more rights than the account `nobody`."""
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that all accounts may enter."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_a_file_that_can_be_read_has_no_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert why_unreadable(tmp_path / "file") == ""


def test_the_reason_names_the_part_of_the_path_that_is_at_fault(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert why_unreadable(tmp_path / "keys") == f"{tmp_path}/keys is missing"
    assert why_unreadable(tmp_path / "etc" / "streamd" / "keys") == f"the folder {tmp_path}/etc is missing"
    assert why_unreadable(tmp_path) == f"{tmp_path} is a folder"
    assert why_unreadable(tmp_path / "pipe") == f"{tmp_path}/pipe is no regular file"


@as_root
def test_of_another_accounts_file_owner_mode_and_remedy_are_named(open_folder: Path) -> None:
    file = open_folder / "keys"
    file.write_text("")
    file.chmod(0o600)
    with as_nobody():
        why = why_unreadable(file)
    assert why.startswith(f"{file} belongs to root:root with mode 0600, and streamd runs as nobody: chgrp ")
    group = why.split("chgrp ")[1].split()[0]
    assert why.endswith(f"chgrp {group} {file} && chmod 640 {file}")
    os.chown(file, 0, NOBODY)
    file.chmod(0o640)
    with as_nobody():
        assert why_unreadable(file) == "", "the remedy works"


@as_root
def test_a_folder_that_is_closed_is_named(open_folder: Path) -> None:
    (open_folder / "etc" / "inner").mkdir(parents=True)
    (open_folder / "etc").chmod(0o700)
    with as_nobody():
        found = [why_unreadable(open_folder / "etc" / path) for path in ("keys", "inner/keys", "missing/keys")]
    owned = "belongs to root:root with mode 0700, and streamd runs as nobody"
    assert found == [f"the folder {open_folder}/etc {owned}: chmod o+x {open_folder}/etc"] * 3


def test_accounts_without_a_name_are_shown_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("")
    monkeypatch.setattr(os, "access", lambda path, right, **_: Path(path) != file)
    monkeypatch.setattr(os, "geteuid", lambda: 123456)
    assert "streamd runs as 123456" in why_unreadable(file)
