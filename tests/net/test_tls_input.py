"""The TLS layer over a transport with a capacity that the test sets: its input is bounded like any other."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest
from fakes import PLENTY, Answer, FakeTransport, Rig, answers_in, get, rig
from tlspeer import client_context, make_certificate

from streamd.net.client import ClientConnection
from streamd.net.tls import HELD_BYTES_MAX, PIECE_BYTES_MAX, RECORD_BYTES_MIN, TlsLayer, load_context
from streamd.net.turns import CONNECTION_PIECES_MAX, TURN_PIECES_MAX, Turns
from streamd.reasons import CloseReason


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


class Peer:
    """A client on a fake transport."""

    def __init__(self, r: Rig, files: tuple[Path, Path], capacity: int = PLENTY) -> None:
        self.rig = r
        self.connection = ClientConnection(r.worker.application, r.worker.entrance("loopback"))
        self.layer = TlsLayer(load_context(*files), self.connection)
        self.transport = FakeTransport(r.loop, self.layer, capacity)
        self.layer.connection_made(self.transport)
        self._into, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = client_context(files[0]).wrap_bio(self._into, self._out, server_hostname="streamd.test")
        self.read = b""

    def said(self) -> bytes:
        """The bytes that this side wants to send."""
        return self._out.read()

    def hello(self) -> bytes:
        with pytest.raises(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self.said()

    def hear(self) -> None:
        self._into.write(bytes(self.transport.sent))
        self.transport.sent.clear()

    def shake(self) -> Peer:
        self.transport.feed(self.hello())
        self.rig.turn()
        self.hear()
        self.tls.do_handshake()
        self.transport.feed(self.said())
        self.rig.turn()
        return self

    def encrypted(self, data: bytes, size: int = 16384) -> bytes:
        """Records of `size` bytes each."""
        for at in range(0, len(data), size):
            self.tls.write(data[at : at + size])
        return self.said()

    def answers(self) -> list[Answer]:
        self.hear()
        try:
            while piece := self.tls.read(65536):
                self.read += piece
        except ssl.SSLWantReadError:
            pass
        return answers_in(self.read)

    def leave(self) -> None:
        self.transport.reset()
        self.rig.turn()


class Decrypted:
    """Counts the records that OpenSSL opened in each turn."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = self.worst = 0
        read, begin = ssl.SSLObject.read, Turns._begin

        def counted(tls: ssl.SSLObject, *given: Any) -> Any:
            found = read(tls, *given)
            self.now += 1
            return found

        def begin_turn(turns: Turns) -> None:
            self.end_turn()
            begin(turns)

        patch.setattr(ssl.SSLObject, "read", counted)
        patch.setattr(Turns, "_begin", begin_turn)

    def end_turn(self) -> None:
        self.worst = max(self.worst, self.now)
        self.now = 0


def test_records_of_a_byte_share_a_turn(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with rig() as r:
        peers = [Peer(r, files).shake() for _ in range(10)]
        wires = [peer.encrypted(get() * 20, size=1) for peer in peers]
        counted = Decrypted(monkeypatch)
        for peer, wire in zip(peers, wires, strict=True):
            peer.transport.feed(wire)
        r.turn()
        counted.end_turn()
        step = PIECE_BYTES_MAX // RECORD_BYTES_MIN
        assert CONNECTION_PIECES_MAX < counted.worst <= TURN_PIECES_MAX + CONNECTION_PIECES_MAX + step
        for peer in peers:
            assert [answer.status for answer in peer.answers()] == [200] * 20
            assert peer.transport.reading and not peer.layer._held
            peer.leave()


def test_openssl_gets_nothing_from_a_peer_that_takes_nothing(files: tuple[Path, Path]) -> None:
    with rig() as r:
        peer = Peer(r, files).shake()
        peer.answers()
        peer.transport.capacity = 10
        peer.transport.feed(peer.encrypted(get()))
        r.turn()
        assert peer.connection.paused
        held = len(peer.transport.held)
        more = peer.encrypted(b"x" * 2 * HELD_BYTES_MAX, size=100)
        fed = 0
        while peer.transport.reading:
            peer.transport.feed(more[fed : fed + 1000])
            fed += 1000
        assert HELD_BYTES_MAX < fed <= HELD_BYTES_MAX + 1000 and len(peer.layer._held) == fed
        assert peer.layer._incoming.pending == 0 and len(peer.transport.held) == held
        peer.transport.take()
        r.turn()
        assert not peer.layer._held and peer.transport.reading
        assert peer.answers()[0].status == 200
        peer.leave()


def test_a_fin_of_a_peer_that_takes_nothing_is_seen(files: tuple[Path, Path]) -> None:
    with rig() as r:
        peer = Peer(r, files).shake()
        peer.answers()
        peer.transport.capacity = 10
        peer.transport.feed(peer.encrypted(get()) + peer.encrypted(get()))
        r.turn()
        peer.transport.fin()
        assert peer.transport.closed
        peer.transport.reset()
        r.turn()


def test_an_end_behind_requests_that_wait_comes_after_them(files: tuple[Path, Path]) -> None:
    with rig() as r:
        peer = Peer(r, files).shake()
        wire = peer.encrypted(get() * 30)
        with pytest.raises(ssl.SSLWantReadError):
            peer.tls.unwrap()
        peer.transport.feed(wire + peer.said())
        peer.transport.fin()
        r.turn()
        assert r.runtime.counters.requests == 30 and peer.transport.closed


def test_handshakes_wait_for_a_turn_and_bring_their_requests(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    shake = ssl.SSLObject.do_handshake

    def counted(tls: ssl.SSLObject) -> None:
        nonlocal steps
        steps += tls.server_side
        shake(tls)

    monkeypatch.setattr(ssl.SSLObject, "do_handshake", counted)
    with rig() as r:
        peer = Peer(r, files)
        peer.transport.feed(peer.hello())
        assert steps == 0 and r.runtime.handshakes.waiting == 1 and not peer.transport.reading
        r.turn()
        assert steps == 1 and peer.transport.reading
        peer.hear()
        peer.tls.do_handshake()
        peer.transport.feed(peer.said() + peer.encrypted(get()))
        r.turn()
        assert [answer.status for answer in peer.answers()] == [200]
        peer.leave()


def test_a_hello_that_announces_much_gets_an_alert(files: tuple[Path, Path]) -> None:
    with rig() as r:
        peer = Peer(r, files)
        peer.transport.feed(b"\x16\x03\x01\x00\x50\x01\x01\xff\xb8" + bytes(76))
        r.turn()
        assert bytes(peer.transport.sent) == b"\x15\x03\x03\x00\x02\x02\x28"
        assert peer.transport.lost and r.closed == {CloseReason.TLS_FAILED: 1}


def test_a_handshake_too_many_is_given_up(files: tuple[Path, Path]) -> None:
    with rig() as r:
        peer = Peer(r, files)
        peer.transport.feed(peer.hello())
        r.runtime.handshakes._rotation.pop_surplus().give_up()
        r.turn()
        assert peer.transport.lost and r.closed == {CloseReason.OVER_BUDGET: 1}
