"""An upstream and streamd in front of it, as child processes: started in order, shown to a person, stopped together.

The upstream prints its address on standard output (`… listening on URL`); streamd is ready when `/readyz` answers 200.
Each child logs to a file, which is shown if that child dies: in a demo the terminal belongs to the curl lines.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

STREAMD = (sys.executable, "-m", "streamd", "serve")
READY_S_MAX = (
    120.0  # a model of 250 MB is put together, checked and loaded in about 10 s; a slow disk gets twelve times that
)
STOP_S_MAX = 15.0  # then the child is killed
POLL_S = 0.1
LOG_TAIL_BYTES = 8192
PORT_MAX = 65_535

_LISTENING = re.compile(rb"listening on (http://\S+)")


class LaunchError(Exception):
    """A child did not become ready, or died. The text has its log."""


@dataclass(frozen=True)
class Child:
    """A child process and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    @classmethod
    def start(cls, name: str, command: Sequence[str]) -> Child:
        """Start `command`. Raises LaunchError if there is no such program."""
        log = tempfile.TemporaryFile(prefix=f"{name}-")  # noqa: SIM115 (stop() closes it)
        try:
            return cls(
                name, subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log), log
            )
        except OSError as wrong:
            log.close()
            raise LaunchError(f"{name}: {wrong}") from None

    def check(self) -> None:
        """Raises LaunchError if the child is gone."""
        status = self.process.poll()
        if status is not None:
            raise LaunchError(f"{self.name} ended with status {status}:\n{self.tail()}")

    def tail(self) -> str:
        """The end of its log."""
        self.log.seek(0, 2)
        self.log.seek(max(0, self.log.tell() - LOG_TAIL_BYTES))
        return self.log.read().decode("utf-8", "replace").rstrip()

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL if the child doesn't end."""
        self.process.terminate()
        try:
            self.process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.log.close()


class Stopped(Exception):
    """Ctrl-C or SIGTERM arrived."""


class Launcher:
    """Holds the children, and ends them in the opposite order."""

    def __init__(self) -> None:
        self._children: list[Child] = []
        self._stop = threading.Event()

    @contextlib.contextmanager
    def running(self) -> Iterator[Launcher]:
        """A context in which SIGINT and SIGTERM ask for an end, and which leaves no child behind."""
        before = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for child in reversed(self._children):
                child.stop()
            for number, action in before.items():
                signal.signal(number, action)

    def _ask_to_stop(self, number: int, frame: object) -> None:
        self._stop.set()

    def start(self, name: str, command: Sequence[str]) -> Child:
        """Start a child that ends with this launcher."""
        child = Child.start(name, command)
        self._children.append(child)
        return child

    def pause(self) -> None:
        """Wait a moment. Raises Stopped, or LaunchError for a child that is gone."""
        if self._stop.wait(POLL_S):
            raise Stopped
        for child in self._children:
            try:
                child.check()
            except LaunchError:
                if self._stop.is_set():  # Ctrl-C reaches the whole foreground group, including the child
                    raise Stopped from None
                raise

    def wait_url(self, child: Child) -> str:
        """The URL that an upstream prints. Later output is read and dropped, so that the upstream never blocks."""
        found: list[str] = []
        threading.Thread(target=_read_output, args=(child, found), daemon=True).start()
        for _ in self._until_ready(child):
            if found:
                return found[0]
        raise AssertionError("unreachable")

    def wait_ready(self, child: Child, address: str) -> None:
        """Wait until `/readyz` at HOST:PORT answers 200."""
        threading.Thread(target=_read_output, args=(child, []), daemon=True).start()
        for _ in self._until_ready(child):
            if _is_ready(address):
                return

    def _until_ready(self, child: Child) -> Iterator[None]:
        deadline = time.monotonic() + READY_S_MAX
        while time.monotonic() < deadline:
            yield
            self.pause()
        raise LaunchError(f"{child.name} is not up after {READY_S_MAX:.0f} s:\n{child.tail()}")

    def wait_end(self, front: Child) -> None:
        """Wait until `front` ends by itself, a signal asks for an end (Stopped), or a child dies (LaunchError)."""
        try:
            while True:
                self.pause()
        except LaunchError:
            if front.process.poll() != 0:
                raise

    def wait_stop(self) -> None:
        """Wait until a signal asks for an end (Stopped), whatever becomes of the children: a person may kill them."""
        while not self._stop.wait(POLL_S):
            pass
        raise Stopped


def _read_output(child: Child, found: list[str]) -> None:
    assert child.process.stdout is not None
    with contextlib.suppress(ValueError):  # closed by stop()
        for line in child.process.stdout:
            match = _LISTENING.search(line)
            if match is not None:
                found.append(match[1].decode())


def _is_ready(address: str) -> bool:
    connection = http.client.HTTPConnection(address, timeout=1.0)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def reachable(listen: str) -> str:
    """The HOST:PORT for clients of a listener at `listen`."""
    host, _, port = listen.rpartition(":")
    return f"{ {'': '127.0.0.1', '0.0.0.0': '127.0.0.1', '[::]': '[::1]'}.get(host, host) }:{port}"


def check_free(listen: str, address: str, advice: str) -> None:
    """Raises LaunchError if another process listens there: its answers would look like those of the demo.

    `advice` has {port}, another port to try.
    """
    port = int(listen.rpartition(":")[2])
    error = _taken(listen)
    if error is None:
        return
    if error.errno != errno.EADDRINUSE:
        raise LaunchError(f"{listen}: {error.strerror}")
    other = "another streamd" if _is_ready(address) else "another process"
    raise LaunchError(
        f"{other} listens on {listen} already; try another port: {advice.format(port=port % PORT_MAX + 1)}"
    )


def _taken(listen: str) -> OSError | None:
    """The error of listening at this address; None if it is free."""
    host, _, port = listen.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        socket.create_server((host.strip("[]"), int(port)), family=family).close()
    except OSError as error:
        return error
    return None


def admin_beside(listen: str) -> str:
    """A loopback address for the admin surface: the port after that of `listen` if it is free, else any."""
    wanted = f"127.0.0.1:{int(listen.rpartition(':')[2]) % PORT_MAX + 1}"
    if _taken(wanted) is None:
        return wanted
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


PAGES = """\
Open in a browser:

  http://{address}/   a chat to reload, to cut off, to read twice and to read slowly
  http://{admin}/   what streamd does meanwhile: its upstreams, streams, readers and keys
"""

CURL_LINES = """\
Paste into another terminal. Tokens, one by one:

  curl -N http://{address}{path} -H 'Content-Type: application/json' \\
    -d '{body}'

Each event has an id, <stream id>:<number>. The same stream again from where a reader was cut off, here after event 10
(start a stream with `-H 'X-Stream-Detach-Grace: 30'` and it goes on while nobody reads):

  curl -N http://{address}/v1/streams/STREAM_ID -H 'Last-Event-ID: STREAM_ID:10'

What is going on:

  curl http://{address}/status
  curl http://{address}/metrics
"""


@dataclass(frozen=True)
class Demo:
    """An upstream for a demonstration, and a request that it answers well."""

    about: str
    command: Sequence[str]
    path: str
    body: dict[str, Any]
    has_pages: bool = False  # whether the chat page can talk to it
    again: str = "make run LISTEN=127.0.0.1:{port}"  # the command for another port

    def curl_lines(self, address: str) -> str:
        """The command lines to paste."""
        return CURL_LINES.format(address=address, path=self.path, body=json.dumps(self.body))


def checked_listen(text: str) -> str:
    """An address of the flag --listen. Raises ValueError."""
    if not re.fullmatch(r".+:[1-9][0-9]{0,4}", text) or int(text.rpartition(":")[2]) > PORT_MAX:
        raise ValueError(f"HOST:PORT with a port from 1 to {PORT_MAX}")
    return text


def launch(listen: str, demo: Demo, streamd: Sequence[str] = STREAMD) -> int:
    """Run both until Ctrl-C or SIGTERM (status 0), or until a child dies (status 1; its log is printed)."""
    address = reachable(listen)
    try:
        check_free(listen, address, demo.again)
        with Launcher().running() as launcher:
            print(f"starting {demo.about} …", flush=True)
            url = launcher.wait_url(launcher.start("upstream", demo.command))
            admin = admin_beside(listen) if demo.has_pages else ""
            pages = ("--demo", "--admin", admin) if demo.has_pages else ()
            front = launcher.start("streamd", [*streamd, "--listen", listen, "--upstream", url, *pages])
            launcher.wait_ready(front, address)
            print(f"streamd listens on http://{address}, in front of {demo.about} at {url}.\n")
            if demo.has_pages:
                print(PAGES.format(address=address, admin=admin))
            print(demo.curl_lines(address))
            print("Ctrl-C stops both.", flush=True)
            launcher.wait_end(front)
            print("streamd was drained, and has stopped")
            return 0
    except Stopped:
        print("stopped", flush=True)
        return 0
    except LaunchError as wrong:
        print(wrong, file=sys.stderr)
        return 1
