"""Vary (RFC 9110 12.5.5): the request's fields, beside Origin, that choose among the answers at an address.

A cache in front that kept an answer all the same would otherwise give the JSON state of a stream to a reader of its
events, or OpenAI's list of models to Google's SDK.
"""

from __future__ import annotations

from typing import Final

from streamd.wire.dialect import Dialect

_ACCEPT: Final = (b"vary", b"Accept")
# Streams and their state, and the refusals that an EventSource gets as a stream; llama.cpp's way to them.
_STREAMS: Final = "/v1/stream"
_RESPONSES: Final = "/v1/responses/"
_MODELS: Final = ("/v1/models", "/v1beta/models")
_RESUMING: Final = (b"vary", b"Accept, Last-Event-ID")
_LISTING: Final = (b"vary", b"x-goog-api-key, x-goog-api-client")


def of(path: str, dialect: Dialect) -> list[tuple[bytes, bytes]]:
    """The field for an answer at a path; none where no field of the request chooses."""
    if path.startswith(_STREAMS):
        return [_ACCEPT]
    if path.startswith(_RESPONSES):
        return [_RESUMING]
    if path.startswith(_MODELS) and ":" not in path:
        return [_LISTING]
    return [_ACCEPT] if dialect.api.data_only else []
