"""Google's Gemini API: `/v1beta/models/{model}:streamGenerateContent`, as generativelanguage.googleapis.com has it.

The path names the model and the operation. With `alt=sse` the answer is a stream, without it a JSON array that passes
unchanged. Complete when every candidate that appeared has its finishReason, or when the prompt was blocked: there is no
last event.

The SDKs (google-genai 1.0 to 3.6 was read) parse as JSON each line that isn't blank and doesn't begin with `data: `: an
id, a comment, an event's type or a `retry:` raises. Some parsers in other languages want `data: ` at the very
beginning. So an answer has data lines and nothing else (`data_only`), and so do streamd's own events in it. An error
raises if its object is the event's first member. A gap is an event without candidates, like events with usage alone.

Each event repeats the usage. Its numbers grow: they are holes of a template, and when neighbours are merged the last
numbers stand. A part with `thought` is another text than a part without; a function call, a signature, and several
parts in an event are kept unmerged.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar, Final
from urllib.parse import quote, unquote

from streamd.wire.dialects.api import Api, NamedEvent, Part, Progress, google_tokens_of
from streamd.wire.dialects.failure import Failure
from streamd.wire.dialects.members import (
    Json,
    Usage,
    clean,
    is_text,
    object_of,
    objects_of,
    string_of,
)
from streamd.wire.dialects.merging import Merge, Merging, merges
from streamd.wire.json_scan import Watched
from streamd.wire.query import parameter

# The path below the version, decoded: a resource, `models/{id}` or `tunedModels/{id}`, and an operation.
_RESOURCE: Final = re.compile(r"/(v1beta|v1)/((?:models|tunedModels)/[^:/]+)(?::([A-Za-z]+))?")
# Paths that OpenAI's API has as well, decoded.
_SHARED: Final = re.compile(r"/v1/(?:models|tunedModels)(?:/[^:/]+)?")
# The header field in which Google's SDKs name themselves.
_CLIENT_FIELD: Final = b"x-goog-api-client"
_STREAM: Final = "streamGenerateContent"
_OPERATIONS: Final = frozenset({_STREAM, "generateContent", "countTokens", "embedContent", "batchEmbedContents"})
# google.rpc.Code by HTTP status; all other statuses are UNKNOWN.
_CODES: Final = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ABORTED",
    413: "INVALID_ARGUMENT",
    422: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_PART: Final = "candidates[].content.parts[]."
_MERGING: Final = Merging(
    {
        "usageMetadata": Merge.COUNT,
        "modelVersion": Merge.EQUAL,
        "responseId": Merge.EQUAL,
        "createTime": Merge.EQUAL,
        "candidates[].index": Merge.EQUAL,
        "candidates[].finishReason": Merge.EQUAL,  # while it says nothing
        "candidates[].safetyRatings": Merge.EQUAL,
        "candidates[].citationMetadata": Merge.APART,
        "candidates[].groundingMetadata": Merge.APART,
        "candidates[].logprobsResult": Merge.VARIED,
        "candidates[].content.role": Merge.EQUAL,
        _PART + "text": Merge.TEXT,
        _PART + "thought": Merge.EQUAL,
        _PART + "thoughtSignature": Merge.APART,
        _PART + "functionCall": Merge.APART,
    },
    listed="candidates",
)
_CANDIDATE_RULES: Final = _MERGING.at("candidates[]")
_CONTENT_RULES: Final = _MERGING.at("candidates[].content")
_PART_RULES: Final = _MERGING.at("candidates[].content.parts[]")
# The kind of an error's detail that says when to ask again (google/rpc/error_details.proto).
_RETRY_INFO: Final = "type.googleapis.com/google.rpc.RetryInfo"
# finishReason's value for "not finished"; servers leave it out.
_UNFINISHED: Final = "FINISH_REASON_UNSPECIFIED"


class Gemini(Api):
    """`/v1beta/…`, the same operations under `/v1/models/…`, and the list under `/v1` for Google's clients."""

    below: ClassVar = ("/v1beta/",)
    data_only: ClassVar = True
    key_field: ClassVar = b"x-goog-api-key"
    key_parameter: ClassVar = "key"
    reconnect_name: ClassVar = None
    text_keys: ClassVar = ("text",)
    listed: ClassVar = "candidates"
    merging: ClassVar = _MERGING
    # protobuf's JSON takes both spellings.
    watched: ClassVar = Watched(
        {
            "model": None,
            "stream": None,  # of OpenAI's API, below /v1beta/openai/
            "generateContentRequest": Watched({"model": None}),
            "generate_content_request": Watched({"model": None}),
            "requests": Watched(elements=Watched({"model": None})),
        }
    )
    counts: ClassVar = re.compile(
        rb'"(?:(?:candidates|thoughts|total)TokenCount|candidatesTokensDetails"\s*:\s*\[\s*\{[^][{}]*"tokenCount)"\s*:\s*'
    )

    # -- requests

    def serves(self, path: str) -> bool:
        if super().serves(path):
            return True
        found = _resource(path)
        return found is not None and found[3] in _OPERATIONS

    def claims(self, path: str, query: str, field: Callable[[bytes], bytes | None]) -> bool:
        """The list of models below /v1, and a model in it, if the client names Google's SDK or sends a key its way."""
        if _SHARED.fullmatch(unquote(path).rstrip("/")) is None:
            return False
        is_named = field(self.key_field) is not None or field(_CLIENT_FIELD) is not None
        return is_named or parameter(query, self.key_parameter) != ()

    def wants_stream(self, path: str, query: str, fields: Json) -> bool:
        found = _resource(path)
        is_sse = "sse" in (*parameter(query, "alt"), *parameter(query, "$alt"))
        return is_sse and found is not None and found[3] == _STREAM

    def models(self, path: str, fields: Json) -> list[str]:
        """The model in the path, and those in the body, which the servers require to be the same."""
        found = _resource(path)
        inner = [object_of(fields, name) for name in ("generateContentRequest", "generate_content_request")]
        holders = (fields, *inner, *objects_of(fields, "requests"))
        in_body = [name for holder in holders if (name := string_of(holder, "model")) is not None]
        return [name.removeprefix("models/") for name in ([found[2], *in_body] if found else in_body)]

    def renamed(self, path: str, model: str, alias: str) -> tuple[str, dict[str, str]]:
        found = _resource(path)
        resource = alias if "/" in alias else f"models/{alias}"
        if found is not None:
            path = f"/{found[1]}/{quote(resource)}" + (f":{found[3]}" if found[3] else "")
        return path, {model: resource, f"models/{model}": resource}

    # -- lists of models

    list_query: ClassVar = "pageSize=1000"
    list_fields: ClassVar = ((_CLIENT_FIELD, b"streamd"),)

    list_member: ClassVar = "models"
    entry_name: ClassVar = "name"
    entry_prefix: ClassVar = "models/"

    def alias_listed(self, alias: str, entry: Json | None, owner: str) -> Json:
        return {**(entry or {}), "name": alias if "/" in alias else f"models/{alias}"}

    def model_list(self, entries: list[Json]) -> Json:
        """All entries on a single page."""
        return {"models": entries}

    # -- keys

    def credentials(self, key: bytes) -> list[tuple[bytes, bytes]]:
        """Google takes `Authorization` for an OAuth token and refuses an API key there."""
        return [(self.key_field, key)]

    # -- progress

    def see(self, progress: Progress, body: Json, name: str | None) -> None:
        candidates = objects_of(body, "candidates")
        for candidate in candidates:
            progress.see_choice(candidate.get("index", 0), _is_finish(candidate.get("finishReason")))
        if candidates:  # a blocked prompt's usage may come after the reason
            progress.weigh_choices()
        if is_text(object_of(body, "promptFeedback").get("blockReason")):
            progress.complete = True

    def texts(self, body: Json) -> list[str | None]:
        contents = [object_of(candidate, "content") for candidate in objects_of(body, "candidates")]
        return [string_of(part, "text") for content in contents for part in objects_of(content, "parts")]

    def usage(self, body: Json, before: Usage | None) -> Usage | None:
        """Google's, or OpenAI's below `/v1beta/openai/`."""
        return google_tokens_of(body, super().usage(body, before))

    # -- words

    def error(self, status: int, message: str, type: str, code: str, param: str | None) -> Json:
        metadata = {} if param is None else {"metadata": {"param": clean(param)}}
        info = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": code, "domain": "streamd"}
        word = _CODES.get(status, "UNKNOWN")
        return {"error": {"code": status, "message": clean(message), "status": word, "details": [info | metadata]}}

    def error_event(self, message: str, type: str, code: str, param: str | None) -> Json:
        status = 499 if code == "cancelled" else 504 if code.endswith("timeout") else 503
        return self.error(status, message, type, code, param)

    def failure_event(self, failure: Failure) -> Json:
        """Google's clients read the code as an HTTP status, look at the object's first member, and wait as long as a
        RetryInfo says.
        """
        status = failure.code if type(failure.code) is int else failure.status
        status = status if status >= 400 else 502
        code = failure.code if isinstance(failure.code, str) else ""
        own: Json = self.error(status, failure.message, failure.type, code, failure.param)["error"]
        named = {"type": failure.type} if failure.type else {}
        error: Json = own | named | failure.given | {"code": status, "message": failure.message}
        details = error["details"]
        if failure.wait_s is not None and isinstance(details, list) and not any(map(_is_wait, details)):
            error["details"] = [*details, {"@type": _RETRY_INFO, "retryDelay": f"{failure.wait_s}s"}]
        return {"error": error}

    def gap_event(self, progress: Progress, gap: bytes) -> tuple[str | None, bytes]:
        return None, b"{%b}" % gap

    # -- wholes

    def as_events(self, body: Json) -> list[NamedEvent] | None:
        """A whole answer has the form of an event."""
        is_answer = bool(objects_of(body, "candidates")) or "promptFeedback" in body or "usageMetadata" in body
        return [(None, body)] if is_answer else None

    # -- texts

    def parts(self, parsed: Json) -> list[Part] | None:
        candidates = parsed.get("candidates")
        if not isinstance(candidates, list):
            return None
        known = [part for candidate in candidates if (part := _part(candidate))]
        return known if len({part.index for part in known}) == len(candidates) else []


def _is_finish(reason: object) -> bool:
    """Whether a finishReason says that its candidate has ended."""
    return is_text(reason) and reason not in ("null", _UNFINISHED)


def _is_wait(detail: Any) -> bool:
    return isinstance(detail, dict) and detail.get("@type") == _RETRY_INFO


def _resource(path: str) -> re.Match[str] | None:
    """A path's version, resource and operation; a slash at its end changes nothing."""
    return _RESOURCE.fullmatch(unquote(path).rstrip("/"))


def _part(candidate: Any) -> Part | None:
    """The text of a candidate that adds a single part with nothing but text."""
    if not isinstance(candidate, dict) or _is_finish(candidate.get("finishReason")):
        return None
    index, content = candidate.get("index", 0), candidate.get("content")
    if type(index) is not int or not isinstance(content, dict):
        return None
    own = merges(candidate, _CANDIDATE_RULES)
    if own is None or not merges(content, _CONTENT_RULES):
        return None
    parts = content.get("parts")
    if not isinstance(parts, list) or len(parts) != 1 or not isinstance(parts[0], dict):
        return None
    part = parts[0]
    is_pure = is_text(part.get("text")) and merges(part, _PART_RULES) and type(part.get("thought", True)) is bool
    return Part(candidate, index, [(part, "text")], merges=own) if is_pure else None
