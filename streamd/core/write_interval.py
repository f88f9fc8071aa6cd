"""Write intervals: how long a stream's events may wait for each other, as its terms say, and as the load asks for it.

net/pacing.py explains when a token waits, and for how long at most. Here are the two numbers that decide: the terms of
a stream, and the interval that follows the worker's load.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from streamd.rows import WORD_S, Refused, parse_duration

# The longest interval that settings and requests may ask for, and the longest that the load may bring. A reader sees a
# pause of more than a second as a stop.
INTERVAL_S_MAX: Final = 1.0

# The interval of a worker that is full and keeps up: a token in two to three of a fast model's. Readers can't tell it
# from none: text that comes 20 times a second looks steady.
FULL_INTERVAL_S: Final = 0.05

# Shares of a worker's time from which its interval grows, and below which it falls. The falling threshold is half of
# the rising threshold, because an interval saves at most half of a token's cost: without the gap between them an
# interval would end the load that it was made for.
BUSY_SHARE: Final = 0.85
IDLE_SHARE: Final = 0.35
# The same for intervals beyond FULL_INTERVAL_S.
FULL_SHARE: Final = 0.95
RELIEVED_SHARE: Final = 0.85

# Beyond FULL_INTERVAL_S an interval grows only while tokens wait longer than it says, by this share of it: a worker
# that is busy with thousands of new connections, and on time with its tokens, isn't past its capacity.
LATE_SHARE: Final = 0.25

# Steps of the interval, one for each look at the load (250 ms): five from 0 to FULL_INTERVAL_S, eight to the maximum.
FIRST_STEP_S: Final = 0.01
GROWTH: Final = 1.5
RELIEF: Final = 0.8
LEAST_STEP_S: Final = 0.005


class WriteInterval(NamedTuple):
    """The write interval of a stream: at least `least_s`; `adaptive`: as much more as the worker's load asks for."""

    least_s: float = 0.0
    adaptive: bool = False

    @classmethod
    def of_setting(cls, seconds: float) -> WriteInterval:
        """The interval of a settings row: seconds, or WORD_S for the word `adaptive`."""
        return cls(0.0, adaptive=True) if seconds == WORD_S else cls(seconds)

    @classmethod
    def parse(cls, raw: object) -> WriteInterval:
        """The interval of a request's value: a duration up to INTERVAL_S_MAX, or `adaptive`. Raises Refused."""
        if raw == "adaptive":
            return cls(0.0, adaptive=True)
        seconds = parse_duration(raw)
        if seconds > INTERVAL_S_MAX:
            raise Refused(f"a duration up to {INTERVAL_S_MAX:g}s, or adaptive")
        return cls(seconds)

    def raised_to(self, asked: WriteInterval) -> WriteInterval:
        """The interval of a request that asks for another, and may only raise it."""
        return WriteInterval(max(self.least_s, asked.least_s), adaptive=self.adaptive or asked.adaptive)


class AdaptiveInterval:
    """The interval that follows a worker's load: 0 while the worker is idle, up to FULL_INTERVAL_S as it fills up, up
    to INTERVAL_S_MAX while its tokens come too late.
    """

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds = 0.0

    def note(self, busy_share: float, late_s: float) -> None:
        """Take a step. `busy_share`: the part of the last 250 ms in which the worker didn't wait for input, 0 to 1;
        `late_s`: how much longer than they should tokens have waited meanwhile, at most.
        """
        now_s = self.seconds
        if now_s < FULL_INTERVAL_S:
            if busy_share >= BUSY_SHARE:
                self.seconds = min(FULL_INTERVAL_S, now_s * GROWTH or FIRST_STEP_S)
            elif busy_share < IDLE_SHARE:
                self.seconds = self._halved(now_s)
        elif busy_share >= FULL_SHARE and late_s >= now_s * LATE_SHARE:
            self.seconds = min(INTERVAL_S_MAX, now_s * GROWTH)
        elif now_s > FULL_INTERVAL_S and busy_share < RELIEVED_SHARE:
            self.seconds = max(FULL_INTERVAL_S, now_s * RELIEF)
        elif busy_share < IDLE_SHARE:
            self.seconds = self._halved(now_s)

    @staticmethod
    def _halved(seconds: float) -> float:
        return seconds / 2 if seconds / 2 >= LEAST_STEP_S else 0.0
