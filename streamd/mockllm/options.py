"""The mock's behaviour: the defaults of a server, and the changes by a single request's `X-Mock-…` headers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from streamd.mockllm.faults import NO_FAULTS, BadOption, Faults, parse_faults

TOKENS_MAX: Final = 1_000_000  # more than any model's context; a typing error should not keep a stream open for a year
SECONDS_MAX: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class MockOptions:
    """The behaviour of a server, unless a request's headers change it."""

    interval_s: float = 0.040  # 25 tokens a second; models take 20 to 80 ms a token
    jitter_s: float = 0.0  # each interval is off by up to this much, either way
    ttft_s: float = 0.150  # time to the first event, head included
    tokens: int = 160  # a paragraph or two
    seed: int = 1
    text_seed: int | None = None  # None: the text follows from the prompt
    stamp: bool = False  # tokens are the clock's time, for measuring
    models: tuple[str, ...] = ("mock-llm",)
    faults: Faults = NO_FAULTS

    def for_request(self, get: Callable[[bytes], bytes | None]) -> MockOptions:
        """These options with the changes of a request's headers. `get` finds a header's value. Raises BadOption."""
        changes: dict[str, object] = {}
        for header, (name, parse) in _HEADERS.items():
            value = get(header)
            if value is not None:
                changes[name] = parse(value.decode("latin-1"))
        faults = get(b"x-mock-fault")
        if faults is not None:
            changes["faults"] = parse_faults(faults.decode("latin-1"))
        return replace(self, **changes) if changes else self  # type: ignore[arg-type]


def parse_seconds(milliseconds: str) -> float:
    """Seconds from the milliseconds of a flag or header. Raises BadOption."""
    try:
        seconds = float(milliseconds) / 1000
    except ValueError:
        raise BadOption(f"{milliseconds!r} is no number of milliseconds") from None
    if not (math.isfinite(seconds) and 0 <= seconds <= SECONDS_MAX):
        raise BadOption(f"{milliseconds} ms is not between 0 and a day")
    return seconds


def parse_count(tokens: str) -> int:
    """A number of tokens. Raises BadOption."""
    if not tokens.isdecimal() or not 1 <= int(tokens) <= TOKENS_MAX:
        raise BadOption(f"{tokens!r} is no count of tokens from 1 to {TOKENS_MAX}")
    return int(tokens)


def parse_integer(number: str) -> int:
    """Any integer. Raises BadOption."""
    try:
        return int(number)
    except ValueError:
        raise BadOption(f"{number!r} is no integer") from None


def parse_flag(word: str) -> bool:
    """On unless empty or `0`."""
    return word not in ("", "0")


_HEADERS: Final[dict[bytes, tuple[str, Callable[[str], object]]]] = {
    b"x-mock-interval-ms": ("interval_s", parse_seconds),
    b"x-mock-jitter-ms": ("jitter_s", parse_seconds),
    b"x-mock-ttft-ms": ("ttft_s", parse_seconds),
    b"x-mock-tokens": ("tokens", parse_count),
    b"x-mock-text-seed": ("text_seed", parse_integer),
    b"x-mock-stamp": ("stamp", parse_flag),
}
