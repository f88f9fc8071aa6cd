"""pydantic-ai: text and structured output over chat, text over Messages, and errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anthropic
import openai
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from told import BROKEN, KEY, MODEL, PROMPT, REFUSED, URL, tell, tell_error, tell_version


def chat() -> OpenAIChatModel:
    """A model with a client for the event loop that runs."""
    client = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
    return OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=client))


def messages() -> AnthropicModel:
    client = anthropic.AsyncAnthropic(base_url=URL, api_key=KEY, max_retries=0)
    return AnthropicModel(MODEL, provider=AnthropicProvider(anthropic_client=client))


class Place(BaseModel):
    """A place and its depth."""

    place: str
    depth: int


async def streamed(model: Callable[[], Any], headers: dict[str, str] | None = None) -> str:
    async with Agent(model()).run_stream(PROMPT, model_settings={"extra_headers": headers or {}}) as run:
        return "".join([piece async for piece in run.stream_text(delta=True)])


async def structured() -> Place:
    async with Agent(chat(), output_type=Place).run_stream(PROMPT) as run:
        return await run.get_output()


async def main() -> None:
    tell("whole", (await Agent(chat()).run(PROMPT)).output)
    tell("stream", await streamed(chat))
    tell("messages", (await streamed(messages))[:20])
    tell("tools", f"look_up {await structured()}")


tell_version("pydantic-ai-slim", "openai", "anthropic")
asyncio.run(main())
tell_error("refused", lambda: asyncio.run(streamed(chat, REFUSED)))
tell_error("cut", lambda: asyncio.run(streamed(chat, BROKEN)))
