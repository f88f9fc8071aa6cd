"""The openai SDK: chat, Responses, tools, errors, and a retry that joins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
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

MESSAGES: Any = [{"role": "user", "content": PROMPT}]
TOOLS: Any = [{"type": "function", "function": {"name": "look_up", "parameters": PARAMETERS}}]


def pieces(sdk: openai.OpenAI, headers: dict[str, str] | None = None) -> Iterator[str]:
    with sdk.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, extra_headers=headers) as stream:
        for chunk in stream:
            if chunk.choices:
                yield chunk.choices[0].delta.content or ""


tell_version("openai")
sdk = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
tell("whole", sdk.chat.completions.create(model=MODEL, messages=MESSAGES).choices[0].message.content)
tell("stream", "".join(pieces(sdk)))
with sdk.responses.stream(model=MODEL, input=PROMPT) as response:
    said = "".join(event.delta for event in response if event.type == "response.output_text.delta")
    tell("responses", said == response.get_final_response().output_text and said[:20])
with sdk.chat.completions.stream(model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice="required") as chat:
    call = chat.until_done().get_final_completion().choices[0].message.tool_calls[0].function
    tell("tools", f"{call.name} {call.arguments}")
tell_error("refused", lambda: list(pieces(sdk, REFUSED)))
tell_error("cut", lambda: list(pieces(sdk, BROKEN)))
behind = openai.OpenAI(base_url=f"{CUT_URL}/v1", api_key=KEY, max_retries=0)
tell_resumed(lambda headers: pieces(behind, headers))
