import fcntl
import os
import threading
from functools import partial
from pathlib import Path

import pytest

from streamd.daemon import keyfile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_bytes(b"old\n")
    path.chmod(0o600)
    return path


def append(line: bytes, content: bytes) -> bytes:
    return content + line


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_a_change_replaces_the_file_in_one_step(path: Path) -> None:
    before = path.stat().st_ino
    with path.open("rb") as reader:
        keyfile.change(path, lambda content: content + b"new\n")
        assert reader.read() == b"old\n"  # a reader that has the file open sees the whole old content
    assert keyfile.read(path) == b"old\nnew\n"
    assert path.stat().st_ino != before
    assert os.listdir(path.parent) == ["keys"]


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o400, 0o440])
def test_the_mode_is_kept(path: Path, kept: int) -> None:
    path.chmod(kept)
    if os.geteuid() == 0 or kept & 0o200:
        keyfile.change(path, lambda content: content + b"new\n")
    assert mode(path) == kept
    assert keyfile.read(path).startswith(b"old\n")


def test_the_owner_is_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owners: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fchown", lambda _fd, user, group: owners.append((user, group)))
    before = path.stat()
    keyfile.change(path, lambda content: content)
    assert owners == []  # it has this owner already
    monkeypatch.setattr(os, "geteuid", lambda: before.st_uid + 1)
    keyfile.change(path, lambda content: content)
    assert owners == [(before.st_uid, before.st_gid)]


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_only_the_owner_has_access_to_a_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        keyfile.change(tmp_path / "keys", lambda content: content + b"new\n")
    finally:
        os.umask(before)
    assert mode(tmp_path / "keys") == 0o600
    assert keyfile.read(tmp_path / "keys") == b"new\n"


@pytest.mark.parametrize("loose", [0o604, 0o602, 0o601, 0o620, 0o644, 0o666])
def test_a_file_with_access_for_other_users_is_refused(path: Path, loose: int) -> None:
    path.chmod(loose)
    for use in (lambda: keyfile.read(path), lambda: keyfile.change(path, lambda _: b"")):
        with pytest.raises(keyfile.KeyFileModeError, match=f"mode {loose:04o}.*chmod 600"):
            use()
    assert path.read_bytes() == b"old\n"


def test_a_path_that_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(keyfile.KeyFileModeError, match="no regular file"):  # and doesn't hang
        keyfile.read(tmp_path / "fifo")
    with pytest.raises(keyfile.KeyFileModeError, match="no regular file"):
        keyfile.change(tmp_path / "fifo", lambda _: b"")
    with pytest.raises(OSError, match="absent"):
        keyfile.read(tmp_path / "absent")


def test_nothing_changes_when_the_edit_raises(path: Path) -> None:
    def refuse(content: bytes) -> bytes:
        raise ValueError(content)

    with pytest.raises(ValueError, match="old"):
        keyfile.change(path, refuse)
    assert path.read_bytes() == b"old\n"
    assert os.listdir(path.parent) == ["keys"]


@pytest.mark.parametrize("broken", ["fsync", "rename", "fchmod"])
def test_nothing_changes_when_the_disk_fails(path: Path, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="No space"):
        keyfile.change(path, lambda _: b"new\n")
    assert path.read_bytes() == b"old\n"
    assert os.listdir(path.parent) == ["keys"]


def test_the_new_content_is_on_disk_before_it_has_the_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda *names: (steps.append("rename"), rename(*names)))
    keyfile.change(path, lambda _: b"new\n")
    assert steps[0].startswith(f"{path.parent}/.keys.")
    assert steps[1:] == ["rename", str(path.parent)]


def test_a_link_stays_a_link(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    keyfile.change(link, lambda content: content + b"new\n")
    assert link.is_symlink()
    assert path.read_bytes() == b"old\nnew\n"


def test_changes_at_the_same_time_are_all_kept(path: Path) -> None:
    begin = threading.Barrier(8)

    def add(number: int) -> None:
        begin.wait()
        for turn in range(10):
            line = b"%d-%d\n" % (number, turn)
            keyfile.change(path, partial(append, line))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        content = keyfile.read(path)
        assert content.startswith(b"old\n")
        assert content.endswith(b"\n")
    assert sorted(path.read_bytes().split()) == sorted(
        [b"old", *(b"%d-%d" % (number, turn) for number in range(8) for turn in range(10))]
    )
    assert os.listdir(path.parent) == ["keys"]


def test_a_change_that_waited_for_a_replaced_file_edits_the_new_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock
    locked: list[int] = []

    def lose_the_race(fd: int, operation: int) -> None:
        locked.append(fd)
        if len(locked) == 1:
            (path.parent / "other").write_bytes(b"theirs\n")
            (path.parent / "other").chmod(0o600)
            os.rename(path.parent / "other", path)
        elif len(locked) == 2:
            path.unlink()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", lose_the_race)
    keyfile.change(path, lambda content: content + b"ours\n")
    assert len(locked) == 3
    assert path.read_bytes() == b"ours\n"
