"""Books against truth: is the memory that streamd holds for somebody also the memory that it has counted?

For each state of `book_states.py` a streamd of its own is started and brought into that state from outside. Then the
growth of its workers' anonymous memory is compared with the growth of the bytes that admission has counted for user
space (`in_use` of /status, less the kernel's part of each price). A ratio above 1.5 fails. The kernel's own part, by
`ss -m`, stands beside it.

    books.py [STATE…]        all states, or those whose names begin so; about five minutes, one process at a time
    books.py --list
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import http.client
import json
import resource
import selectors
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rig
from tls_price import make_certificate

sys.path.insert(0, str(rig.HERE.parent))
from streamd.core.admission import Demands, Prices

MIB = 1024 * 1024

# The bound of the ratio: allocators round sizes up by an eighth to a quarter, and keep half-empty pages.
RATIO_MAX = 1.5

# Limits of time that would end a state before it is measured are as long as they may be.
PATIENT: Mapping[str, str] = {
    "head-timeout": "5m",
    "body-grace": "5m",
    "keepalive-timeout": "1h",
    "commit-after": "1h",
    "ttft-timeout": "0",
    "idle-timeout": "0",
    "heartbeat": "0",
    "stall-timeout": "24h",
    "retention": "24h",
    "resume-grace": "1h",
    "detach-grace-max": "24h",
    "detached-max": "100000",
    "publisher-idle-timeout": "0",
    "publisher-grace": "24h",
    "loop-lag-max": "0",
    "worker-stuck": "10m",
    "log-level": "error",
}

SETTLED_LOOKS = 3  # number of equal looks in a row
LOOK_INTERVAL_S = 0.5  # logs of live streams are charged once a second
SETTLED_S_MAX = 60.0
SAME_BYTES = 256 * 1024  # looks that differ by less are equal
WARM_CONNECTIONS = 50  # the first connections fill free lists, caches and arenas


@dataclass(frozen=True)
class Look:
    """The memory of a streamd at a moment."""

    anonymous_bytes: int  # of all workers, by the kernel
    counted_bytes: int  # by admission, without the kernel's part of each price
    queue_bytes: int  # the kernel's queues, by ss

    def near(self, other: Look) -> bool:
        """Whether nothing goes on between the two."""
        pairs = (
            (self.anonymous_bytes, other.anonymous_bytes),
            (self.counted_bytes, other.counted_bytes),
            (self.queue_bytes, other.queue_bytes),
        )
        return all(abs(a - b) <= SAME_BYTES for a, b in pairs)


@dataclass
class Bed:
    """A streamd in the making of a state, and everything that holds it there."""

    folder: Path
    port: int
    admin: int
    upstream: Upstream | None
    prices: Prices
    context: ssl.SSLContext | None  # for TLS listeners
    command: list[str] = field(default_factory=list)
    running: rig.Rig | None = None
    pid: int = 0
    unix_ends: int = 0  # connections that admission counts at the price of a Unix socket
    open: list[socket.socket] = field(default_factory=list)

    def start(self) -> None:
        """Start the daemon, or the next daemon over the same files."""
        assert self.running is not None
        self.pid = self.running.start("streamd", self.command, self.port)

    def stop(self) -> None:
        """Stop the daemon in order, so that it saves its streams."""
        assert self.running is not None
        process = self.running.processes.pop()
        process.send_signal(signal.SIGTERM)
        process.wait(120)

    def connect(self, *, rcvbuf: int = 0, tls: bool = False) -> socket.socket:
        """A connection to the daemon that stays open to the end."""
        connection = socket.socket()
        if rcvbuf:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        connection.settimeout(120)
        connection.connect(("127.0.0.1", self.port))
        if tls:
            assert self.context is not None
            connection = self.context.wrap_socket(connection, server_hostname="localhost")
        self.open.append(connection)
        return connection

    def send(self, request: bytes, *, until: bytes = b"", rcvbuf: int = 0, tls: bool = False) -> socket.socket:
        """A connection on which `request` was sent and, if given, the answer was read up to `until`."""
        connection = self.connect(rcvbuf=rcvbuf, tls=tls)
        connection.sendall(request)
        seen = read_until(connection, until) if until else b""
        if seen.startswith(b"HTTP/1.1 ") and not seen.startswith(b"HTTP/1.1 2"):
            raise RuntimeError(f"refused: {seen[:300]!r}")
        return connection

    def call(self, method: str, path: str, body: bytes = b"", **fields: str) -> dict[str, Any]:
        """Ask on the kept connection for calls. Raises RuntimeError for an answer that isn't a success."""
        answer = self._called(method, path, body, {name.replace("_", "-"): value for name, value in fields.items()})
        text = answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {text[:300]!r}")
        return dict(json.loads(text)) if text else {}

    def _called(self, method: str, path: str, body: bytes, fields: dict[str, str]) -> http.client.HTTPResponse:
        if not hasattr(self, "_caller"):
            self._caller = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        self._caller.request(method, path, body, fields)
        return self._caller.getresponse()

    def workers(self) -> list[int]:
        """The processes that serve connections."""
        return rig.tree(self.pid)[1:]

    def status(self) -> dict[str, Any]:
        """/status of the admin listener."""
        connection = http.client.HTTPConnection("127.0.0.1", self.admin, timeout=120)
        connection.request("GET", "/status")
        status: dict[str, Any] = json.loads(connection.getresponse().read())
        connection.close()
        return status

    def look(self) -> Look:
        """The memory at this moment."""
        in_use, prices = self.status()["admission"]["in_use"], self.prices
        kernel = in_use["connections"] * (prices.socket_bytes + prices.send_queue_bytes)
        kernel += self.unix_ends * (prices.unix_queue_bytes - prices.send_queue_bytes)
        kernel += in_use["streams"] * (prices.socket_bytes + prices.upstream_queue_bytes)
        ports = [f"sport = :{self.port}", *([f"dport = :{self.upstream.port}"] if self.upstream is not None else [])]
        return Look(
            sum(rig.anonymous_bytes(pid) for pid in self.workers()),
            in_use["memory"] - kernel + in_use["bodies"],
            sum(rig.queue_bytes(" or ".join(ports))),
        )

    def settled(self) -> Look:
        """The memory once it doesn't change any more."""
        looks = [self.look()]
        deadline = time.monotonic() + SETTLED_S_MAX
        while time.monotonic() < deadline:
            time.sleep(LOOK_INTERVAL_S)
            looks.append(self.look())
            last = looks[-SETTLED_LOOKS - 1 :]
            if len(last) > SETTLED_LOOKS and all(look.near(last[-1]) for look in last):
                break
        return looks[-1]

    def wait_for(self, what: str, reached: Callable[[dict[str, Any]], bool], limit_s: float = 120) -> None:
        """Wait until /status shows it. Raises TimeoutError."""
        deadline = time.monotonic() + limit_s
        while not reached(self.status()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {limit_s:.0f} s: {what}")
            time.sleep(LOOK_INTERVAL_S)


class Upstream(threading.Thread):
    """An inference server that answers each request with the same bytes as soon as it is whole, and then is silent."""

    def __init__(self, answer: bytes, *, reads_bodies: bool = True, together: int = 1) -> None:
        """`together`: the answers begin when that many requests are whole."""
        super().__init__(daemon=True)
        self._answer = answer
        self._reads_bodies = reads_bodies
        self._together = together
        self._whole: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.port: int = self._listener.getsockname()[1]
        self._requests: dict[socket.socket, tuple[bytes, int]] = {}  # the head so far, or the bytes still to come

    def run(self) -> None:
        """Serve until the process ends."""
        selector = selectors.DefaultSelector()
        selector.register(self._listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection is self._listener:
                    accepted = self._listener.accept()[0]
                    self._requests[accepted] = (b"", -1)
                    selector.register(accepted, selectors.EVENT_READ)
                elif not self._take(connection):
                    selector.unregister(connection)

    def _take(self, connection: socket.socket) -> bool:
        """Read what has come. False: this connection is to be read no more."""
        try:
            data = connection.recv(256 * 1024)
        except OSError:
            data = b""
        if not data:
            connection.close()
            return False
        head, left = self._requests[connection]
        if left < 0:
            head += data
            at = head.find(b"\r\n\r\n")
            if at < 0:
                self._requests[connection] = (head, -1)
                return True
            if not self._reads_bodies:
                return False
            field = head[:at].lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            left = int(field or 0) - (len(head) - at - 4)
        else:
            left -= len(data)
        if left <= 0:
            left = -1
            self._whole.append(connection)
            if len(self._whole) >= self._together and self._answer:
                for each in self._whole:
                    each.sendall(self._answer)
                self._whole.clear()
        self._requests[connection] = (b"", left)
        return True


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    """Read until `mark` has come. Raises RuntimeError if the connection ends before."""
    seen = b""
    while mark not in seen:
        part = connection.recv(4096)
        if not part:
            raise RuntimeError(f"closed after {seen[-300:]!r}")
        seen += part
    return seen


def _nothing(folder: Path) -> None:
    """The default of `prepare`."""


@dataclass(frozen=True)
class State:
    """A state in which memory is held, and the way into it from outside."""

    name: str
    load: Callable[[Bed], int]  # brings the daemon there; the number of things held
    settings: Mapping[str, str] = field(default_factory=dict)  # beside PATIENT
    prepare: Callable[[Path], None] = _nothing  # makes files that the settings name, in that folder
    answer: bytes | None = None  # of the upstream; None: there is no upstream
    upstream_reads: bool = True
    together: int = 1  # requests that the upstream waits for before it answers
    tls: bool = False
    is_fixed: bool = False  # counted at start, in the worker's own price


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    number: int
    grown: Look

    @property
    def ratio(self) -> float:
        """Memory over the books; infinite where nothing is counted."""
        grown = self.grown
        if grown.anonymous_bytes <= SAME_BYTES:
            return 0.0
        return grown.anonymous_bytes / grown.counted_bytes if grown.counted_bytes > 0 else float("inf")

    def __str__(self) -> str:
        grown = self.grown
        sizes = f"{grown.anonymous_bytes / MIB:8.1f} {grown.counted_bytes / MIB:8.1f} {self.ratio:6.2f}"
        return f"{self.name:34} {self.number:6} {sizes} {grown.queue_bytes / MIB:8.1f}"


HEADING = f"{'state':34} {'number':>6} {'MiB':>8} {'counted':>8} {'ratio':>6} {'kernel':>8}"


def measure(state: State) -> Row:
    """Start a daemon, bring it into the state, and compare."""
    with bed_of(state) as bed:
        warm(bed)
        before = bed.settled()
        number = state.load(bed)
        after = bed.settled()
        own = Demands().process_bytes - before.anonymous_bytes if state.is_fixed else 0
        grown = Look(
            after.anonymous_bytes - before.anonymous_bytes,
            after.counted_bytes - before.counted_bytes + own,
            after.queue_bytes - before.queue_bytes,
        )
        for connection in bed.open:
            connection.close()
    return Row(state.name, number, grown)


@contextlib.contextmanager
def bed_of(state: State) -> Iterator[Bed]:
    """A running daemon with the settings of the state."""
    folder = Path(tempfile.mkdtemp(prefix="streamd-books-"))
    upstream = context = None
    port, admin = rig.free_port(), rig.free_port()
    settings = {**PATIENT, **{key: value.format(folder=folder) for key, value in state.settings.items()}}
    state.prepare(folder)
    command = [sys.executable, "-m", "streamd", "serve", "--listen", f"127.0.0.1:{port}"]
    command += ["--admin", f"127.0.0.1:{admin}"]
    if state.answer is not None:
        upstream = Upstream(state.answer, reads_bodies=state.upstream_reads, together=state.together)
        upstream.start()
        command += ["--upstream", f"http://127.0.0.1:{upstream.port}"]
    if state.tls:
        cert, key = make_certificate(folder)
        settings |= {"tls-cert": str(cert), "tls-key": str(key)}
        context = ssl.create_default_context(cafile=str(cert))
    for name, value in settings.items():
        command += [f"--{name}", value]
    prices = Prices()
    try:
        with rig.rig() as running:
            bed = Bed(folder, port, admin, upstream, prices, context, command, running)
            bed.start()
            yield bed
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def warm(bed: Bed) -> None:
    """Let the process make its lasting allocations."""
    with contextlib.ExitStack() as closing:
        for _ in range(WARM_CONNECTIONS):
            request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
            closing.enter_context(bed.send(request, until=b"\r\n\r\n", tls=bed.context is not None))
    bed.open.clear()


def main(argv: Sequence[str]) -> int:
    """Print the table; 1 if a ratio is above the bound."""
    from book_states import STATES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("states", nargs="*", metavar="STATE")
    parser.add_argument("--list", action="store_true", help="print the names of the states")
    options = parser.parse_args(argv)
    chosen = [s for s in STATES if not options.states or any(s.name.startswith(name) for name in options.states)]
    if options.list:
        print("\n".join(state.name for state in chosen))
        return 0
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    print(HEADING, flush=True)
    failed = []
    for state in chosen:
        try:
            row = measure(state)
        except Exception as error:  # the other states still have their turn
            print(f"{state.name:34} not measured: {error!r}"[:200], flush=True)
            failed.append(state.name)
            continue
        gc.collect()
        is_over = row.ratio > RATIO_MAX
        print(f"{row}{'  TOO LITTLE COUNTED' if is_over else ''}", flush=True)
        failed += [state.name] if is_over else []
    print(f"ratio above {RATIO_MAX}: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
