"""Policy: the treatment of a reader that is too slow, as settings, requests and core/stream.py name it."""

from __future__ import annotations

from streamd.choice import Choice


class Policy(Choice):
    """The action on a subscriber with a full ring."""

    COALESCE = "coalesce"  # let the ring go, catch up from the log in few large events
    DROP_OLDEST = "drop_oldest"  # skip the oldest events, and announce the gap
    CLOSE = "close"  # end the connection
