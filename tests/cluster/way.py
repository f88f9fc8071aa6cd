"""Way: a TCP proxy between a member and the engine, in a thread: a network that a test slows down, holes or cuts."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator

from served import WAIT_S

CHUNK_BYTES = 1 << 16


class Way:
    """A proxy to a port. In a hole bytes wait, as in a network that is cut and healed before either end gives up."""

    def __init__(self, far_port: int) -> None:
        self.far_port = far_port
        self.port = 0
        self.delay_s = 0.0  # of each piece, one after the other
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._passes_there = asyncio.Event()
        self._passes_back = asyncio.Event()
        self._is_shut = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._carried: set[asyncio.Task[None] | None] = set()

    # -- as a test changes it

    def hole(self) -> None:
        """No byte passes either way, and no connection ends."""
        self._set(there=False, back=False)

    def half_open(self) -> None:
        """The engine hears the member, and the member hears nothing."""
        self._set(there=True, back=False)

    def mute(self) -> None:
        """The member hears the engine, and the engine hears nothing."""
        self._set(there=False, back=True)

    def shut(self) -> None:
        """All connections are reset, and new ones too."""
        self._is_shut = True
        self.reset()

    def open(self) -> None:
        """All passes, and what was held back first."""
        self._is_shut = False
        self._set(there=True, back=True)

    def reset(self) -> None:
        """All connections are reset."""
        self._call(self._abort_all)

    def _set(self, *, there: bool, back: bool) -> None:
        def change() -> None:
            for event, passes in ((self._passes_there, there), (self._passes_back, back)):
                if passes:
                    event.set()
                else:
                    event.clear()

        self._call(change)

    def _call(self, change: Callable[[], None]) -> None:
        async def changed() -> None:
            change()

        asyncio.run_coroutine_threadsafe(changed(), self._loop).result(WAIT_S)

    def _abort_all(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _rest(self) -> None:
        await asyncio.gather(*(task for task in self._carried if task is not None))

    # -- the proxy

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_shut:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.far_port)
        except OSError:
            writer.transport.abort()
            return
        pair, task = {writer, far_writer}, asyncio.current_task()
        self._writers |= pair
        self._carried.add(task)
        await asyncio.gather(
            self._copy(reader, far_writer, self._passes_there), self._copy(far_reader, writer, self._passes_back)
        )
        self._writers -= pair
        self._carried.discard(task)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passes: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                await passes.wait()
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                writer.write(data)
                await writer.drain()
        writer.transport.abort()

    @contextlib.contextmanager
    def serving(self) -> Iterator[Way]:
        """Serve, on a port that the kernel chooses."""
        self._thread.start()
        try:
            started = asyncio.start_server(self._carry, "127.0.0.1", 0)
            server = asyncio.run_coroutine_threadsafe(started, self._loop).result(WAIT_S)
            self.port = server.sockets[0].getsockname()[1]
            self.open()
            yield self
        finally:
            self.shut()
            self._set(there=True, back=True)
            asyncio.run_coroutine_threadsafe(self._rest(), self._loop).result(WAIT_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(WAIT_S)
