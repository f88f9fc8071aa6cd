"""LangChain: chat models of OpenAI and Anthropic, tools, errors, and a retry that joins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from langchain_anthropic import ChatAnthropic
from langchain_openai import ChatOpenAI
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

TOOL: Any = {"type": "function", "function": {"name": "look_up", "description": "Looks up.", "parameters": PARAMETERS}}


def chat(url: str = URL, headers: dict[str, str] | None = None) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{url}/v1", api_key=KEY, model=MODEL, max_retries=0, default_headers=headers)


def pieces(url: str = URL, headers: dict[str, str] | None = None) -> Iterator[str]:
    for chunk in chat(url, headers).stream(PROMPT):
        yield str(chunk.text)


tell_version("langchain-core", "langchain-openai", "langchain-anthropic")
tell("whole", chat().invoke(PROMPT).text)
tell("stream", "".join(pieces()))
claude = ChatAnthropic(base_url=URL, api_key=KEY, model=MODEL, max_retries=0, max_tokens=1000)
tell("messages", "".join(str(chunk.text) for chunk in claude.stream(PROMPT))[:20])
gathered: Any = None
for chunk in chat().bind_tools([TOOL], tool_choice="any").stream(PROMPT):
    gathered = chunk if gathered is None else gathered + chunk
call = gathered.tool_calls[0]
tell("tools", f"{call['name']} {call['args']}")
tell_error("refused", lambda: list(pieces(URL, REFUSED)))
tell_error("cut", lambda: list(pieces(URL, BROKEN)))
tell_resumed(lambda headers: pieces(CUT_URL, headers))
