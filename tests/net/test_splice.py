"""A TLS connection whose stream lives in another worker: carried bytes, flow control, and who closed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fakes import CHAT, events_in, get, post, text_of
from loopback import run
from pair import Pair, pair
from tlspeer import TlsClient, client_context, make_certificate

from streamd.core.admission import Slot
from streamd.mockllm import MockOptions
from streamd.net import peers as peers_module
from streamd.net.splice import reason_of_end
from streamd.reasons import CloseReason

LONG = MockOptions(interval_s=0.002, ttft_s=0, tokens=100_000)
SHORT = MockOptions(interval_s=0.002, ttft_s=0, tokens=50)
JSON = "Accept: application/json"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


class Spliced:
    """Two workers behind TLS; streams live in b, clients come to a."""

    def __init__(self, p: Pair, cert: Path) -> None:
        self.p = p
        self._context = client_context(cert)
        self.clients: list[TlsClient] = []

    async def client(self, data: bytes = b"", *, receive_bytes: int = 0, at: str = "a") -> TlsClient:
        client = await TlsClient(getattr(self.p, at), self._context, receive_bytes).connect()
        self.clients.append(client)
        if data:
            await client.send(data)
        return client

    async def generation(self) -> str:
        """One that runs in b; its id."""
        asker = await self.client(post(CHAT, "X-Stream-Detach-Grace: 0"), at="b")
        while b"data: " not in asker.received:
            await asker.read()
        (stream,) = self.p.b.streams
        reader = await self.client(get(f"/v1/streams/{stream.id}"))
        while b"data: " not in reader.received:
            await reader.read()
        asker.sock.close()
        await self.p.b.until(lambda: len(stream.readers) == 1)
        return stream.id

    @property
    def splices(self) -> int:
        return len(self.p.a.runtime.splices)


@contextlib.asynccontextmanager
async def spliced(files: tuple[Path, Path], options: MockOptions = SHORT, **settings: Any) -> AsyncIterator[Spliced]:
    cert, key = files
    async with pair(options, tls_cert=str(cert), tls_key=str(key), **settings) as p:
        s = Spliced(p, cert)
        yield s
        for client in s.clients:
            client.sock.close()
        await p.a.until(lambda: not s.splices)
        for each in p.both:
            await each.until(lambda each=each: not each.runtime.clients)
            row, prices = p.boards[p.slot_of(each)].row, each.runtime.admission.prices
            streams_bytes = row[Slot.STREAMS] * prices.stream_bytes + each.worker._charged_logs
            assert (row[Slot.CONNECTIONS], row[Slot.MEMORY]) == (0, streams_bytes), "prices were not given back"


def test_requests_and_answers_pass_through(files: tuple[Path, Path]) -> None:
    async def main() -> None:
        async with spliced(files) as s:
            name = s.p.name_of(s.p.b)
            put = await s.client(get(f"/v1/streams/{name}", "Content-Length: 0", method="PUT"))
            assert (await put.answer()).status == 201
            said = get(f"/v1/streams/{name}/events?seal=finished", "Content-Length: 200000", method="PUT")
            large = await s.client(said + b"ab" * 100_000)
            assert (await large.answer()).status == 200
            reader = await s.client(get(f"/v1/streams/{name}"))
            answer = await reader.answer()
            assert b"".join(event.json["delta"].encode() for event in events_in(answer.body)) == b"ab" * 100_000
            assert s.splices == 3  # kept alive
            counts = [s.p.boards[0].connections(slot) for slot in range(2)]
            assert counts == [6, 3]  # in front a connection and an end of a pair each, behind it the other end
            prices = s.p.a.runtime.admission.prices
            assert s.p.boards[0].rows[0][Slot.MEMORY] == 3 * (prices.tls_tcp_bytes + prices.unix_bytes)
            # The next request on a carried connection is the owner's to pass on, over plain descriptors.
            mine = s.p.name_of(s.p.a)
            reader.received = b""
            await reader.send(get(f"/v1/streams/{mine}", "Content-Length: 0", method="PUT"))
            assert (await reader.answer()).status == 201
            assert [stream.id for stream in s.p.a.streams] == [mine] and s.p.b.runtime.counters.moved == 1
            reader.received = b""
            await reader.send(get(f"/v1/streams/{mine}", method="DELETE"))
            assert (await reader.answer()).status == 204

    run(main)


def test_whole_streams(files: tuple[Path, Path]) -> None:
    async def main() -> None:
        async with spliced(files) as s:
            asker = await s.client(post(CHAT), at="b")
            while b"data: " not in asker.received:
                await asker.read()
            (stream,) = s.p.b.streams
            readers = [await s.client(get(f"/v1/streams/{stream.id}", "Connection: close")) for _ in range(5)]
            whole = text_of(events_in((await asker.answer()).body))
            for reader in readers:
                await reader.to_the_end()
                assert text_of(events_in((await reader.answer()).body)) == whole and reader.notified
            await s.p.a.until(lambda: not s.splices)

    run(main)


@pytest.mark.parametrize("leave", ["close_notify", "fin", "rst"])
def test_a_client_that_leaves_is_a_reader_that_left(files: tuple[Path, Path], leave: str) -> None:
    async def main() -> None:
        async with spliced(files, LONG) as s:
            await s.generation()
            (stream,) = s.p.b.streams
            reader = s.clients[-1]
            if leave == "close_notify":
                with contextlib.suppress(Exception):
                    reader.tls.unwrap()
                await reader.flush()
            elif leave == "fin":
                reader.sock.shutdown(socket.SHUT_WR)
            else:
                reader.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                reader.sock.close()
            await s.p.b.until(lambda: stream.reason is not None)
            assert stream.reason is CloseReason.READER_GONE

    run(main)


def test_a_worker_that_dies_in_between_is_the_networks_doing(files: tuple[Path, Path]) -> None:
    async def main() -> None:
        async with spliced(files, LONG) as s:
            await s.generation()
            (stream,) = s.p.b.streams
            (splice,) = s.p.a.runtime.splices
            splice.abort()  # what the kernel does for a process that is killed
            await s.p.b.until(lambda: not stream.readers)
            assert stream.reason is None and stream.grace_until, "the generation waits for its reader"
            again = await s.client(get(f"/v1/streams/{stream.id}"), at="b")
            while b"data: " not in again.received:
                await again.read()
            again.sock.close()

    run(main)


def test_a_reader_that_stalls_stalls_its_owner_and_nobody_else(files: tuple[Path, Path]) -> None:
    async def main() -> None:
        async with spliced(
            files, MockOptions(interval_s=0.001, ttft_s=0, tokens=100_000), stall_timeout_s=0.5, close_timeout_s=0.3
        ) as s:
            asker = await s.client(post(CHAT), at="b")
            while b"data: " not in asker.received:
                await asker.read()
            (stream,) = s.p.b.streams
            await s.client(get(f"/v1/streams/{stream.id}"), receive_bytes=4096)
            await s.p.a.until(lambda: s.splices)
            (splice,) = s.p.a.runtime.splices
            reading = asyncio.ensure_future(asker.to_the_end())
            await s.p.b.until(lambda: s.p.b.runtime.counters.connections_closed[CloseReason.STALLED] == 1)
            client = splice._client.transport
            assert client is None or client.get_write_buffer_size() < 100_000
            await s.p.a.until(lambda: not s.splices)
            assert stream.reason is None  # the other reader goes on
            reading.cancel()

    run(main)


def test_a_broken_record_ends_both_sides(files: tuple[Path, Path]) -> None:
    async def main() -> None:
        async with spliced(files, LONG) as s:
            await s.generation()
            (stream,) = s.p.b.streams
            await s.clients[-1].send_raw(b"\x17\x03\x03\x00\x05hello")
            await s.p.b.until(lambda: stream.reason is not None)
            await s.p.a.until(lambda: not s.splices)

    run(main)


def test_there_is_no_room_at_the_owner(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with spliced(files) as s:
            name = s.p.name_of(s.p.b)
            monkeypatch.setattr(peers_module.Peers, "pass_on", lambda peers, slot, passed: False)
            client = await s.client(get(f"/v1/streams/{name}"))
            answer = await client.answer()
            assert answer.status == 503 and answer.error["code"] == "worker_busy" and not s.splices
            monkeypatch.undo()
            client.received = b""
            await client.send(get(f"/v1/streams/{name}"))
            assert (await client.answer()).status == 404

    run(main)


def test_a_splice_is_paid_for_or_refused(files: tuple[Path, Path]) -> None:
    async def main() -> None:
        async with spliced(files) as s:
            name = s.p.name_of(s.p.b)
            admission = s.p.a.runtime.admission
            client = await s.client(get("/healthz"))
            assert (await client.answer()).status == 200
            admission.note_resident(1 << 60)
            client.received = b""
            await client.send(get(f"/v1/streams/{name}"))
            answer = await client.answer()
            assert answer.status == 503 and answer.error["code"] == "over_capacity" and not s.splices
            admission.note_resident(0)

    run(main)


def test_a_connection_is_spread_before_its_handshake(files: tuple[Path, Path]) -> None:
    async def main() -> None:
        async with spliced(files) as s:
            for _ in range(40):
                client = await s.client(get("/healthz"))
                assert (await client.answer()).status == 200
            assert s.p.a.runtime.counters.moved >= 12 and not s.splices

    run(main)


def test_what_a_fin_on_the_pair_means() -> None:
    near, far = socket.socketpair()
    near.shutdown(socket.SHUT_WR)
    assert reason_of_end(far) is CloseReason.READER_GONE
    near.close()
    assert reason_of_end(far) is CloseReason.NETWORK_LOST
    far.close()
