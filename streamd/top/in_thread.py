"""Work that waits for a daemon, in a thread, so that keys and the screen go on.

Why not the loop's own executor: it waits for its threads when the program ends, up to the client's ten seconds for a
daemon that has stopped answering. These threads end with the program.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

R = TypeVar("R")


async def in_thread(work: Callable[[], R]) -> R:
    """The result of `work`, or its exception, from a thread of its own."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[R] = loop.create_future()

    def settle(value: R | None, error: Exception | None) -> None:
        if result.done():  # the waiting coroutine was cancelled
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type]

    def run() -> None:
        value, error = None, None
        try:
            value = work()
        except Exception as raised:  # the caller gets it
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, daemon=True, name="streamd-top").start()
    return await result
