"""The lines above the tables of `streamd top`: the daemon in a few facts, the most important first."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.cells import cell_len

from streamd.daemon.admin_cli import drain_line, seconds, shown, size, upstream_word

# Tokens are counted once a second by each worker, so a difference over a shorter time jumps.
RATE_WINDOW_S: Final = 5.0

_BETWEEN: Final = "   "


class TokenRate:
    """Tokens a second, from the growth of /status's `tokens_total` over the last seconds."""

    def __init__(self) -> None:
        self._seen: collections.deque[tuple[float, int]] = collections.deque(maxlen=64)

    def add(self, now: float, total: int | None) -> float | None:
        """Note the total at a time on any monotonic clock, and return the rate; None as long as there is none."""
        if total is None:
            return None
        if self._seen and total < self._seen[-1][1]:  # the daemon was started again
            self._seen.clear()
        self._seen.append((now, total))
        while len(self._seen) > 2 and now - self._seen[1][0] >= RATE_WINDOW_S:
            self._seen.popleft()
        before, total_before = self._seen[0]
        return (total - total_before) / (now - before) if now > before else None


def facts(status: Mapping[str, Any], tokens_per_s: float | None) -> list[str]:
    """The facts of a daemon, from its /status."""
    streams, admission = status["streams"], status["admission"]
    parts = admission["saturation"]
    highest = max(parts, key=lambda part: parts[part])
    detached = f" ({streams['detached']} without a reader)" if streams["detached"] else ""
    limit = admission["budget"]["memory_limit_bytes"]
    rate = "-" if tokens_per_s is None else f"{tokens_per_s:.0f}"
    return [
        f"streamd {status['version']}",
        f"{status['state']}, up {seconds(status['uptime_s'])}",
        f"workers {len(status.get('workers', ())) or 1}",
        f"streams {streams['live']}{detached}",
        f"readers {status['subscribers']}",
        f"tokens/s {rate}",
        f"memory {size(admission.get('resident_bytes'))} of {size(limit)} ({parts['memory']:.0%})",
        f"saturation {parts[highest]:.2f} ({highest})",
        f"loop lag {admission['loop_lag_s'] * 1000:.1f}ms",
    ]


def alarms(status: Mapping[str, Any]) -> list[str]:
    """Lines about a drain, and about servers to which no requests go."""
    lines = [drain_line(status["drain"])] if status.get("drain") else []
    words = {name: upstream_word(upstream) for name, upstream in status["upstreams"].items()}
    out = [f"{shown(name)} ({word})" for name, word in words.items() if word in ("out", "probing")]
    return [*lines, f"{len(out)} of {len(words)} upstreams out: {', '.join(out)}"] if out else lines


def wrapped(facts: Sequence[str], width: int, lines_max: int) -> list[str]:
    """Facts in lines of at most `width` cells; those for which there is no line are left out."""
    lines: list[str] = []
    for fact in facts:
        if lines and cell_len(lines[-1]) + cell_len(_BETWEEN) + cell_len(fact) <= width:
            lines[-1] += _BETWEEN + fact
        elif len(lines) < lines_max:
            lines.append(fact)
    return lines
