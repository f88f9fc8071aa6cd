"""The fields by which a server tells a client when to come back, in every form that clients obey.

`Retry-After` holds whole seconds or a date (RFC 9110 10.2.3); the SDKs take seconds with decimals too, and look for
`retry-after-ms` first. A bound that knows one form only is walked around by another.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterable
from email.utils import parsedate_to_datetime
from typing import Final

SECONDS: Final = b"retry-after"
MILLISECONDS: Final = b"retry-after-ms"

_number = re.compile(r"[0-9]{1,12}(?:\.[0-9]{1,12})?").fullmatch


def bounded(name: bytes, value: bytes, seconds_max: float, now_unix: float) -> bytes | None:
    """The value of a field of an upstream's answer as it may go on; None: it can't be read, so the field is left out.

    `name` in lower case; every other field's value stays as it is. A date becomes seconds from `now_unix`, rounded up.
    """
    if name == SECONDS:
        wait = _seconds(value.decode("latin-1").strip(), now_unix)
        return None if wait is None else b"%d" % min(math.ceil(wait), seconds_max)
    if name == MILLISECONDS:
        found = _number(value.decode("latin-1").strip())
        return None if found is None else b"%d" % min(math.ceil(float(found[0])), seconds_max * 1000)
    return value


def wait_s_in(headers: Iterable[tuple[bytes, bytes]], seconds_max: float, now_unix: float) -> int | None:
    """The wait that an answer with these fields asks for: whole seconds, rounded up, at most `seconds_max`.

    None if no field says it in a form that can be read. Milliseconds come first, as the SDKs read them.
    """
    waits = [(name, bounded(name, value, seconds_max, now_unix)) for name, value in headers]
    found = {name: int(value) for name, value in waits if name in (SECONDS, MILLISECONDS) and value is not None}
    return -(-found[MILLISECONDS] // 1000) if MILLISECONDS in found else found.get(SECONDS)


def _seconds(text: str, now_unix: float) -> float | None:
    if _number(text):
        return float(text)
    try:
        when = parsedate_to_datetime(text)
        if when.tzinfo is None:  # asctime's form, always in UTC (RFC 9110 5.6.7)
            when = when.replace(tzinfo=datetime.UTC)
        return max(0.0, when.timestamp() - now_unix)
    except (ValueError, OverflowError, OSError):
        return None
