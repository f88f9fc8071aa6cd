"""The summary of a test run: the skipped tests with their reasons, and the hanging test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tools
from tools import Tool

PROJECT = Path(__file__).parents[1]

SUITE = """
import threading
import tools

tools.PATH = "/nowhere"

@tools.needs("nginx")
def test_skipped(): pass

def test_hangs(): threading.Event().wait()

def test_passes(): pass
"""


def test_a_tool_is_a_program_or_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"shell": Tool(("no-such-shell", "sh")), "os": Tool(module="os")}
    absent = {"nowhere": Tool(("no-such-program",)), "nothing": Tool(module="no_such_module")}
    monkeypatch.setattr(tools, "TOOLS", found | absent)
    assert tools.missing(tools.TOOLS) == ["nowhere", "nothing"]


def test_skips_are_counted_by_the_tools_that_are_missing() -> None:
    zsh = ("tests/a.py:1", "needs zsh, not installed here")
    browser = ("tests/b.py:2", "needs chromium, playwright, not installed here")
    lines = tools.advice([zsh, browser, browser, ("tests/c.py:3", "this machine has no IPv6")])
    assert lines[:3] == [
        "   2 for want of chromium, playwright",
        "   1 for want of zsh",
        "   1 tests/c.py:3: this machine has no IPv6",
    ]
    commands = [line.strip() for line in lines[4:]]
    assert commands[:2] == ["apt-get update", "apt-get install --yes --no-install-recommends chromium zsh"]
    assert commands[2].endswith("pip install --quiet --disable-pip-version-check playwright")
    assert tools.advice([("tests/c.py:3", "this machine has no IPv6")]) == lines[2:3]


@pytest.mark.parametrize("processes", [1, 0])
def test_a_hanging_test_ends_the_run_and_is_named(processes: int, tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    settings = ["-c", str(PROJECT / "setup.cfg"), "--rootdir", str(tmp_path), "-o", "faulthandler_timeout=1"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-n", str(processes), *settings, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(PROJECT / "tests")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert "in test_hangs" in ran.stderr + ran.stdout
    if processes:  # the process that hung is replaced, and the run goes on
        assert "FAILED test_suite.py::test_hangs" in ran.stdout
        assert "1 failed, 1 passed, 1 skipped" in ran.stdout
        assert "   1 for want of nginx" in ran.stdout
        assert "apt-get install --yes --no-install-recommends nginx-light" in ran.stdout
