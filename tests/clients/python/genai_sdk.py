"""The google-genai SDK: generateContent, tools, errors, and a retry that joins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google import genai
from told import (
    BROKEN,
    CUT_URL,
    KEY,
    MODEL,
    PARAMETERS,
    PROMPT,
    REFUSED,
    URL,
    tell,
    tell_error,
    tell_resumed,
    tell_version,
)

TOOLS: Any = {
    "tools": [{"function_declarations": [{"name": "look_up", "parameters": PARAMETERS}]}],
    "tool_config": {"function_calling_config": {"mode": "ANY"}},
    "automatic_function_calling": {"disable": True},
}


def client(url: str, headers: dict[str, str] | None = None) -> genai.Client:
    return genai.Client(api_key=KEY, http_options={"base_url": url, "headers": headers}, vertexai=False)


def pieces(url: str, headers: dict[str, str] | None = None) -> Iterator[str]:
    with client(url, headers) as sdk:
        for part in sdk.models.generate_content_stream(model=MODEL, contents=PROMPT):
            yield part.text or ""


tell_version("google-genai")
sdk = client(URL)
tell("whole", sdk.models.generate_content(model=MODEL, contents=PROMPT).text)
tell("stream", "".join(pieces(URL)))
called = list(sdk.models.generate_content_stream(model=MODEL, contents=PROMPT, config=TOOLS))
call = next(each for part in called for each in part.function_calls or ())
tell("tools", f"{call.name} {call.args}")
tell_error("refused", lambda: list(pieces(URL, REFUSED)))
tell_error("cut", lambda: list(pieces(URL, BROKEN)))
tell_resumed(lambda headers: pieces(CUT_URL, headers))
