"""Files that people put in place: only regular files are read, and nothing is waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from streamd.files import read_regular


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
