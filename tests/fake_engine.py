"""A server of the engine that a test scripts: real sockets on loopback, RESP3, and a log of the commands it got."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import hiredis
from loopback import run

PATIENCE_S = 30.0

Command = tuple[bytes, ...]
# The bytes that answer a command; None: the server's own answer; b"": none yet.
Script = Callable[[Command], bytes | None]


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition that the loop's own work brings about."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  # conditions of every kind
            await asyncio.sleep(0.001)


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test as a coroutine, on uvloop."""

    def whole() -> None:
        run(test)

    whole.__name__, whole.__module__ = test.__name__, test.__module__
    return whole


def hello(**changes: str) -> bytes:
    """The reply to HELLO 3 of a server that can be used, with changes."""
    fields = {"server": "valkey", "version": "9.1.2", "mode": "standalone", "role": "master"} | changes
    return b"%%%d\r\n" % len(fields) + b"".join(bulk(k) + bulk(v) for k, v in fields.items())


def bulk(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return b"$%d\r\n%b\r\n" % (len(data), data)


def push(*parts: bytes) -> bytes:
    return b">%d\r\n" % len(parts) + b"".join(map(bulk, parts))


class FakeEngine:
    """Answers HELLO, PING, SUBSCRIBE and UNSUBSCRIBE; the script answers, or holds, what it wants."""

    def __init__(self, script: Script | None) -> None:
        self.script = script
        self.commands: list[Command] = []
        self.connections: list[asyncio.StreamWriter] = []
        self.port = 0

    @property
    def names(self) -> list[bytes]:
        return [command[0] for command in self.commands]

    def say(self, data: bytes) -> None:
        """Bytes out of turn, on the newest connection."""
        self.connections[-1].write(data)

    def cut(self) -> None:
        """Reset every connection."""
        for writer in self.connections:
            writer.transport.abort()
        self.connections.clear()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(writer)
        parser = hiredis.Reader()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                parser.feed(data)
                while (parts := parser.gets()) is not False:
                    command = tuple(parts)
                    self.commands.append(command)
                    writer.write(self.answer(command))
        writer.close()

    def answer(self, command: Command) -> bytes:
        said = self.script(command) if self.script is not None else None
        if said is not None:
            return said
        match command[0]:
            case b"HELLO":
                return hello()
            case b"PING":
                return bulk(command[1])
            case b"SUBSCRIBE" | b"UNSUBSCRIBE":
                kind = command[0].lower()
                return b"".join(b">3\r\n" + bulk(kind) + bulk(each) + b":1\r\n" for each in command[1:])
        return b"+OK\r\n"


@contextlib.asynccontextmanager
async def fake_engine(script: Script | None = None, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[FakeEngine]:
    engine = FakeEngine(script)
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0, ssl=tls)
    engine.port = server.sockets[0].getsockname()[1]
    try:
        yield engine
    finally:
        engine.cut()
        server.close()
        await server.wait_closed()


class Asked:
    """The replies that came to commands, in order."""

    def __init__(self) -> None:
        self.replies: list[Any] = []

    def __call__(self, reply: Any) -> None:
        self.replies.append(reply)
