"""The answer to a request: path and body in; status, body and pace out. No sockets, no clocks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import orjson

from streamd.mockllm import ask, gemini
from streamd.mockllm.answer import Body
from streamd.mockllm.chat import MockChat, MockCompletion
from streamd.mockllm.embeddings import embeddings
from streamd.mockllm.faults import NO_FAULTS
from streamd.mockllm.messages import MockAnthropic
from streamd.mockllm.options import MockOptions
from streamd.mockllm.responses import MockResponses
from streamd.mockllm.script import Script
from streamd.mockllm.shape import Dressed, Plain, Whole
from streamd.wire.http1 import RequestHead, encode_response_head

SERVER: Final = b"mock-llm"
MODEL_CREATED: Final = 1_700_000_000  # Unix time; any time will do
RETRY_AFTER_S: Final = 7  # with 429 and 503: a number that no other program would choose
SCRIPTS: Final[dict[str, Callable[[ask.MockAsk], Script]]] = {
    "/v1/chat/completions": MockChat,
    "/v1/completions": MockCompletion,
    "/v1/responses": MockResponses,
    "/v1/messages": MockAnthropic,
}
ALLOWED: Final = dict.fromkeys((*SCRIPTS, "/v1/embeddings"), "POST") | dict.fromkeys(("/v1/models", "/health"), "GET")
ERROR_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer before it has a head."""

    status: int
    body: Body
    length: int | None  # of the body; None: not known before it is made
    is_stream: bool = False
    delay_s: float = 0.0  # until the first byte


def whole(status: int, payload: bytes, options: MockOptions, delay_s: float = 0.0) -> Reply:
    """An answer that is not streamed. Why halves only with faults: a real server sends it in a single write."""
    return Reply(status, Whole(payload, in_halves=options.faults != NO_FAULTS), len(payload), delay_s=delay_s)


def reply_to(head: RequestHead, body: bytes, options: MockOptions, serial: int) -> Reply:
    """The answer to a request; `serial` numbers the generation if it is one. Raises BadAsk."""
    path = head.path
    if gemini.serves(head):
        return _gemini(gemini.PATH.fullmatch(path), head, body, options, serial)
    allowed = ALLOWED.get(path)
    if options.faults.status is not None:
        return _told(path, options)
    if allowed is None:
        return _refusal(404, f"mock-llm has nothing at {path}.", path, options)
    if head.method != allowed and not (head.method == "HEAD" and allowed == "GET"):
        return _refusal(405, f"{path} takes {allowed}.", path, options)
    if path in SCRIPTS:
        return _generation(SCRIPTS[path], ask.parse(body, serial, options), options)
    if path == "/v1/embeddings":
        return whole(200, embeddings(body, options.models[0]), options)
    return whole(200, _models(options) if path == "/v1/models" else b'{"status":"ok"}', options)


def _told(path: str, options: MockOptions) -> Reply:
    status = options.faults.status or 500
    return _refusal(status, f"mock-llm was told to answer {status}.", path, options)


def _gemini(found: re.Match[str] | None, head: RequestHead, body: bytes, options: MockOptions, serial: int) -> Reply:
    """Google's API: what is asked for stands in the path behind the model."""
    path, operation = head.path, found[2] if found else None
    if options.faults.status is not None:
        return _told(path, options)
    if head.method != ("POST" if operation else "GET"):
        return _refusal(405, f"{path} takes {'POST' if operation else 'GET'}.", path, options)
    if found is None:
        return whole(200, orjson.dumps({"models": [gemini.model(name) for name in options.models]}), options)
    if operation is None:
        return whole(200, orjson.dumps(gemini.model(found[1].removeprefix("models/"))), options)
    if operation in gemini.ANSWERS:
        return whole(200, gemini.ANSWERS[operation](body), options)
    if operation not in gemini.GENERATIONS:
        return _refusal(404, f"mock-llm has nothing at {path}.", path, options)
    is_sse = operation == gemini.STREAM and "alt=sse" in head.query.split("&")
    asked = replace(ask.parse(body, serial, options), stream=is_sse, model=found[1].removeprefix("models/"))
    return _generation(gemini.MockGeminiArray if operation == gemini.STREAM else gemini.MockGemini, asked, options)


def _generation(dialect: Callable[[ask.MockAsk], Script], asked: ask.MockAsk, options: MockOptions) -> Reply:
    script = dialect(asked)
    if not asked.stream:
        return whole(200, script.whole(), options, options.ttft_s + asked.tokens * options.interval_s)
    if options.faults == NO_FAULTS:
        return Reply(200, Plain(script), None, is_stream=True, delay_s=options.ttft_s)
    dressed = Dressed(script, options.faults)
    length = dressed.length() if options.faults.content_length else None
    return Reply(200, dressed, length, is_stream=True, delay_s=options.ttft_s)


def _models(options: MockOptions) -> bytes:
    models = [
        {"id": name, "object": "model", "created": MODEL_CREATED, "owned_by": "mock-llm"} for name in options.models
    ]
    return orjson.dumps({"object": "list", "data": models})


def _refusal(status: int, text: str, path: str, options: MockOptions) -> Reply:
    return whole(status, error_body(status, text, path), options)


def error_body(status: int, text: str, path: str, param: str | None = None) -> bytes:
    """The error object of the route's dialect."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    if gemini.is_own(path):
        word = gemini.STATUSES.get(status, "INTERNAL")
        return orjson.dumps({"error": {"code": status, "message": text, "status": word}})
    error: dict[str, Any] = {"type": kind, "message": text}
    if path == "/v1/messages":
        return orjson.dumps({"type": "error", "error": error})
    return orjson.dumps({"error": error | {"param": param, "code": None}})


@dataclass(frozen=True, slots=True)
class Opening:
    """An answer's head, and the framing that it announces."""

    wire: bytes
    is_chunked: bool
    keeps: bool  # the connection outlives the answer


def opening(reply: Reply, head: RequestHead, options: MockOptions, request_id: int) -> Opening:
    """The response head for a reply to `head`."""
    faults = options.faults
    until_close = reply.is_stream and reply.length is None and (faults.until_close or head.http10)
    is_chunked = not until_close and not head.http10 and (reply.length is None or faults.bad_chunk is not None)
    keeps = head.keep_alive and not until_close
    fields = [
        (b"server", SERVER),
        (b"x-request-id", b"req_mock_%06d" % request_id),
        (b"content-type", b"text/event-stream; charset=utf-8" if reply.is_stream else b"application/json"),
    ]
    if reply.is_stream:
        fields.append((b"cache-control", b"no-cache"))
    if reply.status in (429, 503):
        fields.append((b"retry-after", b"%d" % RETRY_AFTER_S))
    if is_chunked:
        fields.append((b"transfer-encoding", b"chunked"))
    elif reply.length is not None:
        fields.append((b"content-length", b"%d" % reply.length))
    if not keeps:
        fields.append((b"connection", b"close"))
    wire = encode_response_head(reply.status, fields)
    return Opening(wire, is_chunked and head.method != "HEAD", keeps)
