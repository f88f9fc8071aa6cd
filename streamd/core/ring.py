"""Ring: the fixed-size buffer of frame references between a stream and a reader that can't take them just now.

A reference is a seq: the frame's bytes are in the replay log, where they weigh a tenth, and are made again when they
are written. Seqs in a ring have no hole, and the first of them is the reader's position. So all that the ring has to
remember of a frame is its size.

Why not the frames themselves: a stalled reader kept 64 of them alive, 18 KB that had no other use. They were freed when
the ring was let go, but scattered over pages that hold longer-lived objects too: over 400 stalled readers 14.5 KB for
each were not given back. References cost the same whether the ring is empty or full.

Bounds: `slots` references (32 to 128, 64 unless set: at 20 tokens a second 3 s of stall, and 4 B a slot) and
`bytes_max` of frames (32 KiB: 64 frames of 250 B are 16 KB, doubled), whichever is reached first. An empty ring takes a
frame of any size, so that an event over `bytes_max` can pass at all.
"""

from __future__ import annotations

from array import array

RING_SLOTS_MIN = 32
RING_SLOTS_MAX = 128
SLOT_BYTES = array("I").itemsize


class Ring:
    """First in, first out; never grows, never waits.

    Invariants: 0 <= held <= slots; bytes_held <= bytes_max or held == 1; bytes_held is the sum of the sizes held.
    """

    __slots__ = ("_first", "_sizes", "bytes_held", "bytes_max", "held")

    def __init__(self, slots: int, bytes_max: int) -> None:
        if not RING_SLOTS_MIN <= slots <= RING_SLOTS_MAX:
            raise ValueError(f"a ring has {RING_SLOTS_MIN} to {RING_SLOTS_MAX} slots, not {slots}")
        self._sizes = array("I", (0,)) * slots  # built from a tuple: from bytes it would allocate 6 % more
        self._first = 0
        self.held = 0
        self.bytes_held = 0
        self.bytes_max = bytes_max

    @property
    def slots(self) -> int:
        return len(self._sizes)

    def push(self, size: int) -> bool:
        """Take the next frame, of `size` bytes, at the end. False, and no change, if the ring has no room for it."""
        held, sizes = self.held, self._sizes
        if held and (held == len(sizes) or self.bytes_held + size > self.bytes_max):
            return False
        sizes[(self._first + held) % len(sizes)] = size
        self.held = held + 1
        self.bytes_held += size
        return True

    def drop_oldest(self) -> int:
        """Give up the first frame and return its size. IndexError when empty."""
        if not self.held:
            raise IndexError("the ring is empty")
        size = self._sizes[self._first]
        self._first = (self._first + 1) % len(self._sizes)
        self.held -= 1
        self.bytes_held -= size
        return size

    def clear(self) -> None:
        """Let go of every frame."""
        self._first = self.held = self.bytes_held = 0
