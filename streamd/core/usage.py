"""UsageTail: the tokens of an answer that is no stream, taken from its last bytes as it passes.

A stream's text events are counted as they come (core/limits.py). Of a whole JSON answer only the end is looked at,
where servers write `usage`; it isn't parsed, and isn't held up. A text inside the answer can't pass as the number: in
a JSON string the quote behind the name would have a backslash in front of it.
"""

from __future__ import annotations

from streamd.core.limits import Account
from streamd.wire.dialects.api import Api

# Behind `usage` stand a fingerprint, a service tier, of /v1/responses up to 16 pairs of metadata of 600 B.
TAIL_BYTES = 12 * 1024


class UsageTail:
    """The end of one answer, for one key's account."""

    __slots__ = ("_account", "_api", "_tail")

    def __init__(self, account: Account, api: Api) -> None:
        self._account = account
        self._api = api  # it knows under which names its servers count
        self._tail = b""

    def passed(self, piece: bytes) -> None:
        """The next bytes of the answer."""
        self._tail = (self._tail + piece[-TAIL_BYTES:])[-TAIL_BYTES:]

    def over(self) -> None:
        """The answer is over: charge what it says of itself, nothing if it doesn't or broke off before."""
        tokens = self._api.output_tokens(self._tail)
        self._tail = b""
        if tokens is not None:
            self._account.correct(0, tokens)
