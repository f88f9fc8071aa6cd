"""A usual streaming proxy with aiohttp: aiohttp_proxy.py PORT UPSTREAM_URL."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import uvloop
from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

FORWARDED = ("content-type", "cache-control")
UPSTREAM: web.AppKey[ClientSession] = web.AppKey("upstream", ClientSession)


async def relay(request: web.Request) -> web.StreamResponse:
    """Pass the request on and each chunk of the answer back."""
    body = await request.read()
    headers = {"content-type": request.headers.get("content-type", "application/json")}
    async with request.app[UPSTREAM].request(request.method, request.path_qs, data=body, headers=headers) as answer:
        kept = {name: answer.headers[name] for name in FORWARDED if name in answer.headers}
        response = web.StreamResponse(status=answer.status, headers=kept)
        await response.prepare(request)
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
        return response


def application(upstream: str) -> web.Application:
    """The proxy in front of `upstream`."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", relay)

    async def session(app: web.Application) -> AsyncIterator[None]:
        connector = TCPConnector(limit=0)
        app[UPSTREAM] = ClientSession(upstream, connector=connector, timeout=ClientTimeout(total=None))
        yield
        await app[UPSTREAM].close()

    app.cleanup_ctx.append(session)
    return app


if __name__ == "__main__":
    uvloop.install()
    web.run_app(
        application(sys.argv[2]), host="127.0.0.1", port=int(sys.argv[1]), backlog=4096, access_log=None, print=None
    )
