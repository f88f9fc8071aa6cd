"""Ways to an upstream over real sockets: bases and queries of URLs, Unix sockets, forward proxies, certificates."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, chunk, event, events_in, get, post, text_of, whole_answer
from loopback import Daemon, nobody_listens, run, serving
from tlspeer import make_certificate

from streamd.config import ConfigError, Settings, UpstreamSettings
from streamd.daemon.file_modes import check_modes
from streamd.forward_proxy import ForwardProxy, basic
from streamd.wire.certificate import first_expiry


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


# -- forward proxies


class Proxy:
    """A forward proxy; `answer` is what it says to CONNECT, after which it leads to `port` if that is a 200."""

    def __init__(self, port: int, answer: bytes = b"HTTP/1.1 200 Connection established\r\n\r\n") -> None:
        self._port = port
        self._answer = answer
        self.heads: list[bytes] = []
        self.left = asyncio.Event()  # a client has closed its connection

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(self._answer)
            if b" 200 " in self._answer:
                inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._port)
                await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))
            else:
                await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.left.set()
            writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()


@contextlib.asynccontextmanager
async def behind(proxy: Proxy) -> AsyncIterator[int]:
    """The proxy's port."""
    listening = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()


@contextlib.asynccontextmanager
async def over_tls(server: Server, context: ssl.SSLContext) -> AsyncIterator[int]:
    """The server's port."""
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=context)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        server.close()
        listening.close()


def server_context(folder: Path, *, trusted: Path | None = None) -> ssl.SSLContext:
    """Of a server that asks for a certificate if it trusts any."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*make_certificate(folder, "api.test"))
    if trusted is not None:
        context.load_verify_locations(trusted)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@pytest.mark.parametrize("credentials", ["", basic("me:secret")])
def test_a_server_behind_a_forward_proxy_is_asked_through_it_over_tls(tmp_path: Path, credentials: str) -> None:
    """The name is the proxy's to look up: no resolver here knows it. The tunnel is kept for the next request."""

    async def main() -> None:
        server = Server(STREAM)
        async with over_tls(server, server_context(tmp_path)) as port:
            proxy = Proxy(port)
            async with behind(proxy) as proxy_port:
                settings = UpstreamSettings(
                    name="far",
                    url="https://api.test/v1",
                    ca_file=str(tmp_path / "cert.pem"),
                    through=ForwardProxy("127.0.0.1", proxy_port, credentials),
                )
                async with serving(upstreams=(settings,)) as daemon:
                    for status, body in await asked(daemon, post(CHAT), 3):
                        assert status == 200 and text_of(events_in(body)) == "hello"
                assert server.connections == 1 and server.field(b"host") == b"api.test"
            (head,) = proxy.heads
            assert head.startswith(b"CONNECT api.test:443 HTTP/1.1\r\nHost: api.test:443\r\n")
            assert (b"\r\nProxy-Authorization: " + credentials.encode() in head) is bool(credentials)
            assert all(b"proxy-authorization" not in each.lower() for each in server.heads)

    run(main)


def test_a_server_without_tls_is_asked_through_the_proxy_that_a_setting_names() -> None:
    async def main() -> None:
        server = Server(SMALL)
        async with on_port(server) as url:
            proxy = Proxy(
                int(url.rpartition(":")[2]), b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200 OK\r\nVia: a\r\n\r\n"
            )
            async with behind(proxy) as port:
                way = ForwardProxy("127.0.0.1", port)
                settings = UpstreamSettings(name="up", url="http://gpu.test:8000", through=way)
                async with serving(upstreams=(settings,)) as daemon:
                    assert (await asked(daemon, get("/v1/files")))[0] == (200, b"{}")
                assert proxy.heads[0].startswith(b"CONNECT gpu.test:8000 ")

    run(main)


BLOAT = b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 20_000


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (
            b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n",
            b"it asks for a user and a password, or for others (407)",
        ),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 6\r\n\r\nno way", b"it answered 403"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", b"it answered 502"),
        (b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", b"it sent bytes behind its answer"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 9, b"its answer doesn't come to an end"),
        (b"SSH-2.0-OpenSSH\r\n", b"its answer is malformed"),
        (BLOAT, b"its answer is malformed"),
        (b"", b"it closed the connection"),
    ],
)
def test_a_proxy_that_refuses_is_named_with_its_reason(answer: bytes, why: bytes) -> None:
    async def main() -> None:
        async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()

        listening = await asyncio.start_server(say, "127.0.0.1", 0)
        way = ForwardProxy("127.0.0.1", listening.sockets[0].getsockname()[1])
        settings = UpstreamSettings(name="far", url="https://api.test", through=way)
        async with serving(upstreams=(settings,)) as daemon:
            ((status, body),) = await asked(daemon, post(CHAT))
            assert status == 502 and b"far can't be reached (the proxy: " + why in body
        listening.close()

    run(main)


def test_a_proxy_that_is_not_there_is_named() -> None:
    async def main() -> None:
        with nobody_listens() as url:
            way = ForwardProxy("127.0.0.1", int(url.rpartition(":")[2]))
            settings = UpstreamSettings(name="far", url="https://api.test", through=way)
            async with serving(upstreams=(settings,)) as daemon:
                ((status, body),) = await asked(daemon, post(CHAT))
                assert status == 502 and b"(the proxy: Connection refused)" in body

    run(main)


def test_a_proxy_that_never_answers_has_connect_timeout() -> None:
    async def main() -> None:
        proxy = Proxy(0, b"")
        async with behind(proxy) as port:
            settings = UpstreamSettings(name="far", url="https://api.test", through=ForwardProxy("127.0.0.1", port))
            async with serving(upstreams=(settings,), connect_timeout_s=0.2) as daemon:
                ((status, body),) = await asked(daemon, post(CHAT))
                assert status == 502 and b"no connection within connect_timeout" in body
                await proxy.left.wait()

    run(main)


# -- client certificates


def test_a_server_that_asks_for_a_certificate_sees_that_of_the_settings_and_its_successor(tmp_path: Path) -> None:
    async def main() -> None:
        for name in ("server", "client", "other"):
            (tmp_path / name).mkdir()
        cert, key = make_certificate(tmp_path / "client", "streamd.test")
        trusted = tmp_path / "client" / "trusted.pem"
        trusted.write_bytes(cert.read_bytes())
        server = Server(SMALL)
        async with over_tls(server, server_context(tmp_path / "server", trusted=trusted)) as port:
            shown = UpstreamSettings(
                name="up",
                url=f"https://127.0.0.1:{port}",
                ca_file=str(tmp_path / "server" / "cert.pem"),
                client_cert=str(cert),
                client_key=str(key),
            )
            hidden = dataclasses.replace(shown, client_cert="", client_key="")
            async with serving(upstreams=(hidden,)) as daemon:
                assert (await asked(daemon, get("/v1/files")))[0][0] == 502
            async with serving(upstreams=(shown,)) as daemon:
                assert (await asked(daemon, get("/v1/files")))[0] == (200, b"{}")
                make_certificate(tmp_path / "client")  # the server doesn't know this certificate
                daemon.worker.reload(daemon.worker.settings)
                assert (await asked(daemon, get("/v1/files")))[0][0] == 502
                another = dataclasses.replace(shown, name="another")
                daemon.worker.reload(dataclasses.replace(daemon.worker.settings, upstreams=(another,)))
                (upstream,) = daemon.worker.upstreams
                assert upstream.certificate_until == first_expiry(cert.read_bytes()) > 0

    run(main)


def test_a_client_key_that_others_may_read_ends_the_start(tmp_path: Path) -> None:
    async def main() -> None:
        cert, key = make_certificate(tmp_path)
        key.chmod(0o644)
        settings = UpstreamSettings(name="up", url="https://up.test", client_cert=str(cert), client_key=str(key))
        with pytest.raises(ConfigError, match=r"upstream\.client_key.*mode 0644"):
            async with serving(upstreams=(settings,)):
                pass
        with pytest.raises(ConfigError, match=r"upstream\.client_key.*mode 0644"):
            check_modes(Settings(upstreams=(settings,)))

    run(main)
