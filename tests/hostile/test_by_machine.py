"""Faults of the machine and mistakes of its operator: time that jumps, a socket that is taken, a loop of servers.

Each docstring says what goes wrong, what is expected and, if the idea is a public one, where it comes from.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, Client, Rig, chunk, event, get, post, rig
from loopback import run, serving
from served import holding, served

from streamd.addresses import parse_address
from streamd.config import UpstreamSettings
from streamd.core import tokens
from streamd.daemon import listen

# -- time


def frozen(r: Rig, seconds: float, meanwhile: Callable[[], None]) -> None:
    """The process is stopped for a while; bytes that arrive meanwhile wait in the kernel.

    As libuv has it, timers that are due come first when it goes on, and reads after them.
    """
    r.loop._jumping.now += seconds
    r.loop.call_soon(lambda: r.loop.call_soon(lambda: r.loop.call_soon(meanwhile)))
    r.turn()
    r.pass_time(1)


def half_a_head(r: Rig) -> tuple[Client, Callable[[], None], Callable[[], bool]]:
    client = r.client(get("/healthz")[:-2])
    return client, lambda: client.transport.feed(b"\r\n"), lambda: client.statuses == [200]


def half_a_body(r: Rig) -> tuple[Client, Callable[[], None], Callable[[], bool]]:
    client = r.client(post({"model": 1}, path="/v1/streams/lookup")[:-5])
    return client, lambda: client.transport.feed(b'": 1}'[-5:]), lambda: client.statuses == [200]


def a_silent_upstream(r: Rig) -> tuple[Client, Callable[[], None], Callable[[], bool]]:
    client = r.client(post(CHAT))
    r.reply(SSE_HEAD + chunk(event("a")))
    link = r.link
    return client, lambda: link.feed(chunk(event("b"), DONE) + LAST), lambda: client.answer.whole


def a_prefill(r: Rig) -> tuple[Client, Callable[[], None], Callable[[], bool]]:
    client = r.client(post(CHAT | {"stream": False}))
    link = r.link
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
    return client, lambda: link.feed(answer), lambda: client.statuses == [200]


SITUATIONS = [half_a_head, half_a_body, a_silent_upstream, a_prefill]


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("seconds", [60.0, 4000.0])
def test_a_freeze_of_the_machine_is_nobodys_silence(situation: Any, seconds: float) -> None:
    """The process is stopped (`docker pause`, a cgroup's freezer, a debugger) for longer than a time limit; meanwhile
    the bytes that were waited for arrive, and wait in the kernel.

    Cause: the machine. Expected: it is read before a peer is judged by the clock: the request is answered, the stream
    ends whole.
    """
    with rig() as r:
        client, feed, is_well = situation(r)
        frozen(r, seconds, feed)
        assert is_well(), client.raw
        client.reset()


def test_a_frozen_daemon_goes_on_with_all_its_streams() -> None:
    """The whole daemon is stopped for longer than worker_stuck and idle_timeout, and goes on.

    Cause: the machine (`docker pause`; a virtual machine that moves). Expected: no worker is killed for it, and the
    running generation ends whole for its reader.
    """
    with (
        holding() as held,
        served("--upstream", held.url, "--worker-stuck", "2s", "--idle-timeout", "2s", new_group=True) as d,
    ):
        d.notify.until("READY=1")
        answer = d.generation()
        assert answer.readline()
        os.killpg(d.process.pid, signal.SIGSTOP)
        began = time.monotonic()
        held.go_on()
        while time.monotonic() - began < 3.5:  # the fault itself: a freeze has a length
            time.sleep(0.1)
        os.killpg(d.process.pid, signal.SIGCONT)
        rest = answer.read()
        assert b"two" in rest and b"[DONE]" in rest
        assert not [line for line in d.lines if "worker" in line and ("stuck" in line or "died" in line)]


@pytest.mark.parametrize("unix", [0.0, -1.0, 1.0, 2.0**31 - 1, 2.0**31, 2.0**32, 4_102_444_800.0, 32_503_680_000.0])
def test_the_wall_clock_may_be_anything(unix: float) -> None:
    """No battery, no network: the clock says 1970 at the start, 2038, or the year 3000, and jumps in mid-stream.

    Cause: the machine. Expected: requests are served, dates are dates, waits that clients are told are of some seconds.
    """
    with rig() as r:
        reader = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a")))
        r.runtime.unix_time = lambda: unix
        r.pass_time(2)
        answer = r.client(get("/healthz")).answer
        assert answer.status == 200 and (answer.get("date") or "").endswith(" GMT")
        assert r.client(get("/status"), listener="admin").answer.status == 200
        conversation = r.client(post(CHAT, "X-Conversation-Id: c"))
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        assert conversation.answer.whole
        looked_up = r.client(post({"conversation_ids": ["c"]}, path="/v1/streams/lookup")).answer
        assert looked_up.status == 200 and len(json.loads(looked_up.body)) == 1
        r.links[0].feed(chunk(DONE) + LAST)
        r.turn()
        assert reader.answer.whole


SECRET = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
def test_a_clock_that_jumps_neither_prolongs_nor_cuts_a_reader(jump_s: float, tmp_path: Path) -> None:
    """The clock is set while a reader reads with a token of 30 seconds.

    Cause: the machine, or an operator's change of its time. Expected: the reader reads for those 30 seconds and no
    longer.
    """
    path = tmp_path / "secret"
    path.write_text(SECRET)
    path.chmod(0o600)
    settings = {"streams_auth": "token", "token_secret_file": str(path), "token_audience": "a", "token_leeway_s": 0.0}
    with rig(**settings) as r:
        owner = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a")))
        name = owner.answer.get("x-stream-id")
        start = time.time()
        at = r.loop.time()
        shift = 0.0
        r.runtime.unix_time = lambda: start + r.loop.time() - at + shift
        claims = {"aud": "a", "exp": int(start) + 30, "streams": ["*"]}
        bearer = f"Authorization: Bearer {jwt.encode(claims, SECRET, 'HS256')}"
        reader = r.client(get(f"/v1/streams/{name}", bearer))
        assert reader.answer.status == 200
        shift = jump_s
        r.pass_time(25)
        assert not reader.gone
        r.pass_time(10)
        assert reader.gone and b"token" in reader.raw
        r.reply(chunk(DONE) + LAST)


# -- operators


def test_a_server_that_is_its_own_upstream_ends_the_circle() -> None:
    """The upstream's URL leads back to streamd, directly or by a proxy: each request asks for itself for ever.

    Cause: an operator's mistake, then any client with a single request. Expected: an error after some rounds, not after
    all connections, streams and descriptors are taken. Source: RFC 8586 (CDN-Loop); RFC 9110 7.6.3 (Via);
    https://github.com/tinyproxy/tinyproxy/issues/199
    """

    async def main() -> None:
        target = 0
        passed = 0

        async def back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal passed
            passed += 1
            if passed > 200:  # it has been shown
                writer.close()
                return
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", target)

            async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                try:
                    while piece := await source.read(65536):
                        sink.write(piece)
                except ConnectionError:
                    pass
                sink.close()

            await asyncio.gather(copy(reader, to_writer), copy(to_reader, writer))

        proxy = await asyncio.start_server(back, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
        async with serving(upstreams=(UpstreamSettings(name="self", url=url),)) as daemon:
            target = daemon.port
            for ask in (post(CHAT | {"stream": False}), post(CHAT), get("/v1/models")):
                assert (await daemon.ask(ask)).status in (502, 508)
                await daemon.until(lambda: not daemon.left()["in_flight"])
        proxy.close()
        assert passed <= 3 * 20

    run(main)


@pytest.mark.parametrize("waiting", [0, 1, 3])
def test_a_taken_unix_socket_is_neither_stolen_nor_waited_for(waiting: int, tmp_path: Path) -> None:
    """A second daemon is started on the socket of the first, which is busy or hangs: its queue is full.

    Cause: an operator. Expected: told at once that the address is in use; the first keeps its socket and its queue.
    """
    path = tmp_path / "socket"
    clients = []
    with socket.socket(socket.AF_UNIX) as first:
        first.bind(str(path))
        first.listen(0)
        for _ in range(waiting):
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            client.connect_ex(str(path))
            clients.append(client)
        failed: list[BaseException] = []

        def second() -> None:
            try:
                listen.bind(parse_address(f"unix:{path}")).close()
            except OSError as error:
                failed.append(error)

        thread = threading.Thread(target=second, daemon=True)
        thread.start()
        thread.join(5)
        waits = thread.is_alive()
        if waits:  # let it go
            first.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                while True:
                    first.accept()[0].close()
        thread.join(5)
        assert not waits, "the second daemon waits for the first"
        assert failed and "in use" in str(failed[0])
        assert stat.S_ISSOCK(path.stat().st_mode)
        for client in clients:
            client.close()


@pytest.mark.parametrize("kind", ["link", "dangling", "folder"])
def test_what_lies_in_place_of_a_socket_is_left_alone(kind: str, tmp_path: Path) -> None:
    """In place of the listening socket there is a link to another file, or to nothing, or a folder.

    Cause: an operator, or another account that may write there. Expected: an error that names the path; no file is
    removed, opened or made behind the link.
    """
    path, other = tmp_path / "socket", tmp_path / "other"
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(other)
    if kind == "link":
        other.write_text("mine")
    before = sorted(each.name for each in tmp_path.iterdir())
    with pytest.raises(OSError, match=str(path)):
        listen.bind(parse_address(f"unix:{path}"))
    assert sorted(each.name for each in tmp_path.iterdir()) == before
    assert kind != "link" or other.read_text() == "mine"


def test_saved_streams_are_their_owners_alone(tmp_path: Path) -> None:
    """The unit has `UMask=0000`, or a shell's umask is inherited: saved streams hold the texts of all users.

    Cause: an operator; any other account of the machine reads then. Expected: files of mode 600, whatever the umask.
    """
    before = os.umask(0)
    try:
        with served("--upstream", "http://127.0.0.1:9", "--state-dir", str(tmp_path)) as d:
            d.notify.until("READY=1")
            assert d.request("PUT", "/v1/streams/room").status == 201
            body = b'{"a":"private"}\n'
            kind = {"Content-Type": "application/x-ndjson"}
            assert d.request("POST", "/v1/streams/room/events", body, kind).status == 200
            d.signal(signal.SIGTERM)
            assert d.ended() == 0
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"private" in path.read_bytes() for path in files)
    assert {oct(path.stat().st_mode & 0o077) for path in files} == {"0o0"}


def test_a_locale_without_letters_stops_no_request() -> None:
    """The unit's locale is C, so Python's streams take ASCII alone; a model's name and a path have other letters.

    Cause: an operator, then any client. Expected: answered and logged as anywhere.
    """
    ascii_only = {
        "LANG": "C",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONIOENCODING": "ascii",
        "PYTHONCOERCECLOCALE": "0",
    }
    with served("--upstream", "http://127.0.0.1:9", **ascii_only) as d:
        d.notify.until("READY=1")
        body = json.dumps({"model": "m\u00e4r\u0447\u2028\U0001f600"}, ensure_ascii=False).encode()
        kind = {"Content-Type": "application/json", "X-Request-Id": "odd"}
        assert d.request("POST", "/v1/chat/completions", body, kind).status == 502
        assert d.request("GET", "/v1/streams/%C3%A4%F0%9F%98%80").status == 404
        d.line(r"id=odd .*model=")
        assert d.request("GET", "/healthz").status == 200


# -- keys of tokens


def number(value: int) -> str:
    size = max(1, (value.bit_length() + 7) // 8)
    return base64.urlsafe_b64encode(value.to_bytes(size, "big")).rstrip(b"=").decode()


MODULUS = (1 << 2047) + 1
ROWS: list[dict[str, Any]] = [
    {"kty": "RSA", "n": number(MODULUS), "e": number(1)},
    {"kty": "RSA", "n": number(MODULUS), "e": number(2)},
    {"kty": "RSA", "n": number(MODULUS), "e": number(0)},
    {"kty": "RSA", "n": number(0), "e": number(65537)},
    {"kty": "RSA", "n": number((1 << 511) + 1), "e": number(65537)},
    {"kty": "oct", "k": base64.urlsafe_b64encode(SECRET.encode()).decode()},
    {"kty": "OKP", "crv": "Ed25519", "x": ""},
    {"kty": "OKP", "crv": "X25519", "x": base64.urlsafe_b64encode(bytes(32)).decode()},
    {"kty": "OKP", "crv": "Ed448", "x": base64.urlsafe_b64encode(bytes(57)).decode()},
    {"kty": "EC", "crv": "P-256", "x": number(1), "y": number(1)},
    {"kty": "RSA", "x5u": "https://evil.test/key", "jku": "https://evil.test/keys"},
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(str(value)[:6] for value in row.values()))
def test_a_weak_key_in_a_key_set_verifies_nothing(row: dict[str, Any]) -> None:
    """A key set with a key by which every client can sign: an exponent of 1, a small modulus, a secret that is public.

    Cause: an operator, or the issuer. Expected: the set is refused, or the key left out; no forged token is good.
    """
    try:
        keys = tokens.load_jwks(json.dumps({"keys": [row]}).encode())
    except tokens.TokenKeyError:
        return
    verifier = tokens.Verifier(keys, audience="a")
    payload = {"aud": "a", "exp": 2**40, "streams": ["*"]}
    for forged in (jwt.encode(payload, SECRET, "HS256"), jwt.encode(payload, None, "none")):
        assert not isinstance(verifier.verify(forged.encode(), time.time()), tokens.Grant)
    pytest.fail("a weak key was taken")
