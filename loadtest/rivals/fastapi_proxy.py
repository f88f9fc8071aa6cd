"""A streaming proxy as tutorials have it: FastAPI, httpx and sse-starlette. fastapi_proxy.py PORT UPSTREAM_URL."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import uvicorn
from fastapi import FastAPI, Request
from sse_starlette import EventSourceResponse


def application(upstream: str) -> FastAPI:
    """The proxy in front of `upstream`."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    client = httpx.AsyncClient(base_url=upstream, limits=limits, timeout=None)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await client.aclose()

    app = FastAPI(lifespan=lifespan)

    @app.post("/{path:path}")
    async def relay(path: str, request: Request) -> EventSourceResponse:
        body = await request.body()

        async def events() -> AsyncIterator[dict[str, str]]:
            headers = {"content-type": "application/json"}
            async with client.stream("POST", f"/{path}", content=body, headers=headers) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: "):
                        yield {"data": line[6:]}

        return EventSourceResponse(events(), sep="\n")

    return app


if __name__ == "__main__":
    port = int(sys.argv[1])
    uvicorn.run(application(sys.argv[2]), host="127.0.0.1", port=port, loop="uvloop", log_level="error", backlog=4096)
