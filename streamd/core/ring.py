"""Ring: the fixed-size buffer of frame references between one stream and one reader that can't take them just now.

Bounds: `slots` references (32 to 128, 64 unless set: at 50 tokens a second more than a second of stall, and 8 B a
slot) and `bytes_max` of frames (32 KiB: 64 frames of 250 B are 16 KB, doubled), whichever is reached first. A ring
always takes one frame, however large, so that an event over `bytes_max` can pass at all.

The slots are allocated once. The frames are shared with every other reader of the stream, so what a ring costs for
itself is its slots; `bytes_held` is the most that it can keep alive alone.
"""

from __future__ import annotations

RING_SLOTS_MIN = 32
RING_SLOTS_MAX = 128


class Ring:
    """First in, first out; never grows, never waits.

    Invariants: 0 <= held <= slots; bytes_held <= bytes_max or held == 1; slots outside [first, first + held) are None.
    """

    __slots__ = ("_first", "_frames", "bytes_held", "bytes_max", "held")

    def __init__(self, slots: int, bytes_max: int) -> None:
        if not RING_SLOTS_MIN <= slots <= RING_SLOTS_MAX:
            raise ValueError(f"a ring has {RING_SLOTS_MIN} to {RING_SLOTS_MAX} slots, not {slots}")
        self._frames: list[bytes | None] = [None] * slots
        self._first = 0
        self.held = 0
        self.bytes_held = 0
        self.bytes_max = bytes_max

    @property
    def slots(self) -> int:
        return len(self._frames)

    def push(self, frame: bytes) -> bool:
        """Take one frame at the end. False, and nothing changed, if there is no room for it."""
        held, slots = self.held, len(self._frames)
        if held and (held == slots or self.bytes_held + len(frame) > self.bytes_max):
            return False
        self._frames[(self._first + held) % slots] = frame
        self.held = held + 1
        self.bytes_held += len(frame)
        return True

    def drop_oldest(self) -> bytes:
        """Give up the first frame and return it. IndexError when empty."""
        if not self.held:
            raise IndexError("the ring is empty")
        frame = self._frames[self._first]
        assert frame is not None
        self._frames[self._first] = None
        self._first = (self._first + 1) % len(self._frames)
        self.held -= 1
        self.bytes_held -= len(frame)
        return frame

    def take_all(self) -> bytes:
        """All frames in order as one piece, for one write; the ring is empty afterwards."""
        return b"".join([self.drop_oldest() for _ in range(self.held)])

    def clear(self) -> None:
        """Let go of every frame."""
        for _ in range(self.held):
            self.drop_oldest()
