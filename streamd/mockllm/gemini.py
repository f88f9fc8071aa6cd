"""Google's Gemini API, as scripts: one for a stream of events, one for a JSON array; and what else the SDK asks for.

Line ends of events are CRLF, as Google's servers write them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import orjson

from streamd.mockllm.ask import PROMPT_BYTES_PER_TOKEN, BadAsk, MockAsk, json_object
from streamd.mockllm.embeddings import vector_of
from streamd.mockllm.script import MARK, around
from streamd.wire.http1 import RequestHead

# /v1beta/models/{model}:{operation}, and the same below /v1. A GET of a model, or of the list, has no operation.
PATH: Final = re.compile(r"/v1(?:beta)?/((?:models|tunedModels)/[^:/]+)(?::([A-Za-z]+))?")
LIST: Final = re.compile(r"/v1(?:beta)?/models")
CLIENT_FIELDS: Final = (b"x-goog-api-client", b"x-goog-api-key")
STREAM: Final = "streamGenerateContent"
GENERATIONS: Final = (STREAM, "generateContent")
STATUSES: Final = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
}
_COUNT: Final = 987654321  # stands for a number in a pattern


class MockGemini:
    """`:streamGenerateContent?alt=sse` and `:generateContent`."""

    __slots__ = ("_ask",)

    def __init__(self, ask: MockAsk) -> None:
        self._ask = ask

    def _payload(self, parts: list[dict[str, Any]], tokens: int, reason: str = "", candidate: int = 0) -> Any:
        ask = self._ask
        content: dict[str, Any] = {"content": {"parts": parts, "role": "model"}}
        if reason:
            content["finishReason"] = reason
        usage = {
            "promptTokenCount": ask.prompt_tokens,
            "candidatesTokenCount": tokens,
            "totalTokenCount": ask.prompt_tokens + tokens if tokens != _COUNT else _COUNT + 1,
            "promptTokensDetails": [{"modality": "TEXT", "tokenCount": ask.prompt_tokens}],
        }
        return {
            "candidates": [content | {"index": candidate}],
            "usageMetadata": usage,
            "modelVersion": ask.model,
            "responseId": f"mock{ask.serial:06d}",
        }

    def preamble(self) -> bytes:
        return b""

    def tokens(self) -> Iterator[bytes]:
        """Usage grows with each token, as Google's does. A function call is one event."""
        if self._ask.tool is not None:
            yield _event(self._payload(self._called(), self._ask.completion_tokens))
            return
        patterns = [
            around(_event(self._payload([{"text": MARK}], _COUNT, candidate=c)), MARK.encode())
            for c in range(self._ask.choices)
        ]
        numbers = (b"%d" % _COUNT, b"%d" % (_COUNT + 1))
        together = zip(*(self._ask.pieces(c) for c in range(self._ask.choices)), strict=True)
        for count, pieces in enumerate(together, 1):
            counts = (b"%d" % count, b"%d" % (self._ask.prompt_tokens + count))
            yield b"".join(
                before + piece + after.replace(numbers[1], counts[1]).replace(numbers[0], counts[0])
                for (before, after), piece in zip(patterns, pieces, strict=True)
            )

    def _called(self) -> list[dict[str, Any]]:
        tool = self._ask.tool
        assert tool is not None
        return [{"functionCall": {"name": tool.name, "args": orjson.loads(tool.arguments)}}]

    def _reason(self) -> str:
        return "MAX_TOKENS" if self._ask.cut else "STOP"

    def finish(self) -> bytes:
        total = self._ask.completion_tokens
        ends = [self._payload([{"text": ""}], total, self._reason(), c) for c in range(self._ask.choices)]
        return b"".join(map(_event, ends))

    def terminal(self) -> bytes:
        """There is no last event."""
        return b""

    def whole(self) -> bytes:
        ask = self._ask
        said = [[{"text": ask.text(c)}] if ask.tool is None else self._called() for c in range(ask.choices)]
        answers = [self._payload(parts, ask.completion_tokens, self._reason(), c) for c, parts in enumerate(said)]
        candidates = [answer["candidates"][0] for answer in answers]
        return orjson.dumps(answers[0] | {"candidates": candidates})


class MockGeminiArray(MockGemini):
    """`:streamGenerateContent` without `alt=sse`: the events as one JSON array."""

    __slots__ = ()

    def whole(self) -> bytes:
        events = b"".join((*self.tokens(), self.finish())).split(b"\r\n\r\n")
        return b"[" + b",\r\n".join(event.removeprefix(b"data: ") for event in events if event) + b"]"


def _event(payload: Any) -> bytes:
    return b"data: %b\r\n\r\n" % orjson.dumps(payload)


def is_own(path: str) -> bool:
    """Whether a path is this API's alone: OpenAI's has the list and the models below /v1 as well."""
    found = PATH.fullmatch(path) or LIST.fullmatch(path)
    return found is not None and (path.startswith("/v1beta/") or ":" in path)


def serves(head: RequestHead) -> bool:
    """Whether a request is for this API; on a path that OpenAI's has too, if a client of Google's sends it."""
    shared = PATH.fullmatch(head.path) or LIST.fullmatch(head.path)
    return is_own(head.path) or bool(shared and any(head.get(field) is not None for field in CLIENT_FIELDS))


def counted(body: bytes) -> bytes:
    """The answer to `:countTokens`. Raises BadAsk."""
    return orjson.dumps({"totalTokens": len(orjson.dumps(_contents(json_object(body)))) // PROMPT_BYTES_PER_TOKEN + 1})


def embedded(body: bytes) -> bytes:
    """The answer to `:embedContent`. Raises BadAsk."""
    return orjson.dumps({"embedding": _embedding(json_object(body))})


def embedded_batch(body: bytes) -> bytes:
    """The answer to `:batchEmbedContents`. Raises BadAsk."""
    requests = json_object(body).get("requests")
    if not isinstance(requests, list) or not requests:
        raise BadAsk("`requests` has to be a list with something in it.", "requests")
    return orjson.dumps({"embeddings": [_embedding(request) for request in requests]})


def _embedding(asked: Any) -> dict[str, Any]:
    return {"values": vector_of(orjson.dumps(_contents(asked)))}


def _contents(asked: Any) -> Any:
    contents = asked.get("contents") or asked.get("content") if isinstance(asked, dict) else None
    if not contents:
        raise BadAsk("Missing the prompt: send `contents`.", "contents")
    return contents


def model(name: str) -> dict[str, Any]:
    """A model as the list shows it."""
    return {"name": f"models/{name}", "version": "001", "displayName": name, "inputTokenLimit": 1_048_576}


ANSWERS: Final = {"countTokens": counted, "embedContent": embedded, "batchEmbedContents": embedded_batch}
