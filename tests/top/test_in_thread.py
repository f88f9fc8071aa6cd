"""Work in a thread."""

from __future__ import annotations

import asyncio
import threading

import pytest

from streamd.top.in_thread import in_thread


def test_the_result_and_the_exception_come_back() -> None:
    assert asyncio.run(in_thread(threading.current_thread)) is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        asyncio.run(in_thread(lambda: 1 // 0))


def test_the_loop_ends_without_waiting_for_the_thread() -> None:
    held, began = threading.Event(), threading.Event()

    def hang() -> None:
        began.set()
        held.wait()

    async def main() -> asyncio.Task[None]:
        task = asyncio.create_task(in_thread(hang))
        await asyncio.to_thread(began.wait)
        task.cancel()
        await asyncio.wait([task])
        return task

    assert asyncio.run(main()).cancelled()
    held.set()  # the thread finds no loop any more


def test_a_result_that_is_not_wanted_any_more_is_dropped() -> None:
    held = threading.Event()

    async def main() -> None:
        task = asyncio.create_task(in_thread(held.wait))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        held.set()
        for thread in threading.enumerate():
            if thread.name == "streamd-top":
                await asyncio.to_thread(thread.join)
        await asyncio.sleep(0)  # the thread's callback is in the loop's queue

    asyncio.run(main())
