"""Work counted in instructions of Python: the same on every machine, busy or quiet."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def instructions(file: str | None, act: Callable[[], object]) -> int:
    """The instructions that the code of this file takes while `act` runs."""
    count = 0

    def each(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "opcode"
        return each

    def begin(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != file:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return each

    before = sys.gettrace()
    sys.settrace(begin)
    try:
        act()
    finally:
        sys.settrace(before)
    return count
