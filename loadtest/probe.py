"""How quickly does a busy streamd answer a health check? Repeated checks, from threads that mostly wait.

Three ways, each with its own samples: `kept`, connections that stay open (several, so that every worker is asked);
`admin`, a connection to the admin socket; `fresh`, a new connection for each check. A sample is (start, duration) in
CLOCK_MONOTONIC seconds, so that it compares with reports of other processes. A failed check counts with its waiting
time."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from figures import spread_of

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
LIMIT_S = 20.0
KEPT_CONNECTIONS = 8

Connect = Callable[[], socket.socket]


@dataclass
class Probe:
    """A way of asking, every `every_s`."""

    name: str
    connect: Connect
    connections: int  # that stay open; 0: a new connection each time
    every_s: float
    samples: list[tuple[float, float]] = field(default_factory=list)
    failures: int = 0

    def run(self, stopping: threading.Event) -> None:
        """Ask until `stopping` is set."""
        kept = [self.connect() for _ in range(self.connections)]
        turn = 0
        while not stopping.wait(self.every_s):
            at_s = time.monotonic()
            try:
                if kept:
                    turn = (turn + 1) % len(kept)
                    ask(kept[turn])
                else:
                    with self.connect() as fresh:
                        ask(fresh)
            except OSError:
                self.failures += 1
                if kept:
                    kept[turn].close()
                    with contextlib.suppress(OSError):
                        kept[turn] = self.connect()
            self.samples.append((at_s, time.monotonic() - at_s))
        for connection in kept:
            connection.close()

    def within(self, from_s: float, to_s: float) -> list[float]:
        """Milliseconds of the checks that ran in that time."""
        return [took_s * 1000 for at_s, took_s in self.samples if at_s + took_s >= from_s and at_s <= to_s]


def ask(connection: socket.socket) -> None:
    """Run a health check. Raises OSError for any answer except 200."""
    connection.sendall(HEALTH)
    answer = b""
    while not answer.endswith(b"}"):
        part = connection.recv(4096)
        if not part:
            raise ConnectionResetError("closed without an answer")
        answer += part
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise ConnectionRefusedError(answer[:40])


class Probes:
    """All ways together, for the length of a `with`."""

    def __init__(self, port: int, admin: str = "", *, fresh: bool = True, every_s: float = 0.02) -> None:
        self._stopping = threading.Event()
        self.kept = Probe("kept", lambda: _tcp(port), KEPT_CONNECTIONS, every_s)
        self._probes = [self.kept]
        if admin:
            self._probes.append(Probe("admin", lambda: _unix(admin), 1, every_s))
        if fresh:
            self._probes.append(Probe("fresh", lambda: _tcp(port), 0, 2 * every_s))
        self._threads = [threading.Thread(target=probe.run, args=(self._stopping,)) for probe in self._probes]

    def __enter__(self) -> Probes:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def figures(self, from_s: float, to_s: float) -> dict[str, float | int]:
        """The figures of all ways for that time."""
        found: dict[str, float | int] = {}
        for probe in self._probes:
            found |= spread_of(f"health_{probe.name}", probe.within(from_s, to_s))
            found[f"health_{probe.name}_failures"] = probe.failures
        return found


def _tcp(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S)


def _unix(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(LIMIT_S)
    connection.connect(path)
    return connection
