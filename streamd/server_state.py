"""Server state: how an inference server stands by its last answers and failures, in a worker's view or the daemon's.

    up        its last answer was good, or it hasn't been asked yet
    failing   requests have failed since its last good answer, too few or too much alike to leave it out
    out       left out: requests go elsewhere, if there is another server
    probing   the time for which it was left out is over: the next request finds out, or is on its way

A worker judges by its own requests (core/health.py). The parent makes the daemon's view of all of these
(daemon/outages.py), so this module imports nothing of the data path.
"""

from __future__ import annotations

from typing import NamedTuple

from streamd.choice import Choice


class ServerState(Choice):
    """The state of a server; the module's docstring explains each."""

    UP = "up"
    FAILING = "failing"
    OUT = "out"
    PROBING = "probing"

    @property
    def is_down(self) -> bool:
        """Whether requests go elsewhere, but for a probe."""
        return self is ServerState.OUT or self is ServerState.PROBING


class ServerView(NamedTuple):
    """A server's state and the evidence for it. Times are monotonic seconds, which all processes share."""

    state: ServerState = ServerState.UP
    judged_at: float = 0.0  # time of the last good answer or failure; 0: not asked yet
    since: float = 0.0  # when the server came up, began to fail, or went out; 0: it has been up from the start
    failures: int = 0  # in a row, since the last good answer
    reason: str = ""  # of the last failure, a CloseReason's word; kept when the server is up again
    error: str = ""  # of the last failure, for people
    listed: tuple[str, ...] = ()  # models that it has listed, LISTED_MAX at most


# Models of a server that are named when they are lost; the models of the settings are named in any case. A server that
# runs models itself has a few; a list of hundreds is that of a service. The longest name: Hugging Face's have 96
# characters at most.
LISTED_MAX = 100
MODEL_CHARS_MAX = 128

# Longest text of an error: "no connection within connect_timeout" is 37 characters.
ERROR_CHARS_MAX = 200
