"""HttpError: a request that streamd itself answers with an error.

Raised anywhere between a request's head and its answer's first byte. The connection turns it into the error object of
the route's dialect, with status, Retry-After and x-should-retry. After the first byte an error is an event in the
stream instead.
"""

from __future__ import annotations

from streamd.reasons import CloseReason
from streamd.wire.json_scan import JsonError

# Longest name of a coding that an error repeats: those that are registered have 13 characters at most.
CODING_CHARS_MAX = 50

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    429: "rate_limit_error",
    502: "upstream_error",
    503: "overloaded_error",
    504: "upstream_error",
}


class HttpError(Exception):
    """`message` tells the client the error and the remedy; `code` is the word that programs compare."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        reason: CloseReason = CloseReason.BAD_REQUEST,
        param: str | None = None,
        retry_after_s: float | None = None,
        should_retry: bool | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        close: bool = False,
        last_seq: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.type = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.reason = reason
        self.param = param
        self.retry_after_s = retry_after_s
        self.should_retry = should_retry  # the SDKs obey x-should-retry, and without it retry by themselves
        self.headers = headers
        self.last_seq = last_seq  # the stream's last seq, for a publisher's exact retry
        self.close = close  # the connection's further bytes can't be understood, or aren't wanted

    def response_headers(self) -> list[tuple[bytes, bytes]]:
        """The headers of this error, in addition to those of every answer."""
        headers = list(self.headers)
        if self.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % max(1, round(self.retry_after_s))))
        if self.should_retry is not None:
            headers.append((b"x-should-retry", b"true" if self.should_retry else b"false"))
        return headers


def bad_json(error: JsonError) -> HttpError:
    """400 for a body whose JSON isn't taken."""
    return HttpError(400, str(error), code=error.code, param=error.param)


def unsupported_encoding(coding: bytes) -> HttpError:
    """415 for a body in a Content-Encoding that would have to be undone here."""
    shown = coding.strip().lower()[:CODING_CHARS_MAX].decode("latin-1")
    return HttpError(
        415,
        f"This body has to be read here, and its Content-Encoding is {shown!r}: send it without an encoding.",
        code="unsupported_encoding",
        param="content-encoding",
        headers=((b"accept-encoding", b"identity"),),
    )


def not_found(path: str) -> HttpError:
    """404 for a path without a route."""
    return HttpError(
        404,
        f"There is nothing at {path}. The API is under /v1/; /healthz, /readyz and /metrics are here too.",
        code="not_found",
        reason=CloseReason.NOT_FOUND,
    )


def stream_not_found(retention_s: float) -> HttpError:
    """404 for a stream that isn't here; for clients without the right to read it, also if it is."""
    text = f"There is no such stream, or it ended more than {retention_s:g} s ago (retention)."
    return HttpError(404, text, code="stream_not_found", reason=CloseReason.NOT_FOUND)


def method_not_allowed(path: str, allowed: tuple[str, ...]) -> HttpError:
    """405 with Allow (RFC 9110 15.5.6)."""
    return HttpError(
        405,
        f"{path} takes {', '.join(allowed)}.",
        code="method_not_allowed",
        headers=((b"allow", ", ".join(allowed).encode()),),
    )
