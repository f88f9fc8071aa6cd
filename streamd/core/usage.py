"""UsageTail: the token count of an answer that is not a stream, read from its last bytes as they pass.

A stream's text events are counted as they come (core/limits.py). Of a whole JSON answer only the end is searched, where
servers write `usage`; the answer is neither parsed nor held up. A text inside the answer can't pass as the number: in a
JSON string the quote behind the name would have a backslash in front of it.
"""

from __future__ import annotations

from streamd.core.limits import Account
from streamd.wire.dialects.api import Api

# After `usage` come a fingerprint, a service tier, and in /v1/responses up to 16 pairs of metadata of 600 B: 9.6 KB.
TAIL_BYTES = 12 * 1024


class UsageTail:
    """The end of an answer, for the account of a key."""

    __slots__ = ("_account", "_api", "_tail")

    def __init__(self, account: Account, api: Api) -> None:
        self._account = account
        self._api = api  # it knows its servers' names for the count
        self._tail = b""

    def passed(self, piece: bytes) -> None:
        """The next bytes of the answer."""
        self._tail = (self._tail + piece[-TAIL_BYTES:])[-TAIL_BYTES:]

    def over(self) -> None:
        """The answer is over: charge the count it states, or nothing if it states none or broke off before."""
        tokens = self._api.output_tokens(self._tail)
        self._tail = b""
        if tokens is not None:
            self._account.correct(0, tokens)
