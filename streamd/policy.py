"""Policy: the treatment of a reader that is too slow, as settings, requests and core/stream.py name it."""

from __future__ import annotations

from typing import Final

from streamd.choice import Choice


class Policy(Choice):
    """The action on a subscriber with a full ring."""

    COALESCE = "coalesce"  # let the ring go, catch up from the log in few large events
    DROP_OLDEST = "drop_oldest"  # skip the oldest events, and announce the gap
    CLOSE = "close"  # end the connection


# For the settings' reference. A policy without a text fails at start, where the table of settings is made.
_TREATMENTS: Final = {
    Policy.COALESCE: "catch up in few large events",
    Policy.DROP_OLDEST: "skip and announce the gap",
    Policy.CLOSE: "close",
}


def treatments() -> str:
    """The treatments, in the order of the policies, as a sentence lists them."""
    *others, last = (_TREATMENTS[policy] for policy in Policy)
    return f"{', '.join(others)}, or {last}"
