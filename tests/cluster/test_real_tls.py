"""TLS to the engine: the wheel of Valkey has none, so Debian's redis-server is tried, where it is installed."""

from __future__ import annotations

import shutil
import socket
import ssl
from pathlib import Path

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from nodes import nodes, start_engine
from real_engine import RealEngine, engines
from served import served
from tlspeer import client_context, make_certificate

pytestmark = pytest.mark.cluster


class TlsEngine(RealEngine):
    """A server that speaks TLS alone."""

    def __init__(self, cert: Path, key: Path) -> None:
        super().__init__()
        self._context = client_context(cert)
        files = ("--tls-cert-file", str(cert), "--tls-key-file", str(key), "--tls-ca-cert-file", str(cert))
        self.options = ("--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no", *files)

    @property
    def url(self) -> str:
        return f"valkeys://127.0.0.1:{self.port}"

    def connected(self) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        return self._context.wrap_socket(plain)


@pytest.fixture
def tls_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TlsEngine:
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("there is no redis-server: apt-get install redis-server")
    monkeypatch.setenv("VALKEY_SERVER", program)
    return TlsEngine(*make_certificate(tmp_path))


def test_streams_go_over_an_engine_with_tls_and_an_authority_of_ones_own(tls_engine: TlsEngine, tmp_path: Path) -> None:
    trust = ("--engine-ca-file", str(tmp_path / "cert.pem"))
    with engines(tls_engine):
        start_engine(tls_engine)
        with nodes(*trust, engine=tls_engine, url=tls_engine.url) as n:
            at_a = n.start("a", tokens=100, interval_ms=20).read(10)
            at_b = n.read("b", at_a.stream_id).to_the_end()
            at_a.to_the_end()
            assert at_b.text == at_a.text and at_a.events[-1].data == "[DONE]"


def test_an_engine_with_a_certificate_of_nobody_known_is_an_error(tls_engine: TlsEngine) -> None:
    with engines(tls_engine):
        start_engine(tls_engine)
        with served("--engine", tls_engine.url, "--upstream", "http://127.0.0.1:1") as d:
            d.notify.until("READY=1")
            assert "certificate verify failed" in d.line(r" ERROR engine down.*")[0].lower()
