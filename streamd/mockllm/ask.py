"""The content of a request, in terms that all dialects share: number of tokens, text, choices, and the tool to call."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from streamd.mockllm import text
from streamd.mockllm.options import MockOptions

CHOICES_MAX: Final = 128  # OpenAI's bound of `n`
# Deeper schemas get null: an example call needs no more, and a recursive $ref would never end.
SCHEMA_DEPTH_MAX: Final = 8
ARGUMENT_PIECE_CHARS: Final = 6  # about the length of a token of JSON
PROMPT_BYTES_PER_TOKEN: Final = 4  # the usual rule of thumb for English

# Where each dialect keeps its prompt and its bound on the answer's length.
PROMPT_KEYS: Final = ("messages", "input", "prompt", "contents")
LENGTH_KEYS: Final = ("max_completion_tokens", "max_output_tokens", "max_tokens", "maxOutputTokens")


class BadAsk(ValueError):
    """The request can't be answered. The text gives the allowed values, `param` names the wrong member."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class Tool:
    """The single call that the mock makes: a tool of the request, with arguments made up from its schema."""

    name: str
    arguments: str  # JSON


@dataclass(frozen=True, slots=True)
class MockAsk:
    """The generation that a request asks for."""

    serial: int  # number of the generation on this server, which the ids contain
    created: int  # Unix time, seconds
    model: str
    stream: bool
    choices: int
    tokens: int  # of each choice
    cut: bool  # the request's own limit ended the text: finish_reason `length`
    seed: int
    prompt_tokens: int
    include_usage: bool
    stamped: bool
    tool: Tool | None

    def pieces(self, choice: int = 0) -> Iterator[bytes]:
        """The tokens of a choice, each as the inside of a JSON string."""
        if self.tool is not None:
            return text.pieces(self.tool.arguments, ARGUMENT_PIECE_CHARS)
        if self.stamped:
            return text.stamps(self.tokens)
        return text.tokens(self._seed_of(choice), self.tokens)

    def text(self, choice: int = 0) -> str:
        """The whole text of a choice. Stamped tokens have no such text: it is not known before it is sent."""
        return text.text(self._seed_of(choice), self.tokens)

    def _seed_of(self, choice: int) -> int:
        return self.seed + 7919 * choice

    @property
    def completion_tokens(self) -> int:
        """The number of tokens in all choices, for the usage."""
        each = self.tokens if self.tool is None else -(-len(self.tool.arguments) // ARGUMENT_PIECE_CHARS)
        return self.choices * each


def parse(body: bytes, serial: int, options: MockOptions) -> MockAsk:
    """Read a request's body in any of the dialects. Raises BadAsk."""
    asked = json_object(body)
    if isinstance(google := asked.get("generationConfig"), dict):
        asked = {**asked, **google, "n": google.get("candidateCount")}
    prompt = next((asked[key] for key in PROMPT_KEYS if asked.get(key)), None)
    if prompt is None:
        raise BadAsk("Missing the prompt: send `messages`, `input`, `prompt` or `contents`.", PROMPT_KEYS[0])
    prompt_bytes = orjson.dumps(prompt)
    limit = _length_limit(asked)
    tokens = options.tokens if limit is None else min(options.tokens, limit)
    stream_options = asked.get("stream_options")
    return MockAsk(
        serial=serial,
        created=int(time.time()),
        model=str(asked.get("model") or options.models[0]),
        stream=asked.get("stream") is True,
        choices=_choices(asked),
        tokens=tokens,
        cut=tokens < options.tokens,
        # Why: the same prompt gets the same text, streamed or not.
        seed=zlib.crc32(prompt_bytes) ^ options.seed if options.text_seed is None else options.text_seed,
        prompt_tokens=len(prompt_bytes) // PROMPT_BYTES_PER_TOKEN + 1,
        include_usage=isinstance(stream_options, dict) and stream_options.get("include_usage") is True,
        stamped=options.stamp,
        tool=_tool(asked),
    )


def json_object(body: bytes) -> Mapping[str, Any]:
    """Decode a body that has to be a JSON object. Raises BadAsk."""
    try:
        asked = orjson.loads(body)
    except orjson.JSONDecodeError as wrong:
        raise BadAsk(f"The body is not valid JSON: {wrong}.") from None
    if not isinstance(asked, dict):
        raise BadAsk("The body has to be a JSON object.")
    return asked


def _length_limit(asked: Mapping[str, Any]) -> int | None:
    for key in LENGTH_KEYS:
        limit = asked.get(key)
        if limit is not None:
            if not isinstance(limit, int) or limit < 1:
                raise BadAsk(f"`{key}` has to be an integer of at least 1.", key)
            return limit
    return None


def _choices(asked: Mapping[str, Any]) -> int:
    choices = asked.get("n", 1) or 1
    if not isinstance(choices, int) or not 1 <= choices <= CHOICES_MAX:
        raise BadAsk(f"`n` has to be an integer from 1 to {CHOICES_MAX}.", "n")
    return choices


def _tool(asked: Mapping[str, Any]) -> Tool | None:
    """The tool to call, only if `tool_choice` demands a call. If the mock may choose, it answers with text."""
    tools = [tool.get("function", tool) for tool in asked.get("tools") or () if isinstance(tool, dict)]
    choice = asked.get("tool_choice")
    if isinstance(google := asked.get("toolConfig"), dict) and tools and tools[0].get("functionDeclarations"):
        tools = tools[0]["functionDeclarations"]
        choice = "any" if google.get("functionCallingConfig", {}).get("mode") == "ANY" else None
    if not tools or choice is None or choice in ("auto", "none"):
        return None
    if isinstance(choice, dict):
        if choice.get("type") in ("auto", "none"):
            return None
        name = choice.get("function", choice).get("name")
        tools = [tool for tool in tools if name is None or tool.get("name") == name]
        if not tools:
            raise BadAsk(f"`tool_choice` names {name!r}, which is not in `tools`.", "tool_choice")
    schema = tools[0].get("parameters") or tools[0].get("input_schema") or {}
    return Tool(str(tools[0].get("name")), orjson.dumps(_example(schema, 0)).decode())


def _example(schema: Any, depth: int) -> Any:
    """A value that fits a JSON schema well enough to be shown."""
    if not isinstance(schema, dict) or depth > SCHEMA_DEPTH_MAX:
        return None
    if schema.get("enum"):
        return schema["enum"][0]
    match str(schema.get("type", "object")).lower():  # Google writes types in capitals
        case "object":
            return {key: _example(value, depth + 1) for key, value in (schema.get("properties") or {}).items()}
        case "array":
            return [_example(schema.get("items"), depth + 1)]
        case "string":
            return 'a mock\'s "string"'
        case "integer":
            return 7
        case "number":
            return 0.5
        case "boolean":
            return True
    return None
