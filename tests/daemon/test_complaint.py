"""Complaints: the priority for journald, and only there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from streamd.daemon.complaint import complain


def test_each_line_begins_with_the_programs_name(capfd: pytest.CaptureFixture[str]) -> None:
    complain("a: bad\nb: worse", {})
    complain("c", {"JOURNAL_STREAM": "1:2"})  # another descriptor's
    assert capfd.readouterr().err == "streamd: a: bad\nstreamd: b: worse\nstreamd: c\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--conns-max", "many"], b"--conns-max"),
        (["--listen", "192.0.2.1:1", "--insecure-public"], b"Cannot assign requested address"),
        (["--conection-max", "1"], b"--conection-max"),
    ],
)
def test_a_daemon_that_does_not_start_says_so_as_an_error_in_the_journal(args: list[str], said: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        at = os.fstat(theirs.fileno())
        environ = {"PATH": os.environ["PATH"], "JOURNAL_STREAM": f"{at.st_dev}:{at.st_ino}"}
        command = [sys.executable, "-m", "streamd", "serve", "--upstream", "http://127.0.0.1:9", *args]
        ran = subprocess.run(command, env=environ, stderr=theirs.fileno(), check=False)
        theirs.close()
        lines = b"".join(iter(lambda: ours.recv(65536), b"")).splitlines()
    assert ran.returncode in (1, 2)
    assert any(said in line for line in lines)
    assert [line for line in lines if not line.startswith(b"<3>")] == []
