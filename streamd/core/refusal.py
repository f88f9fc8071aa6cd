"""Refusal: streamd's own negative answer, from admission, rights and limits to the wire.

The core states the reason and whether to ask again. The seconds of a Retry-After are drawn in a single place, where the
answer is written (net/runtime.py), so that nothing here needs a clock or a random number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from streamd.choice import Choice
from streamd.reasons import CloseReason

# RFC 9110 15.5.2: a 401 carries a challenge. `Bearer` makes no browser ask for a password.
CHALLENGE: Final = b'Bearer realm="streamd"'
# The challenge for a credential that was present and invalid (RFC 6750 3.1).
CHALLENGE_INVALID: Final = b'Bearer realm="streamd", error="invalid_token"'


class Retry(Choice):
    """Whether it helps to send the same request again."""

    NEVER = "never"  # it would be refused again, or its Retry-After is known exactly
    SOON = "soon"  # a restart, a worker or an upstream is in the way
    WITH_ROOM = "with_room"  # other streams or connections have to leave first


@dataclass(frozen=True, slots=True)
class Refusal:
    """The reason (log word, metric label and status in one), and the text that the client reads."""

    reason: CloseReason
    code: str  # the `code` of the error object
    message: str  # says what to change; never holds a credential or part of it
    retry_after_s: float = 0.0  # where it is known exactly; at most RETRY_AFTER_S_MAX of `limits`
    retry: Retry = Retry.NEVER

    @property
    def status(self) -> int:
        """The HTTP status before the first byte."""
        return self.reason.status

    @property
    def challenge(self) -> bytes | None:
        """The value of WWW-Authenticate; None for any status but 401."""
        if self.status != 401:
            return None
        return CHALLENGE if self.code.endswith("_required") else CHALLENGE_INVALID
