"""The anthropic SDK: Messages, tools, errors, and a retry that joins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
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

ASK: Any = {"model": MODEL, "max_tokens": 1000, "messages": [{"role": "user", "content": PROMPT}]}
TOOLS: Any = [{"name": "look_up", "input_schema": PARAMETERS}]


def pieces(sdk: anthropic.Anthropic, headers: dict[str, str] | None = None) -> Iterator[str]:
    with sdk.messages.stream(**ASK, extra_headers=headers) as stream:
        yield from stream.text_stream
        stream.get_final_message()


tell_version("anthropic")
sdk = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
tell("whole", sdk.messages.create(**ASK).content[0].text)
tell("stream", "".join(pieces(sdk)))
with sdk.messages.stream(**ASK, tools=TOOLS, tool_choice={"type": "any"}) as stream:
    used = stream.get_final_message().content[0]
    tell("tools", f"{used.name} {used.input}")
tell_error("refused", lambda: list(pieces(sdk, REFUSED)))
tell_error("cut", lambda: list(pieces(sdk, BROKEN)))
behind = anthropic.Anthropic(base_url=CUT_URL, api_key=KEY, max_retries=0)
tell_resumed(lambda headers: pieces(behind, headers))
