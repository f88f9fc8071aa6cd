"""systemd/docs.py: the pages and scripts of the real command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tools import needs, skip_without

from streamd.config import ROWS

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    command = [sys.executable, str(PROJECT / "systemd" / "docs.py"), str(folder)]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(PROJECT)}, check=True)
    return folder


def test_the_pages_describe_the_real_command_line(docs: Path) -> None:
    commands = (docs / "streamd.8").read_text()
    for command in ("serve", "check\\-config", "mock\\-llm", "keys add"):
        assert f".SS streamd {command}\n" in commands
    settings = (docs / "streamd.toml.5").read_text()
    assert settings.count("STREAMD_") == len(ROWS)
    assert '.SH "[[UPSTREAM]]"' in settings


@needs("groff")
@pytest.mark.parametrize("page", ["streamd.8", "streamd.toml.5"])
def test_groff_accepts_the_pages_without_a_warning(docs: Path, page: str) -> None:
    command = ["groff", "-man", "-Tutf8", "-Kutf8", "-ww", "-z", str(docs / page)]
    assert subprocess.run(command, capture_output=True, check=True).stderr == b""


@pytest.mark.parametrize(("shell", "script"), [("bash", "streamd.bash"), ("zsh", "_streamd")])
def test_shells_accept_the_scripts(docs: Path, shell: str, script: str) -> None:
    skip_without(shell)
    subprocess.run([shell, "-n", str(docs / script)], check=True)
