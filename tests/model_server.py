"""A model of the engine behind sockets, for whole workers: they share its data and hear each other's messages."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import hiredis
from fake_engine import Command, FakeEngine, bulk, push, until
from loopback import Daemon, serving
from model_engine import ModelEngine

from streamd.engine.connection import EngineError
from streamd.engine.shards import CopyKeys


class ModelServer(FakeEngine):
    """Carries commands out on a model; connections that subscribe get its messages."""

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__(None)
        self.engine = ModelEngine(now)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(writer)
        parser = hiredis.Reader()
        heard: dict[bytes, Callable[[bytes], None]] = {}
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                parser.feed(data)
                while (parts := parser.gets()) is not False:
                    command = tuple(parts)
                    self.commands.append(command)
                    if command[0] == b"SUBSCRIBE":
                        self.subscribe(writer, command[1:], heard)
                    writer.write(self.answer(command))
        for channel, hear in heard.items():
            self.engine.listeners[channel].remove(hear)
        writer.close()

    def subscribe(
        self, writer: asyncio.StreamWriter, channels: Command, heard: dict[bytes, Callable[[bytes], None]]
    ) -> None:
        for channel in channels:
            hear = lambda text, channel=channel: writer.write(push(b"message", channel, text))  # noqa: E731
            heard[channel] = hear  # type: ignore[assignment]
            self.engine.listeners.setdefault(channel, []).append(heard[channel])

    def answer(self, command: Command) -> bytes:
        if command[0] in (b"HELLO", b"PING", b"SUBSCRIBE", b"UNSUBSCRIBE"):
            return super().answer(command)
        if command[0] == b"INFO":
            return bulk("maxmemory_policy:noeviction")
        return encoded(self.engine.execute(command))


def encoded(reply: Any) -> bytes:
    """A reply as RESP3."""
    match reply:
        case None:
            return b"_\r\n"
        case EngineError():
            return f"-{reply}\r\n".encode()
        case int():
            return b":%d\r\n" % reply
        case bytes():
            return bulk(reply)
        case dict():
            return b"%%%d\r\n" % len(reply) + b"".join(map(encoded, (part for item in reply.items() for part in item)))
    return b"*%d\r\n" % len(reply) + b"".join(map(encoded, reply))


class Pair:
    """Two workers, each of a node of its own, and the engine that they share."""

    def __init__(self, server: ModelServer, a: Daemon, b: Daemon) -> None:
        self.server = server
        self.a = a
        self.b = b


@contextlib.asynccontextmanager
async def pair(**settings: Any) -> AsyncIterator[Pair]:
    """Workers a and b, with links that are up."""
    server = ModelServer(asyncio.get_running_loop().time)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.port = listener.sockets[0].getsockname()[1]
    engine = (f"valkey://127.0.0.1:{server.port}",)
    async with serving(engine=engine, node="a", **settings) as a, serving(engine=engine, node="b", **settings) as b:
        clusters = [daemon.worker.cluster for daemon in (a, b)]
        for cluster in clusters:
            assert cluster is not None
            (shard,) = cluster.servers.shards
            await until(lambda shard=shard: shard.link.is_up and shard.channels.link.is_up)
        await until(lambda: len(server.engine.hashes.get(CopyKeys().members(), {})) == 2)
        yield Pair(server, a, b)
        for cluster in clusters:
            assert cluster is not None
            cluster.stop()
    server.cut()
    listener.close()
    await listener.wait_closed()
