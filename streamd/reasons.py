"""CloseReason: every way in which a request, a reader or a stream can end, once, for logs, metrics and tests alike.

A row says four things: the word (log field and metric label), the HTTP status that a reader gets when it happens
before the first byte of an answer (0: none is possible any more, or none is owed), whether a client may resume or try
again, and who ended it. "Who closed decides" (docs/PROTOCOL.md, section 4): a reader that left by itself cancels its
generation, one that streamd or the network cut leaves it a grace.
"""

from __future__ import annotations

from streamd.choice import Choice


class By(Choice):
    """Who ended it."""

    READER = "reader"
    STREAMD = "streamd"
    NETWORK = "network"
    UPSTREAM = "upstream"
    OPERATOR = "operator"


class CloseReason(Choice):
    """The closed list of ends. Members carry (word, status, may_resume, by)."""

    # An end that is no fault of anybody.
    COMPLETE = ("complete", 0, False, By.UPSTREAM)
    SEALED = ("sealed", 0, False, By.UPSTREAM)  # the end of a published stream
    MOVED = ("moved", 0, True, By.STREAMD)  # handed to another process
    IDLE = ("idle", 0, False, By.STREAMD)  # kept-alive connection without a request

    # The reader's doing.
    READER_GONE = ("reader_gone", 0, True, By.READER)  # FIN or RST
    NETWORK_LOST = ("network_lost", 0, True, By.NETWORK)  # ETIMEDOUT and its like
    SLOW_CONSUMER = ("slow_consumer", 0, True, By.STREAMD)  # policy `close`
    STALLED = ("stalled", 0, True, By.STREAMD)  # took nothing for stall_timeout
    PIPELINE_FULL = ("pipeline_full", 0, True, By.STREAMD)  # sent too much behind a running answer
    TLS_FAILED = ("tls_failed", 0, False, By.READER)  # no handshake, or a record that isn't right
    PROXY_HEADER = ("proxy_header", 0, False, By.READER)  # a trusted proxy that sent no PROXY v2 header

    # The request's.
    BAD_REQUEST = ("bad_request", 400, False, By.READER)
    HEAD_TIMEOUT = ("head_timeout", 408, True, By.READER)
    BODY_TIMEOUT = ("body_timeout", 408, True, By.READER)
    BODY_TOO_LARGE = ("body_too_large", 413, False, By.READER)
    UNAUTHORIZED = ("unauthorized", 401, False, By.READER)
    FORBIDDEN = ("forbidden", 403, False, By.READER)
    NOT_FOUND = ("not_found", 404, False, By.READER)
    RATE_LIMITED = ("rate_limited", 429, True, By.STREAMD)
    OVER_BUDGET = ("over_budget", 503, True, By.STREAMD)
    DRAINING = ("draining", 503, True, By.STREAMD)
    TOKEN_EXPIRED = ("token_expired", 401, False, By.STREAMD)

    # The stream's.
    CANCELLED = ("cancelled", 0, False, By.OPERATOR)  # DELETE
    ABANDONED = ("abandoned", 0, False, By.STREAMD)  # no reader came back within the grace
    PUBLISHER_GONE = ("publisher_gone", 0, False, By.UPSTREAM)
    FAILED = ("failed", 0, False, By.UPSTREAM)  # the publisher said so
    RESTARTED = ("restarted", 0, False, By.OPERATOR)  # cut by a restart

    # The upstream's.
    UPSTREAM_CONNECT = ("upstream_connect", 502, True, By.UPSTREAM)
    UPSTREAM_RESET = ("upstream_reset", 502, False, By.UPSTREAM)  # before the head
    UPSTREAM_PROTOCOL = ("upstream_protocol", 502, False, By.UPSTREAM)
    UPSTREAM_TTFT_TIMEOUT = ("upstream_ttft_timeout", 504, False, By.UPSTREAM)
    UPSTREAM_IDLE_TIMEOUT = ("upstream_idle_timeout", 504, False, By.UPSTREAM)
    UPSTREAM_STREAM_TIMEOUT = ("upstream_stream_timeout", 504, False, By.UPSTREAM)
    UPSTREAM_TRUNCATED = ("upstream_truncated", 502, False, By.UPSTREAM)
    UPSTREAM_REFUSED = ("upstream_refused", 502, False, By.UPSTREAM)  # an error status after the commit
    EVENT_TOO_LARGE = ("event_too_large", 502, False, By.UPSTREAM)
    NO_UPSTREAM = ("no_upstream", 503, True, By.STREAMD)

    # Ours.
    INTERNAL = ("internal", 500, False, By.STREAMD)

    def __init__(self, word: str, status: int, may_resume: bool, by: By) -> None:
        self.word = word
        self.status = status
        self.may_resume = may_resume
        self.by = by
