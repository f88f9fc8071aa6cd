"""Installed files: a change of any of them is noticed, and a running daemon refuses a mixture with a sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from served import Served, served, upstream

from streamd.daemon.installed import PACKAGE, fingerprint


@pytest.fixture
def package(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "streamd", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "streamd"


def test_the_fingerprint_changes_with_every_kind_of_change_and_not_by_running(package: Path) -> None:
    seen = [fingerprint(package)]
    module = package / "net" / "client.py"
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "cli.cpython-311.pyc").write_bytes(b"x")
    assert fingerprint(package) == seen[0]
    module.write_text(module.read_text() + "# more\n")
    seen.append(fingerprint(package))
    os.utime(module, (1, 1))
    seen.append(fingerprint(package))
    module.unlink()
    seen.append(fingerprint(package))
    (package / "net" / "fresh.py").write_text("")
    seen.append(fingerprint(package))
    assert len(set(seen)) == len(seen)
    assert fingerprint(package / "nothing")


def pids(d: Served) -> list[int]:
    return [each["pid"] for each in json.loads(d.request("GET", "/status").read())["workers"]]


def test_a_daemon_whose_files_were_replaced_starts_no_worker_and_ends_with_its_last(package: Path) -> None:
    text = "streamd's files were replaced while it runs; no worker is started on a mixture, restart it"
    with (
        upstream() as mock,
        served("--workers", "2", "--upstream", mock, PYTHONPATH=str(package.parent)) as d,
    ):
        d.notify.until("READY=1")
        first, second = pids(d)
        os.kill(first, signal.SIGKILL)  # the files are the same: a successor comes
        d.until(lambda: 0 not in (now := pids(d)) and first not in now, "successor")
        (package / "wire" / "sse.py").write_text("raise SystemExit('another version')\n")
        os.kill(second, signal.SIGKILL)
        d.line(f"ERROR {text} slot=1")
        assert d.request("GET", "/healthz").status == 200, "the other worker goes on"
        os.kill(pids(d)[0], signal.SIGKILL)
        assert d.ended() == 1, "systemd starts it anew, from the new files"
        assert "".join(d.lines).count(text) == 1 and "another version" not in "".join(d.lines)
