"""streamd as the load programs start it, and its own status and metrics."""

from __future__ import annotations

import json
import socket
import sys
import time
import urllib.request
from dataclasses import dataclass
from typing import Any

import contenders
import rig

START_LIMIT_S = 60


@dataclass(frozen=True)
class Target:
    """A running streamd: its process tree, its port, and its upstream's."""

    pid: int
    port: int
    upstream: int

    def url(self, path: str) -> str:
        """The URL of a path."""
        return f"http://127.0.0.1:{self.port}{path}"

    def get(self, path: str) -> bytes:
        """The body of an answer. Raises OSError if there is no answer."""
        with urllib.request.urlopen(self.url(path), timeout=30) as answer:
            body: bytes = answer.read()
        return body

    def status(self) -> dict[str, Any]:
        """The fields of /status."""
        fields: dict[str, Any] = json.loads(self.get("/status"))
        return fields

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        lines = (line.split() for line in self.get("/metrics").decode().splitlines())
        return sum(float(parts[1]) for parts in lines if parts and parts[0].partition("{")[0] == name)

    def refused(self) -> dict[str, int]:
        """The numbers of refusals by gate, without zeros."""
        return {gate: count for gate, count in self.status()["admission"]["refused"].items() if count}

    def idle_bytes(self, running: rig.Rig) -> int:
        """User space before the readers connect, after a few earlier readers have filled caches and arenas."""
        body = json.dumps({"model": "synthetic", "stream": True, "tokens": 20, "interval_ms": 5})
        rig.result(running.sink(port=self.port, readers=100, ramp=500, warm=0, seconds=1, body=body), 60)
        time.sleep(0.5)
        return rig.pss_bytes(self.pid)

    def kernel_bytes(self) -> int:
        """The queues of all its sockets, on both sides. Raises Missing without ss."""
        return sum(rig.queue_bytes(f"sport = :{self.port} or dport = :{self.upstream}"))


def start(running: rig.Rig, upstream: int, *flags: str, workers: int = 1) -> Target:
    """Start streamd before an upstream on this machine with all features, and wait until all workers are ready."""
    port = rig.free_port()
    listen = ["--listen", f"127.0.0.1:{port}", "--upstream", f"http://127.0.0.1:{upstream}"]
    more = ["--workers", str(workers), "--log-level", "warning", *flags]
    argv = [sys.executable, "-m", "streamd", "serve", *listen, *more]
    target = Target(running.start("streamd", argv, port, contenders.environment()), port, upstream)
    deadline = time.monotonic() + START_LIMIT_S
    while not _ready(target, workers):
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all of {workers} workers were ready within {START_LIMIT_S} s")
        time.sleep(0.1)
    return target


def _ready(target: Target, workers: int) -> bool:
    try:
        status = target.status()
    except (OSError, ValueError):
        return False
    return (
        status["state"] == "serving"
        and sum(bool(each["pid"]) for each in status.get("workers", [{"pid": 1}])) == workers
    )


def mock(running: rig.Rig, *, per_s: float, tokens: int) -> int:
    """Start streamd's own mock upstream and return its port."""
    port = rig.free_port()
    pace = ["--ttft-ms", "0", "--interval-ms", f"{1000 / per_s:g}", "--tokens", str(tokens)]
    argv = [sys.executable, "-m", "streamd", "mock-llm", "--listen", f"127.0.0.1:{port}", *pace]
    running.start(f"mock-{port}", argv, port, contenders.environment())
    return port


def connect(port: int, limit_s: float = 30) -> socket.socket:
    """A connection to a port of this machine."""
    return socket.create_connection(("127.0.0.1", port), timeout=limit_s)
