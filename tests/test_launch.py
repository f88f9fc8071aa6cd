"""The launcher of `streamd demo`, with a stand-in for streamd: both start, stop together, and a death is reported."""

from __future__ import annotations

import http.server
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

from streamd.demo import launch

PROJECT = Path(__file__).parents[1]

STAND_IN = """
import http.server, os, sys
host, port = sys.argv[sys.argv.index("--listen") + 1].split(":")
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/drain":
            os._exit(0)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(sys.argv[sys.argv.index("--upstream") + 1].encode())
    def log_message(self, *args):
        pass
http.server.HTTPServer((host, int(port)), Ready).serve_forever()
"""

LAUNCH = """
import sys
from streamd.demo import command, launch
demo = launch.Demo("a mock", {upstream!r} or command.DEMO.command, "/v1/chat/completions", {{"stream": True}})
sys.exit(launch.launch("127.0.0.1:{port}", demo, streamd=(sys.executable, "-c", {streamd!r})))
"""


def start(port: int, streamd: str, upstream: list[str] | None = None) -> subprocess.Popen[str]:
    program = LAUNCH.format(upstream=upstream, port=port, streamd=streamd)
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PROJECT
    )


@pytest.fixture
def port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_both_processes_start_and_stop_together(port: int, number: signal.Signals) -> None:
    with start(port, STAND_IN) as child:
        assert child.stdout is not None
        printed = []
        for line in child.stdout:
            printed.append(line)
            if line.startswith("Ctrl-C"):
                break
        shown = "".join(printed)
        assert f"curl -N http://127.0.0.1:{port}/v1/chat/completions" in shown
        assert "Last-Event-ID" in shown and f"http://127.0.0.1:{port}/metrics" in shown
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
            upstream = answer.read().decode()
        child.send_signal(number)
        assert child.wait(20) == 0
        for url in (upstream, f"http://127.0.0.1:{port}"):
            with pytest.raises(OSError, match="refused"):
                urllib.request.urlopen(url)


def test_a_drained_streamd_ends_the_demonstration(port: int) -> None:
    with start(port, STAND_IN) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("Ctrl-C"):
                break
        with pytest.raises(OSError, match="closed connection"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/drain")
        assert child.wait(20) == 0 and "drained" in child.stdout.read()


def test_the_death_of_streamd_is_reported(port: int) -> None:
    with start(port, "import sys; sys.exit('no such setting')") as child:
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 1
        assert "streamd ended with status 1" in errors and "no such setting" in errors


def test_the_death_of_the_upstream_is_reported(port: int) -> None:
    with start(port, STAND_IN, [sys.executable, "-c", "raise SystemExit('no weights')"]) as child:
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 1
        assert "upstream ended with status 1" in errors and "no weights" in errors


class _Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        """Log nothing."""


class _Silent(_Ready):
    def do_GET(self) -> None:
        self.send_error(404)


@pytest.mark.parametrize("other", ["another process", "another streamd"])
def test_a_port_that_is_taken_is_told_before_anything_starts(other: str) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), _Ready if other == "another streamd" else _Silent) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        port = server.server_address[1]
        with start(port, STAND_IN, [sys.executable, "-c", "raise SystemExit('was started')"]) as child:
            _, errors = child.communicate(timeout=60)
        server.shutdown()
    assert child.returncode == 1
    assert errors.startswith(f"{other} listens on 127.0.0.1:{port} already") and "was started" not in errors
    assert f"make run LISTEN=127.0.0.1:{port + 1}" in errors


@pytest.mark.parametrize("text", ["127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:٣", ":8080"])
def test_an_address_without_a_port_that_can_be_had_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a port from 1 to 65535"):
        launch.checked_listen(text)
