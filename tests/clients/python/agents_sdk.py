"""openai-agents: an agent's run over chat and over Responses, with a tool, and errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from told import BROKEN, KEY, MODEL, PROMPT, REFUSED, URL, tell, tell_error, tell_version


def sdk() -> openai.AsyncOpenAI:
    """A client for the event loop that runs."""
    return openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)


def chat() -> OpenAIChatCompletionsModel:
    return OpenAIChatCompletionsModel(model=MODEL, openai_client=sdk())


def responses() -> OpenAIResponsesModel:
    return OpenAIResponsesModel(model=MODEL, openai_client=sdk())


@function_tool
def look_up(place: str, depth: int) -> str:
    """Looks a place up."""
    return f"look_up {place} {depth}"


async def streamed(model: Callable[[], Any], **settings: Any) -> str:
    agent = Agent(name="a", model=model(), model_settings=ModelSettings(**settings))
    run = Runner.run_streamed(agent, PROMPT)
    said = ""
    async for event in run.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            said += event.data.delta
    return said if said == run.final_output else f"{said!r} is not {run.final_output!r}"


async def with_a_tool() -> str:
    settings = ModelSettings(tool_choice="required")
    agent = Agent(
        name="a", model=chat(), tools=[look_up], model_settings=settings, tool_use_behavior="stop_on_first_tool"
    )
    run = Runner.run_streamed(agent, PROMPT)
    async for _ in run.stream_events():
        pass
    return str(run.final_output)


async def main() -> None:
    whole = await Runner.run(Agent(name="a", model=chat()), PROMPT)
    tell("whole", whole.final_output)
    tell("stream", await streamed(chat))
    tell("responses", (await streamed(responses))[:20])
    tell("tools", await with_a_tool())


set_tracing_disabled(True)
tell_version("openai-agents", "openai")
asyncio.run(main())
tell_error("refused", lambda: asyncio.run(streamed(chat, extra_headers=REFUSED)))
tell_error("cut", lambda: asyncio.run(streamed(chat, extra_headers=BROKEN)))
