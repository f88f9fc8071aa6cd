"""Ways to an upstream over real sockets: Unix sockets, bases and queries of URLs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, chunk, event, events_in, get, post, text_of, whole_answer
from loopback import Daemon, run, serving

from streamd.config import UpstreamSettings


class Server:
    """An inference server that keeps its connections; notes the head of each request."""

    def __init__(self, *answers: bytes) -> None:
        self._answers = list(answers)
        self._writers: list[asyncio.StreamWriter] = []
        self.heads: list[bytes] = []
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                await reader.readexactly(int(length[0].partition(b":")[2]) if length else 0)
                self.heads.append(head)
                writer.write(self._answers[min(len(self.heads), len(self._answers)) - 1])
        writer.close()

    def field(self, name: bytes, request: int = 0) -> bytes:
        """The value of a field of a request."""
        lines = self.heads[request].split(b"\r\n")
        return next(line.partition(b": ")[2] for line in lines if line.lower().startswith(name + b":"))

    @property
    def targets(self) -> list[bytes]:
        return [head.split(b" ")[1] for head in self.heads]

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


STREAM = SSE_HEAD + chunk(event("hello") + DONE) + LAST
SMALL = whole_answer(b"{}", "200 OK", "content-type: application/json")


@contextlib.asynccontextmanager
async def on_socket(path: Path, server: Server) -> AsyncIterator[None]:
    listening = await asyncio.start_unix_server(server.serve, path)
    try:
        yield
    finally:
        server.close()
        listening.close()


@contextlib.asynccontextmanager
async def on_port(server: Server) -> AsyncIterator[str]:
    """The server's URL."""
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        listening.close()


async def asked(daemon: Daemon, request: bytes, count: int = 1) -> list[tuple[int, bytes]]:
    """Status and body of that request, sent one time after the other."""
    answers = []
    for _ in range(count):
        conn = await daemon.connect(request)
        answer = await conn.answer()
        answers.append((answer.status, answer.body))
        conn.close()
    return answers


def test_a_server_on_a_unix_socket_is_asked_like_any_other(tmp_path: Path) -> None:
    async def main() -> None:
        server = Server(STREAM)
        settings = UpstreamSettings(url=f"unix:{tmp_path}/vllm.sock")
        async with on_socket(tmp_path / "vllm.sock", server), serving(upstreams=(settings,)) as daemon:
            for status, body in await asked(daemon, post(CHAT), 3):
                assert status == 200 and text_of(events_in(body)) == "hello"
            assert server.connections == 1 and server.field(b"host") == b"localhost"
            name = settings.name
            assert name.startswith("unix:") and name.endswith("-vllm.sock")
            assert daemon.runtime.counters.upstream_requests == {name: 3}

    run(main)


def test_a_server_whose_socket_is_not_there_is_unreachable_and_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        settings = UpstreamSettings(name="up", url=f"unix:{tmp_path}/none")
        async with serving(upstreams=(settings,)) as daemon:
            ((status, body),) = await asked(daemon, post(CHAT))
            assert status == 502 and b"up can't be reached (its socket: No such file or directory)" in body
            assert str(tmp_path).encode() not in body
            (failures,) = daemon.runtime.counters.upstream_failures.items()
            assert failures[0][0] == "up"

    run(main)


@pytest.mark.parametrize(
    ("base", "path", "target"),
    [
        ("", "auto", b"/v1/files?a=1"),
        ("/v1", "auto", b"/v1/files?a=1"),
        ("/api/paas/v4", "auto", b"/api/paas/v4/files?a=1"),
        ("/api/paas/v4", "append", b"/api/paas/v4/v1/files?a=1"),
        ("/inference", "replace", b"/inference/files?a=1"),
        ("/openai?api-version=2024-10-21", "auto", b"/openai/v1/files?a=1&api-version=2024-10-21"),
    ],
)
def test_requests_go_to_the_place_that_the_url_names(base: str, path: str, target: bytes) -> None:
    async def main() -> None:
        server = Server(SMALL)
        async with on_port(server) as url:
            settings = UpstreamSettings(name="up", url=url + base, path=path)
            async with serving(upstreams=(settings,)) as daemon:
                assert (await asked(daemon, get("/v1/files?a=1")))[0] == (200, b"{}")
                assert server.targets == [target]

    run(main)


def test_the_list_of_models_is_asked_for_below_the_base_too() -> None:
    async def main() -> None:
        answer = b'{"object":"list","data":[{"id":"glm","object":"model"}]}'
        server = Server(whole_answer(answer, "200 OK", "content-type: application/json"))
        async with on_port(server) as url:
            settings = UpstreamSettings(name="up", url=f"{url}/api/paas/v4?tenant=a")
            async with serving(upstreams=(settings,)) as daemon:
                ((status, body),) = await asked(daemon, get("/v1/models"))
                assert status == 200 and b"glm" in body
                assert server.targets == [b"/api/paas/v4/models?tenant=a"]

    run(main)


def test_a_redirect_below_a_base_with_a_version_leads_back_to_streamd() -> None:
    async def main() -> None:
        moved = whole_answer(b"", "302 Found", "location: /api/v3/files/x?y=1")
        server = Server(moved)
        async with on_port(server) as url:
            settings = UpstreamSettings(name="up", url=f"{url}/api/v3")
            async with serving(upstreams=(settings,)) as daemon:
                conn = await daemon.connect(get("/v1/files"))
                answer = await conn.answer()
                assert answer.status == 302 and answer.get("location") == "/v1/files/x?y=1"

    run(main)
