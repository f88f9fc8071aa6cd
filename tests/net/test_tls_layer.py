"""TlsLayer: a write never raises, whatever OpenSSL, memory or the socket refuses."""

from __future__ import annotations

import ssl

import pytest
from fakes import FakeTransport, rig

from streamd.net.client import ClientConnection
from streamd.net.tls import PIECE_BYTES_MAX, TlsLayer
from streamd.reasons import CloseReason


class Refusing:
    """An SSLObject that refuses every write."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def write(self, data: bytes) -> int:
        raise self.error

    def unwrap(self) -> None:
        raise self.error


@pytest.mark.parametrize("size", [1, PIECE_BYTES_MAX + 1])
@pytest.mark.parametrize(
    ("error", "reason", "counter"),
    [
        (ssl.SSLWantReadError(), CloseReason.TLS_FAILED, "tls_refused"),  # half of a KeyUpdate came
        (ssl.SSLError("bad length"), CloseReason.TLS_FAILED, "tls_refused"),
        (BrokenPipeError(), CloseReason.NETWORK_LOST, "transport_refused"),
        (MemoryError(), CloseReason.OVER_BUDGET, "no_memory"),
        (RuntimeError("closed"), CloseReason.INTERNAL, "bugs"),
    ],
)
def test_a_write_that_is_refused_ends_the_connection_and_raises_nothing(
    error: Exception, reason: CloseReason, counter: str, size: int
) -> None:
    with rig() as r:
        connection = ClientConnection(r.worker.application, r.worker.entrance("loopback"))
        layer = TlsLayer(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), connection)
        transport = FakeTransport(r.loop, layer)
        layer.connection_made(transport)
        layer._open = True
        layer._tls = Refusing(error)  # type: ignore[assignment]
        layer.write(b"x" * size)
        layer.write(b"x" * size)  # the rest of a hand-out, before the loss is known
        assert transport.aborted and not transport.sent
        assert connection in r.runtime.clients  # no reader may leave within a hand-out
        r.turn()
        assert r.closed == {reason: 1}
        assert getattr(r.runtime.counters, counter) == 1
        r.runtime.counters.bugs = 0
        r.bugs.clear()
