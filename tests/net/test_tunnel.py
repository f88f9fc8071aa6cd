"""A TLS connection to a stream in another worker: carried bytes, flow control, and the side that closed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import CHAT, FakeLoop, FakeTransport, Rig, events_in, get, post, rig, text_of
from loopback import run
from pair import Pair, pair
from tlspeer import TlsClient, client_context, make_certificate

from streamd.core.admission import SharedNumber
from streamd.mockllm import MockOptions
from streamd.net import peers as peers_module
from streamd.net.sweep import NEVER
from streamd.net.tunnel import TRANSITIONS, Tunnel, TunnelEvent, TunnelState, open_tunnel, reason_of_end
from streamd.reasons import CloseReason

LONG = MockOptions(interval_s=0.002, ttft_s=0, tokens=100_000)
SHORT = MockOptions(interval_s=0.002, ttft_s=0, tokens=50)
JSON = "Accept: application/json"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


def test_every_state_of_a_tunnel_can_end() -> None:
    assert set(TRANSITIONS) == set(TunnelState)
    for state, steps in TRANSITIONS.items():
        assert state is TunnelState.OVER or steps[TunnelEvent.END] is TunnelState.OVER


class Tunnelled:
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
        """Start a generation in b and return its id."""
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
    def tunnels(self) -> int:
        return len(self.p.a.runtime.tunnels)


@contextlib.asynccontextmanager
async def tunnelled(
    files: tuple[Path, Path], options: MockOptions = SHORT, **settings: Any
) -> AsyncIterator[Tunnelled]:
    cert, key = files
    async with pair(options, tls_cert=str(cert), tls_key=str(key), **settings) as p:
        s = Tunnelled(p, cert)
        yield s
        for client in s.clients:
            client.sock.close()
        await p.a.until(lambda: not s.tunnels)
        for each in p.both:
            await each.until(lambda each=each: not each.runtime.clients)
            row, prices = p.boards[p.slot_of(each)].row, each.runtime.admission.prices
            streams_bytes = row[SharedNumber.STREAMS] * prices.stream_bytes + each.worker._charged_logs
            assert (row[SharedNumber.CONNECTIONS], row[SharedNumber.MEMORY]) == (0, streams_bytes), (
                "prices were not given back"
            )


def test_a_tunnel_carries_requests_and_answers(files: tuple[Path, Path]) -> None:
    async def main() -> None:
        async with tunnelled(files) as s:
            name = s.p.name_of(s.p.b)
            put = await s.client(get(f"/v1/streams/{name}", "Content-Length: 0", method="PUT"))
            assert (await put.answer()).status == 201
            said = get(f"/v1/streams/{name}/events?seal=finished", "Content-Length: 200000", method="PUT")
            large = await s.client(said + b"ab" * 100_000)
            assert (await large.answer()).status == 200
            reader = await s.client(get(f"/v1/streams/{name}"))
            answer = await reader.answer()
            assert b"".join(event.json["delta"].encode() for event in events_in(answer.body)) == b"ab" * 100_000
            assert s.tunnels == 3  # kept alive
            counts = [s.p.boards[0].connections(slot) for slot in range(2)]
            assert counts == [6, 3]  # each tunnel: a connection and an end of a pair in a, the other end in b
            prices = s.p.a.runtime.admission.prices
            assert s.p.boards[0].rows[0][SharedNumber.MEMORY] == 3 * (prices.tls_tcp_bytes + prices.unix_bytes)
            # The owner passes on the next request on a carried connection, over plain descriptors.
            mine = s.p.name_of(s.p.a)
            reader.received = b""
            await reader.send(get(f"/v1/streams/{mine}", "Content-Length: 0", method="PUT"))
            assert (await reader.answer()).status == 201
            assert [stream.id for stream in s.p.a.streams] == [mine] and s.p.b.runtime.counters.handed_over == 1
            reader.received = b""
            await reader.send(get(f"/v1/streams/{mine}", method="DELETE"))
            assert (await reader.answer()).status == 204

    run(main)


def test_a_tunnel_carries_whole_streams(files: tuple[Path, Path]) -> None:
    async def main() -> None:
        async with tunnelled(files) as s:
            asker = await s.client(post(CHAT), at="b")
            while b"data: " not in asker.received:
                await asker.read()
            (stream,) = s.p.b.streams
            readers = [await s.client(get(f"/v1/streams/{stream.id}", "Connection: close")) for _ in range(5)]
            whole = text_of(events_in((await asker.answer()).body))
            for reader in readers:
                await reader.to_the_end()
                assert text_of(events_in((await reader.answer()).body)) == whole and reader.notified
            await s.p.a.until(lambda: not s.tunnels)

    run(main)


@pytest.mark.parametrize("leave", ["close_notify", "fin", "rst"])
def test_a_client_of_a_tunnel_that_leaves_counts_as_a_reader_that_left(files: tuple[Path, Path], leave: str) -> None:
    async def main() -> None:
        async with tunnelled(files, LONG) as s:
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


def test_a_worker_that_dies_between_client_and_owner_counts_as_network_loss(files: tuple[Path, Path]) -> None:
    async def main() -> None:
        async with tunnelled(files, LONG) as s:
            await s.generation()
            (stream,) = s.p.b.streams
            (tunnel,) = s.p.a.runtime.tunnels
            tunnel.abort()  # as the kernel does for a killed process
            await s.p.b.until(lambda: not stream.readers)
            assert stream.reason is None and stream.grace_until, "the generation waits for its reader"
            again = await s.client(get(f"/v1/streams/{stream.id}"), at="b")
            while b"data: " not in again.received:
                await again.read()
            again.sock.close()

    run(main)


def test_a_stalled_client_of_a_tunnel_stalls_only_its_own_reader(files: tuple[Path, Path]) -> None:
    async def main() -> None:
        async with tunnelled(
            files, MockOptions(interval_s=0.001, ttft_s=0, tokens=100_000), stall_timeout_s=0.5, close_timeout_s=0.3
        ) as s:
            asker = await s.client(post(CHAT), at="b")
            while b"data: " not in asker.received:
                await asker.read()
            (stream,) = s.p.b.streams
            await s.client(get(f"/v1/streams/{stream.id}"), receive_bytes=4096)
            await s.p.a.until(lambda: s.tunnels)
            (tunnel,) = s.p.a.runtime.tunnels
            reading = asyncio.ensure_future(asker.to_the_end())
            await s.p.b.until(lambda: s.p.b.runtime.counters.connections_closed[CloseReason.STALLED] == 1)
            client = tunnel._client.transport
            assert client is None or client.get_write_buffer_size() < 100_000
            await s.p.a.until(lambda: not s.tunnels)
            assert stream.reason is None  # the other reader goes on
            reading.cancel()

    run(main)


def test_a_broken_record_ends_both_sides(files: tuple[Path, Path]) -> None:
    async def main() -> None:
        async with tunnelled(files, LONG) as s:
            await s.generation()
            (stream,) = s.p.b.streams
            await s.clients[-1].send_raw(b"\x17\x03\x03\x00\x05hello")
            await s.p.b.until(lambda: stream.reason is not None)
            await s.p.a.until(lambda: not s.tunnels)

    run(main)


def test_a_tunnel_is_refused_when_the_owner_has_no_room(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with tunnelled(files) as s:
            name = s.p.name_of(s.p.b)
            monkeypatch.setattr(peers_module.Peers, "pass_on", lambda peers, slot, passed: False)
            client = await s.client(get(f"/v1/streams/{name}"))
            answer = await client.answer()
            assert answer.status == 503 and answer.error["code"] == "worker_busy" and not s.tunnels
            monkeypatch.undo()
            client.received = b""
            await client.send(get(f"/v1/streams/{name}"))
            assert (await client.answer()).status == 404

    run(main)


def test_a_tunnel_is_charged_or_refused(files: tuple[Path, Path]) -> None:
    async def main() -> None:
        async with tunnelled(files) as s:
            name = s.p.name_of(s.p.b)
            admission = s.p.a.runtime.admission
            client = await s.client(get("/healthz"))
            assert (await client.answer()).status == 200
            admission.note_resident(1 << 60)
            client.received = b""
            await client.send(get(f"/v1/streams/{name}"))
            answer = await client.answer()
            assert answer.status == 503 and answer.error["code"] == "over_capacity" and not s.tunnels
            admission.note_resident(0)

    run(main)


def test_without_descriptors_a_tunnel_is_refused_and_nothing_stays_charged(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    async def main() -> None:
        async with tunnelled(files) as s:
            name, row = s.p.name_of(s.p.b), s.p.boards[0].row
            client = await s.client(get("/healthz"))
            assert (await client.answer()).status == 200
            before = row[SharedNumber.CONNECTIONS], row[SharedNumber.MEMORY]
            monkeypatch.setattr(socket, "socketpair", full)
            client.received = b""
            await client.send(get(f"/v1/streams/{name}"))
            answer = await client.answer()
            monkeypatch.undo()
            assert answer.status == 503 and answer.error["code"] == "over_capacity" and answer.get("retry-after")
            assert s.p.a.runtime.counters.bugs == 0
            assert s.p.a.runtime.admission.refused()["descriptors"] == 1
            assert (row[SharedNumber.CONNECTIONS], row[SharedNumber.MEMORY]) == before
            client.received = b""
            await client.send(get(f"/v1/streams/{name}"))
            assert (await client.answer()).status == 404, "the same connection is passed on once there is room"

    run(main)


def test_a_connection_is_spread_before_its_handshake(files: tuple[Path, Path]) -> None:
    async def main() -> None:
        async with tunnelled(files) as s:
            for _ in range(40):
                client = await s.client(get("/healthz"))
                assert (await client.answer()).status == 200
            assert s.p.a.runtime.counters.handed_over >= 12 and not s.tunnels

    run(main)


def test_a_fin_on_the_pair_means_reader_gone_and_a_close_network_lost() -> None:
    near, far = socket.socketpair()
    near.shutdown(socket.SHUT_WR)
    assert reason_of_end(far) is CloseReason.READER_GONE
    near.close()
    assert reason_of_end(far) is CloseReason.NETWORK_LOST
    far.close()


# -- over fake transports

PRICE_BYTES = 5000  # price of the client's connection


class Near(FakeTransport):
    """Our end of the pair. Its socket is real, so that the kernel tells each end how the other ended."""

    def __init__(self, loop: FakeLoop, protocol: Any, sock: socket.socket) -> None:
        super().__init__(loop, protocol)
        self.sock = sock

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.sock if name == "socket" else super().get_extra_info(name, default)

    def write_eof(self) -> None:
        super().write_eof()
        self.sock.shutdown(socket.SHUT_WR)

    def _lose(self, error: Exception | None) -> None:
        self.sock.close()
        super()._lose(error)


class Sides:
    """A tunnel between a fake client and a fake end of the pair; `far` is the owner's end."""

    def __init__(self, r: Rig) -> None:
        self.r = r
        self.refusal: Exception | None = None  # the kernel's error for our end of the pair
        self.connected = r.loop.create_future()
        self.owner: Near
        r.loop.connect_accepted_socket = self._connect  # type: ignore[assignment,method-assign]
        tunnel = open_tunnel(r.runtime, PRICE_BYTES)
        assert isinstance(tunnel, Tunnel)
        self.tunnel = tunnel
        self.near = tunnel._near
        self.far = tunnel.far.dup()  # held by the owner
        self.client = FakeTransport(r.loop, None)
        tunnel.begin(self.client)

    async def _connect(self, make: Callable[[], Any], sock: socket.socket) -> tuple[Any, Any]:
        await self.connected
        if self.refusal is not None:
            raise self.refusal
        protocol = make()
        self.owner = Near(self.r.loop, protocol, sock)
        protocol.connection_made(self.owner)
        return self.owner, protocol

    def connect(self) -> None:
        """Make a transport of our end of the pair, or let the kernel refuse."""
        self.connected.set_result(None)
        self.r.turn()

    @property
    def charged(self) -> tuple[int, int]:
        """Connections and bytes that admission has charged for this tunnel."""
        return charged(self.r)

    @property
    def verdict(self) -> CloseReason:
        """The close reason that the owner reads from the end of the pair."""
        assert self.far.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"", "the pair has ended"
        return reason_of_end(self.far)

    @property
    def over(self) -> bool:
        return not self.r.runtime.tunnels and self.near.fileno() == -1 and self.charged == (0, 0)


def charged(r: Rig) -> tuple[int, int]:
    in_use: Any = r.runtime.admission.status()["in_use"]
    return in_use["connections"], in_use["memory"]


@contextlib.contextmanager
def sides(*, connected: bool = True, **settings: Any) -> Iterator[Sides]:
    """A tunnel that may leave nothing at the end of the test: no descriptor, no price, no deadline."""
    with rig(**settings) as r:
        s = Sides(r)
        if connected:
            s.connect()
        try:
            yield s
            assert s.over
        finally:
            s.far.close()


def end_the_owner(s: Sides) -> None:
    """The owner closes its end."""
    s.owner.fin()
    s.r.turn()


def test_the_client_is_read_only_once_the_pair_is_connected_and_charged() -> None:
    with sides(connected=False) as s:
        assert not s.client.reading
        assert s.charged == (2, PRICE_BYTES + s.tunnel.pair_bytes)
        assert s.tunnel.far.fileno() == -1, "the far end is the owner's alone"
        s.connect()
        assert s.client.reading
        s.client.feed(b"GET / ")
        s.owner.feed(b"HTTP/1.1 ")
        s.client.feed(b"HTTP/1.1")
        s.owner.feed(b"200 OK")
        assert (bytes(s.owner.sent), bytes(s.client.sent)) == (b"GET / HTTP/1.1", b"HTTP/1.1 200 OK")
        end_the_owner(s)
        assert s.client.closed and not s.client.aborted


def test_a_full_side_of_a_tunnel_pauses_reading_on_the_other_side() -> None:
    with sides() as s:
        s.client.capacity = 2
        s.owner.feed(b"hello")
        assert (s.owner.reading, s.client.reading) == (False, True)
        assert s.tunnel.due_at == s.r.loop.time() + s.r.runtime.settings.close_timeout_s
        s.client.take()
        assert s.owner.reading and bytes(s.client.sent) == b"hello"
        s.owner.capacity = 2
        s.client.feed(b"world")
        assert (s.owner.reading, s.client.reading) == (True, False)
        s.owner.take()
        assert s.client.reading and bytes(s.owner.sent) == b"world"
        end_the_owner(s)


def test_an_owner_that_reads_nothing_sets_no_deadline() -> None:
    with sides() as s:
        s.owner.capacity = 0
        s.client.feed(b"hello")
        assert s.tunnel.due_at == NEVER
        s.r.pass_time(s.r.runtime.settings.stall_timeout_s + 1)
        assert not s.client.closed and not s.owner.closed
        s.owner.take()
        end_the_owner(s)


def test_a_client_that_has_caught_up_has_no_deadline() -> None:
    with sides() as s:
        s.client.capacity = 0
        s.owner.feed(b"hello")
        s.client.take()
        s.r.pass_time(s.r.runtime.settings.close_timeout_s + 1)
        assert s.tunnel.due_at == NEVER and not s.client.closed
        end_the_owner(s)


def test_a_half_closed_client_still_gets_the_rest() -> None:
    with sides() as s:
        s.client.fin()
        assert s.owner.eof_sent and s.verdict is CloseReason.READER_GONE
        assert not s.client.closed
        s.owner.feed(b"the rest")
        assert bytes(s.client.sent) == b"the rest"
        end_the_owner(s)
        assert s.client.closed and not s.client.aborted


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (None, CloseReason.READER_GONE),
        (ConnectionResetError(errno.ECONNRESET, "reset"), CloseReason.READER_GONE),
        (TimeoutError(errno.ETIMEDOUT, "timed out"), CloseReason.NETWORK_LOST),
        (OSError(errno.EHOSTUNREACH, "no route"), CloseReason.NETWORK_LOST),
    ],
    ids=["closed", "reset", "timed out", "no route"],
)
@pytest.mark.parametrize("connected", [True, False], ids=["in mid-tunnel", "before the pair stands"])
def test_the_owner_learns_how_the_client_ended(error: Exception | None, verdict: CloseReason, connected: bool) -> None:
    with sides(connected=connected) as s:
        lose(s.client, error)
        s.r.turn()
        if not connected:
            s.connect()
        assert s.verdict is verdict
        if verdict is CloseReason.READER_GONE:
            assert s.r.runtime.tunnels, "the owner closes in its own time"
            end_the_owner(s)


def lose(transport: FakeTransport, error: Exception | None) -> None:
    """End the connection with this error; None: with an orderly close."""
    transport.closed = True
    transport._lose(error)


def test_the_owner_is_read_to_its_end_after_a_paused_client_is_gone() -> None:
    with sides() as s:
        s.client.capacity = 3
        s.owner.feed(b"hello")
        assert not s.owner.reading
        s.client.reset()
        s.r.turn()
        assert s.owner.reading and s.owner.eof_sent
        s.owner.feed(b"goes nowhere")
        assert bytes(s.client.sent) == b"hel"
        s.r.pass_time(s.r.runtime.settings.close_timeout_s + 1)
        assert not s.owner.closed, "the deadline was the client's"
        end_the_owner(s)


def test_a_client_may_be_paused_before_the_pair_is_connected() -> None:
    with sides(connected=False) as s:
        s.client.protocol.pause_writing()
        s.r.pass_time(s.r.runtime.settings.close_timeout_s + 1)
        assert s.tunnel.due_at == NEVER and not s.client.closed
        s.client.protocol.resume_writing()
        s.connect()
        assert s.owner.reading and s.client.reading
        end_the_owner(s)


@pytest.mark.parametrize("gone", [False, True], ids=["client there", "client gone"])
def test_a_kernel_that_refuses_our_end_ends_the_tunnel(gone: bool) -> None:
    with sides(connected=False) as s:
        s.refusal = OSError(errno.ENOSPC, "no room for another watch")
        if gone:
            s.client.reset()
            s.r.turn()
        s.connect()
        assert s.client.closed and s.over
        assert s.verdict is CloseReason.NETWORK_LOST


def counted_bug(s: Sides) -> None:
    """Check that exactly one bug was counted, and clear it: the rig must end without a bug."""
    assert [type(bug) for bug in s.r.bugs] == [ZeroDivisionError] and s.r.runtime.counters.bugs == 1
    s.r.bugs.clear()
    s.r.runtime.counters.bugs = 0


@pytest.mark.parametrize("gone", [False, True], ids=["client there", "client gone"])
def test_a_mistake_while_our_end_is_connected_ends_the_tunnel(gone: bool) -> None:
    with sides(connected=False) as s:
        s.refusal = ZeroDivisionError()
        if gone:
            s.client.reset()
            s.r.turn()
        s.connect()
        assert s.client.aborted or gone
        assert s.verdict is CloseReason.NETWORK_LOST
        counted_bug(s)


def test_a_mistake_when_our_end_has_connected_ends_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    with sides(connected=False) as s:

        def mistaken() -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(s.client, "resume_reading", mistaken)
        s.connect()
        s.r.turn()
        assert s.client.aborted and s.owner.aborted
        counted_bug(s)


def test_a_mistake_in_a_callback_of_either_side_ends_both(monkeypatch: pytest.MonkeyPatch) -> None:
    for reads, writes in (("client", "owner"), ("owner", "client")):
        with sides() as s:

            def mistaken(data: bytes) -> None:
                raise ZeroDivisionError

            monkeypatch.setattr(getattr(s, writes), "write", mistaken)
            getattr(s, reads).feed(b"hello")
            s.r.turn()
            assert s.client.aborted and s.owner.aborted
            counted_bug(s)


def test_a_mistake_behind_the_end_of_a_tunnel_is_nobodys() -> None:
    with sides() as s:
        ends = (s.client.protocol, s.owner.protocol)
        s.owner.reset()
        s.r.turn()
        assert s.over
        for end in ends:
            end.crash("here", ZeroDivisionError())
        assert s.over and not s.r.bugs


@pytest.mark.parametrize("order", ["owner first", "client first", "in one turn"])
def test_a_tunnel_is_released_once_whichever_side_ends_first(order: str) -> None:
    with sides() as s:
        if order == "owner first":
            s.owner.reset()
            s.r.turn()
            assert s.client.closed and s.over
        elif order == "client first":
            s.client.reset()
            s.r.turn()
            assert s.charged == (2, PRICE_BYTES + s.tunnel.pair_bytes), "one side is left"
            s.owner.reset()
        else:
            s.client.reset()
            s.owner.reset()
        s.r.turn()
        assert s.over and s.tunnel._client.tunnel is None and s.tunnel._owner.tunnel is None


@pytest.mark.parametrize("connected", [True, False], ids=["paused", "before the pair stands"])
def test_an_abort_counts_as_network_loss_and_drops_the_held_bytes(connected: bool) -> None:
    with sides(connected=connected) as s:
        if connected:
            s.client.capacity = 1
            s.owner.feed(b"hello")
        s.tunnel.abort()
        s.r.turn()
        if not connected:
            s.connect()
        assert s.client.aborted and s.owner.aborted and bytes(s.client.sent) == b"h" * connected
        assert s.verdict is CloseReason.NETWORK_LOST


CLOSING: dict[str, Any] = {"close_timeout_s": 5.0, "stall_timeout_s": 30.0}


def stalled(s: Sides, data: bytes = b"x" * 100) -> None:
    """Let the client take nothing, so that the owner isn't read, and then the owner close."""
    s.client.capacity = 0
    s.owner.feed(data)
    s.far.close()


def test_the_close_of_an_unread_owner_is_noticed_and_the_client_may_read_the_rest() -> None:
    with sides(**CLOSING) as s:
        stalled(s)
        s.r.pass_time(6)
        assert not s.client.aborted
        for _ in range(3):
            s.client.take(10)
            s.r.pass_time(5)
            assert not s.client.aborted, "it takes something in each period"
        s.client.take()
        assert s.client.sent == b"x" * 100 and s.owner.reading
        end_the_owner(s)
        assert not s.client.aborted


def test_a_client_that_reads_nothing_of_the_rest_is_aborted() -> None:
    with sides(**CLOSING) as s:
        stalled(s)
        s.r.pass_time(9.5)
        assert not s.client.aborted
        s.r.pass_time(2)
        assert s.client.aborted and s.owner.aborted and s.client.sent == b""


def test_a_client_that_reads_the_rest_byte_by_byte_has_until_the_stall_timeout() -> None:
    with sides(**CLOSING) as s:
        s.client.capacity = 0
        s.owner.feed(b"x" * 100)
        s.owner.reset()
        s.r.turn()
        assert s.client.closed and not s.client.lost
        for _ in range(5):
            s.client.take(1)
            s.r.pass_time(5)
        assert not s.client.aborted
        s.client.take(1)
        s.r.pass_time(6)
        assert s.client.aborted and len(s.client.sent) == 6


def test_a_living_owner_is_checked_again_while_the_client_stalls() -> None:
    with sides(**CLOSING) as s:
        s.client.capacity = 0
        s.owner.feed(b"x" * 100)
        s.r.pass_time(60)
        assert not s.client.closed, "stalls are the owner's to judge"
        s.far.close()
        s.r.pass_time(11)
        assert s.client.aborted


def test_an_abandoned_tunnel_gives_back_its_price_and_both_descriptors() -> None:
    with rig() as r:
        tunnel = open_tunnel(r.runtime, PRICE_BYTES)
        assert isinstance(tunnel, Tunnel)
        assert charged(r) == (1, tunnel.pair_bytes)
        tunnel.give_up()
        assert charged(r) == (0, 0)
        assert (tunnel._near.fileno(), tunnel.far.fileno()) == (-1, -1)
        assert not r.runtime.tunnels


def test_a_client_that_leaves_with_its_request_counts_as_a_reader_that_left(files: tuple[Path, Path]) -> None:
    """The client's close_notify arrives in the same read as the request, before the pair is connected."""

    async def main() -> None:
        async with tunnelled(files, LONG) as s:
            await s.generation()
            (stream,) = s.p.b.streams
            leaver = await s.client()
            leaver.tls.write(get(f"/v1/streams/{stream.id}"))
            with contextlib.suppress(ssl.SSLWantReadError):
                leaver.tls.unwrap()
            await leaver.flush()
            await s.p.b.until(lambda: s.p.b.runtime.counters.connections_closed[CloseReason.READER_GONE] == 2)
            assert len(stream.readers) == 1 and stream.reason is None
            s.clients[1].sock.close()

    run(main)


def test_a_client_that_the_network_lost_has_its_grace_at_the_owner(files: tuple[Path, Path]) -> None:
    async def main() -> None:
        async with tunnelled(files, LONG) as s:
            await s.generation()
            (stream,) = s.p.b.streams
            (tunnel,) = s.p.a.runtime.tunnels
            tunnel.client_lost()  # what a time-out of its socket comes to
            await s.p.b.until(lambda: not stream.readers)
            assert stream.reason is None and stream.grace_until
            assert s.p.b.runtime.counters.connections_closed[CloseReason.NETWORK_LOST] == 1
            again = await s.client(get(f"/v1/streams/{stream.id}"), at="b")
            while b"data: " not in again.received:
                await again.read()
            again.sock.close()

    run(main)
