"""streamd as a separate process: started as by an operator, watched as by systemd.

`with upstream() as mock, served("--upstream", mock) as d:` gives a Served; `d.notify` is systemd's end of
NOTIFY_SOCKET, `d.lines` are its log lines so far. `with holding() as held, served("--upstream", held.url)`: the
upstream's generations wait until the test calls `held.go_on()`.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fakes import DONE, LAST, chunk, event

PROJECT = Path(__file__).parents[1]
WAIT_S = 60.0  # a test that waits longer for a condition has failed


# LISTEN_PID must be the daemon's own process id, and the descriptors must begin at 3.
_PASS_ON = """
import fcntl, os, sys
moved = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1].split(",")]
for k, fd in enumerate(moved):
    os.dup2(fd, 3 + k)
    os.close(fd)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # prctl(2)


def _end_with_the_tests() -> None:
    """Die with the parent: a hanging test is killed without its fixtures, and its processes would keep pipes open."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Notify:
    """systemd's end. `told` has all assignments in order, `fds` the descriptors sent to the store."""

    def __init__(self) -> None:
        self.address = f"@streamd-served-{os.getpid()}-{os.urandom(4).hex()}"
        self.told: list[str] = []
        self.fds: list[int] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + self.address[1:])

    def take(self, wait_s: float) -> bool:
        """Take the next datagram; False if none arrives in time."""
        self._socket.settimeout(wait_s)
        try:
            datagram, fds, _, _ = socket.recv_fds(self._socket, 4096, 4)
        except TimeoutError:
            return False
        self.told += datagram.decode().splitlines()
        self.fds += fds
        return True

    def until(self, word: str, count: int = 1) -> None:
        """Wait until `count` assignments have begun with `word`."""
        while sum(line.startswith(word) for line in self.told) < count:
            assert self.take(WAIT_S), f"no {word} after {self.told}"

    def names(self) -> list[str]:
        """The names of the assignments in order, without STATUS and the fields of other messages."""
        while self.take(0.001):
            pass
        return [line.split("=")[0] for line in self.told if not line.startswith(("STATUS", "MONOTONIC", "FDNAME"))]

    def close(self) -> None:
        self._socket.close()
        for fd in self.fds:
            os.close(fd)


class Served:
    """A running `streamd serve`."""

    def __init__(
        self,
        args: Sequence[str],
        environ: dict[str, str],
        listen_fds: Sequence[tuple[str, int]],
        new_group: bool = False,
    ) -> None:
        self.notify = Notify()
        self.log = tempfile.NamedTemporaryFile("r+b", prefix="streamd-", suffix=".log")  # noqa: SIM115 (closed in end())
        command = [sys.executable, "-m", "streamd", "serve", "--listen", "127.0.0.1:0", *args]
        told = {"NOTIFY_SOCKET": self.notify.address, "PYTHONPATH": str(PROJECT), **environ}
        if listen_fds:
            told |= {"LISTEN_FDS": str(len(listen_fds)), "LISTEN_FDNAMES": ":".join(name for name, _ in listen_fds)}
            command = [sys.executable, "-c", _PASS_ON, ",".join(str(fd) for _, fd in listen_fds), *command]
        self.process = subprocess.Popen(
            command,
            cwd="/",
            env={"PATH": os.environ["PATH"], **told},
            stdin=subprocess.DEVNULL,
            stderr=self.log,
            preexec_fn=_end_with_the_tests,
            pass_fds=[fd for _, fd in listen_fds],
            process_group=0 if new_group else None,
        )

    @property
    def lines(self) -> list[str]:
        return Path(self.log.name).read_text().splitlines()

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait until the condition is true, and return its value."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            if found := condition():
                return found
            assert self.process.poll() is None, f"ended while waiting for {what}:\n" + "\n".join(self.lines)
            time.sleep(0.01)
        raise AssertionError(f"no {what}:\n" + "\n".join(self.lines))

    def line(self, pattern: str) -> re.Match[str]:
        """Wait for a matching line of the log."""
        found: re.Match[str] = self.until(
            lambda: next(filter(None, (re.search(pattern, line) for line in self.lines)), None), f"line {pattern!r}"
        )
        return found

    @property
    def port(self) -> int:
        return int(self.line(r" serving .*listen=\S*?:(\d+)")[1])

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self) -> int:
        """Wait for the end of the process and return its exit status."""
        return self.process.wait(WAIT_S)

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> http.client.HTTPResponse:
        """Send a request on a new connection and return the answer's head; the caller reads the body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        connection.request(method, path, body, headers or {})
        return connection.getresponse()

    def generation(self, **mock: object) -> http.client.HTTPResponse:
        """A streamed chat; `mock` are its X-Mock-… headers: tokens=5, interval_ms=20."""
        headers = {f"X-Mock-{name.replace('_', '-')}": str(value) for name, value in mock.items()}
        body = {"model": "mock-llm", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
        answer = self.request(
            "POST", "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"} | headers
        )
        assert answer.status == 200, answer.read()
        return answer

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.notify.close()
        self.log.close()


def refused(d: Served) -> bool:
    """Whether the daemon has no listener any more."""
    try:
        socket.create_connection(("127.0.0.1", d.port)).close()
    except ConnectionRefusedError:
        return True
    return False


@contextlib.contextmanager
def served(
    *args: str, listen_fds: Sequence[tuple[str, int]] = (), new_group: bool = False, **environ: str
) -> Iterator[Served]:
    """A streamd process. The test waits for its start: `notify.until("READY=1")`, `line(…)`."""
    running = Served(args, environ, listen_fds, new_group)
    try:
        yield running
    finally:
        running.end()


@contextlib.contextmanager
def upstream(*args: str) -> Iterator[str]:
    """Run the mock as a process; yields its URL."""
    command = [sys.executable, "-m", "streamd", "mock-llm", "--listen", "127.0.0.1:0", "--ttft-ms", "5", *args]
    mock = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True, preexec_fn=_end_with_the_tests)
    assert mock.stdout is not None
    url = re.search(r"http://\S+", mock.stdout.readline())
    assert url is not None
    threading.Thread(target=mock.stdout.read, daemon=True).start()
    try:
        yield url[0]
    finally:
        mock.terminate()
        mock.wait()


class Held(http.server.ThreadingHTTPServer):
    """An upstream with streams that send a word and then wait: a generation that runs as long as a test needs."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HeldAnswer)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.may_go_on = threading.Event()

    def go_on(self) -> None:
        """Let all streams end, and later streams not wait."""
        self.may_go_on.set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections that streamd or its death broke off."""


class _HeldAnswer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Held

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(chunk(event("one ")))
        self.server.may_go_on.wait()
        self.wfile.write(chunk(event("two"), DONE) + LAST)

    def log_message(self, *words: object) -> None:
        """Log nothing."""


@contextlib.contextmanager
def holding() -> Iterator[Held]:
    """A Held that serves."""
    with Held() as held:
        thread = threading.Thread(target=held.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield held
        finally:
            held.go_on()
            held.shutdown()
            thread.join(WAIT_S)
