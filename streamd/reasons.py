"""CloseReason: every way in which a request, a reader or a stream can end, once, for logs, metrics and tests alike.

A row has three columns: the word (log field and metric label), the HTTP status for an end before the first byte of an
answer (0: no status is possible any more, or none is owed), and the party that ended it. That party decides about the
generation (docs/PROTOCOL.md, section 4): a reader that left by itself cancels it; a reader that streamd or the network
cut leaves it a grace.
"""

from __future__ import annotations

from streamd.choice import Choice


class By(Choice):
    """The party that ended a request, a reader or a stream."""

    READER = "reader"
    STREAMD = "streamd"
    NETWORK = "network"
    UPSTREAM = "upstream"
    OPERATOR = "operator"


class CloseReason(Choice):
    """The closed list of ends. Members carry (word, status, by)."""

    # Ends without a fault.
    COMPLETE = ("complete", 0, By.UPSTREAM)
    SEALED = ("sealed", 0, By.UPSTREAM)  # the end of a published stream
    MOVED = ("moved", 0, By.STREAMD)  # handed to another process
    IDLE = ("idle", 0, By.STREAMD)  # kept-alive connection without a request

    # Ends of a reader's connection.
    READER_GONE = ("reader_gone", 0, By.READER)  # FIN or RST
    NETWORK_LOST = ("network_lost", 0, By.NETWORK)  # ETIMEDOUT and its like
    SLOW_CONSUMER = ("slow_consumer", 0, By.STREAMD)  # policy `close`
    STALLED = ("stalled", 0, By.STREAMD)  # took nothing for stall_timeout
    PIPELINE_FULL = ("pipeline_full", 0, By.STREAMD)  # sent too much behind a running answer
    TLS_FAILED = ("tls_failed", 0, By.READER)  # no handshake, or a broken record
    PROXY_HEADER = ("proxy_header", 0, By.READER)  # a trusted proxy that sent no PROXY v2 header

    # Ends of a request.
    BAD_REQUEST = ("bad_request", 400, By.READER)
    HEAD_TIMEOUT = ("head_timeout", 408, By.READER)
    BODY_TIMEOUT = ("body_timeout", 408, By.READER)
    BODY_TOO_LARGE = ("body_too_large", 413, By.READER)
    UNAUTHORIZED = ("unauthorized", 401, By.READER)
    FORBIDDEN = ("forbidden", 403, By.READER)
    NOT_FOUND = ("not_found", 404, By.READER)
    RATE_LIMITED = ("rate_limited", 429, By.STREAMD)
    OVER_BUDGET = ("over_budget", 503, By.STREAMD)
    DRAINING = ("draining", 503, By.STREAMD)
    TOKEN_EXPIRED = ("token_expired", 401, By.STREAMD)

    # Ends of a stream.
    CANCELLED = ("cancelled", 0, By.OPERATOR)  # DELETE
    ABANDONED = ("abandoned", 0, By.STREAMD)  # no reader came back within the grace
    PUBLISHER_GONE = ("publisher_gone", 0, By.UPSTREAM)
    FAILED = ("failed", 0, By.UPSTREAM)  # the publisher said so
    RESTARTED = ("restarted", 0, By.OPERATOR)  # cut by a restart
    NODE_LOST = ("node_lost", 0, By.NETWORK)  # the node that carried it is gone, as another node declared
    ENGINE_UNREACHABLE = ("engine_unreachable", 503, By.STREAMD)  # it can't be told whether another node has it

    # Failures of an upstream.
    UPSTREAM_CONNECT = ("upstream_connect", 502, By.UPSTREAM)
    UPSTREAM_RESET = ("upstream_reset", 502, By.UPSTREAM)  # before the head
    UPSTREAM_PROTOCOL = ("upstream_protocol", 502, By.UPSTREAM)
    UPSTREAM_TTFT_TIMEOUT = ("upstream_ttft_timeout", 504, By.UPSTREAM)
    UPSTREAM_IDLE_TIMEOUT = ("upstream_idle_timeout", 504, By.UPSTREAM)
    UPSTREAM_STREAM_TIMEOUT = ("upstream_stream_timeout", 504, By.UPSTREAM)
    UPSTREAM_TRUNCATED = ("upstream_truncated", 502, By.UPSTREAM)
    UPSTREAM_REFUSED = ("upstream_refused", 502, By.UPSTREAM)  # an error status after the commit
    UPSTREAM_ERROR = ("upstream_error", 502, By.UPSTREAM)  # its own error event in the middle of an answer
    EVENT_TOO_LARGE = ("event_too_large", 502, By.UPSTREAM)
    NO_UPSTREAM = ("no_upstream", 503, By.STREAMD)

    # Bugs of streamd.
    INTERNAL = ("internal", 500, By.STREAMD)

    def __init__(self, word: str, status: int, by: By) -> None:
        self.word = word
        self.status = status
        self.by = by
