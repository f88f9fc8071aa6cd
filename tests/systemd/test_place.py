"""systemd/place.py: a first installation, a second, an update, and changes by a person in between."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PLACE = Path(__file__).parents[2] / "systemd" / "place.py"
TARGET = "/etc/streamd/streamd.toml"
UNIT = "/usr/local/lib/systemd/system/streamd.service"


class Stage:
    """A DESTDIR, and the files that are shipped into it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "stage"
        self._shipped = folder / "shipped"
        self._shipped.mkdir()
        self.ship("v1\n")
        (self._shipped / "unit").write_text("ExecStart=/opt/streamd/bin/streamd\n")

    def ship(self, text: str) -> None:
        (self._shipped / "toml").write_text(text)

    def run(self, action: str, prefix: str = "/opt/streamd") -> list[str]:
        places = [f"{self._shipped}/toml={TARGET}", f"{self._shipped}/unit={UNIT}"] if action == "install" else []
        command = [sys.executable, str(PLACE), action, "--destdir", str(self.root), "--prefix", prefix, *places]
        return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True).stderr.splitlines()

    def path(self, target: str) -> Path:
        return Path(str(self.root) + target)

    def files(self) -> set[str]:
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()}


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_the_first_installation_writes_every_file(stage: Stage) -> None:
    assert stage.run("install") == []
    assert stage.path(TARGET).read_text() == "v1\n"
    assert stage.path(TARGET).stat().st_mode & 0o777 == 0o644
    assert stage.files() == {TARGET[1:], UNIT[1:], "opt/streamd/share/streamd/installed.sha256"}


def test_the_units_follow_the_prefix(stage: Stage) -> None:
    stage.run("install", "/srv/s")
    assert stage.path(UNIT).read_text() == "ExecStart=/srv/s/bin/streamd\n"


def test_a_second_installation_touches_nothing(stage: Stage) -> None:
    stage.run("install")
    before = stage.path(TARGET).stat()
    assert stage.run("install") == []
    assert stage.path(TARGET).stat().st_ino == before.st_ino
    assert stage.path(TARGET).stat().st_mtime_ns == before.st_mtime_ns


def test_an_update_replaces_unchanged_files(stage: Stage) -> None:
    stage.run("install")
    stage.ship("v2\n")
    assert stage.run("install") == []
    assert stage.path(TARGET).read_text() == "v2\n"
    assert not stage.path(TARGET + ".new").exists()


def test_a_changed_file_is_kept_and_its_update_is_put_beside_it(stage: Stage) -> None:
    stage.run("install")
    stage.path(TARGET).write_text("mine\n")
    assert stage.run("install") == [f"{TARGET}: kept as you changed it"]
    assert not stage.path(TARGET + ".new").exists()

    stage.ship("v2\n")
    assert stage.run("install") == [f"{TARGET}: kept as you changed it; the new one is {TARGET}.new"]
    assert stage.path(TARGET).read_text() == "mine\n"
    assert stage.path(TARGET + ".new").read_text() == "v2\n"


def test_the_file_beside_is_removed_once_its_content_was_taken_over(stage: Stage) -> None:
    stage.run("install")
    stage.path(TARGET).write_text("mine\n")
    stage.ship("v2\n")
    stage.run("install")
    stage.path(TARGET).write_text("v2\n")
    assert stage.run("install") == []
    assert not stage.path(TARGET + ".new").exists()


def test_a_file_older_than_any_installation_counts_as_changed(stage: Stage) -> None:
    stage.path(TARGET).parent.mkdir(parents=True)
    stage.path(TARGET).write_text("mine\n")
    assert stage.run("install") == [f"{TARGET}: kept as you changed it; the new one is {TARGET}.new"]
    assert stage.path(TARGET).read_text() == "mine\n"


def test_uninstall_removes_its_own_files_and_leaves_added_files(stage: Stage) -> None:
    stage.run("install")
    stage.path("/etc/streamd/credentials").mkdir()
    stage.path("/etc/streamd/credentials/key").write_text("sk")
    assert stage.run("uninstall") == []
    assert stage.files() == {"etc/streamd/credentials/key", "opt/streamd/share/streamd/installed.sha256"}


def test_uninstall_leaves_a_changed_file_and_says_so(stage: Stage) -> None:
    stage.run("install")
    stage.path(TARGET).write_text("mine\n")
    assert stage.run("uninstall") == [f"{TARGET}: kept, because you changed it"]
    assert stage.path(TARGET).read_text() == "mine\n"
    assert not stage.path(UNIT).exists()


def test_only_empty_folders_of_streamd_are_removed(stage: Stage) -> None:
    stage.run("install")
    stage.run("uninstall")
    assert not stage.path("/etc/streamd").exists()
    assert stage.path("/usr/local/lib/systemd/system").is_dir()


def test_a_second_uninstall_is_no_error(stage: Stage) -> None:
    stage.run("install")
    stage.run("uninstall")
    assert stage.run("uninstall") == []
