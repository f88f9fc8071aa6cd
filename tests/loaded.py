"""A daemon of two workers under load, with a key file and an admin socket, as an operator meets it.

`with loaded(folder, "alice", "bob") as d:` has a key for each name; `d.reader("alice")` begins a generation that goes
on, `d.reader("bob", stalls=True)` the same for a reader that takes nothing. `d.client` asks the admin surface.
"""

from __future__ import annotations

import contextlib
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from served import Served, served, upstream

from streamd import cli
from streamd.addresses import parse_address
from streamd.daemon.admin_client import AdminClient


class Loaded:
    """The daemon, the keys by name, and the connections of its readers."""

    def __init__(self, d: Served, address: str, keys: dict[str, str]) -> None:
        self.d = d
        self.address = address
        self.keys = keys
        self.client = AdminClient(parse_address(address))
        self._open: list[socket.socket] = []

    def reader(self, name: str, *, stalls: bool = False, model: str = "mock-llm", **mock: object) -> str:
        """Begin a generation for a key, of 100,000 tokens unless `mock` has others. Returns the reader's address."""
        sock = socket.socket()
        if stalls:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", self.d.port))
        body = json.dumps({"model": model, "stream": True, "messages": [{"role": "user", "content": "Hello"}]})
        fields = {"tokens": 100_000, **mock}
        lines = [f"X-Mock-{field.replace('_', '-')}: {value}" for field, value in fields.items()]
        lines += ["Host: a", "Content-Type: application/json", f"Content-Length: {len(body)}"]
        lines.append(f"Authorization: Bearer {self.keys[name]}")
        sock.sendall("\r\n".join(["POST /v1/chat/completions HTTP/1.1", *lines, "", body]).encode())
        self._open.append(sock)
        if not stalls:
            threading.Thread(target=_read_all, args=(sock,), daemon=True).start()
        return "{}:{}".format(*sock.getsockname())

    def rows(self, table: str, **query: str) -> list[dict[str, Any]]:
        """The rows of a table of the admin surface."""
        found: list[dict[str, Any]] = self.client.ask("GET", f"/{table}", query)["data"]
        return found

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait until the condition is true, and return its value."""
        return self.d.until(condition, what)

    def close(self) -> None:
        """Close the readers' connections."""
        for sock in self._open:
            with contextlib.suppress(OSError):  # the daemon closed it
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._open.clear()


def _read_all(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed
        while sock.recv(65536):
            pass


def new_key(path: Path, name: str, *flags: str) -> str:
    """Add a key to a key file, as `streamd keys add` does, and return it."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert cli.main(["keys", "--file", str(path), "add", name, *flags]) == 0
    return told.getvalue().strip()


@contextlib.contextmanager
def loaded(
    folder: Path, *names: str, args: tuple[str, ...] = (), of_upstreams: tuple[str, ...] = ()
) -> Iterator[Loaded]:
    """A Loaded that serves. `of_upstreams`: the flags that name its servers; else one is started, 20 ms a token."""
    keys = {name: new_key(folder / "keys", name) for name in names}
    address = f"unix:{folder}/admin.sock"
    with contextlib.ExitStack() as stack:
        servers = of_upstreams or ("--upstream", stack.enter_context(upstream("--interval-ms", "20")))
        words = ("--workers", "2", "--admin", address, "--keys-file", f"{folder}/keys", *servers, *args)
        d = stack.enter_context(served(*words))
        d.notify.until("READY=1")
        made = Loaded(d, address, keys)
        stack.callback(made.close)
        yield made
