"""nginx, Caddy and HAProxy with the configurations of examples/proxies, on a Unix socket in front of a running streamd.

Only places are changed: addresses, certificate, folders. Why a Unix socket: none of the three reports the port that
the kernel chose for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tools
from inprocess import WAIT_S, Watched, url_of

EXAMPLES = Path(__file__).parents[1] / "examples"
HOST = "chat.example.com"
POLL_S = 0.02
SUN_PATH_BYTES_MAX = 100  # 107 by unix(7)


@dataclass
class Place:
    """The places of a front: its folder, its socket, and streamd's host:port."""

    folder: Path
    socket: Path
    streamd: str

    @property
    def both_pem(self) -> Path:
        return self.folder / "both.pem"


def certificate(folder: Path) -> None:
    """A self-signed certificate: cert.pem, key.pem, and both.pem with the two of them."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    names = f"subjectAltName=DNS:{HOST},DNS:localhost,IP:127.0.0.1"
    request = ["openssl", "req", "-x509", "-days", "2", "-subj", f"/CN={HOST}", "-addext", names]
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(key)]
    subprocess.run([*request, *new_key, "-out", str(cert)], check=True, capture_output=True)
    (folder / "both.pem").write_bytes(cert.read_bytes() + key.read_bytes())


def changed(name: str, places: dict[str, str]) -> str:
    """An example with its places replaced; each of them must occur in it."""
    text = (EXAMPLES / "proxies" / name).read_text(encoding="utf-8")
    for old, new in places.items():
        assert old in text, f"{name} has no {old!r} any more"
        text = text.replace(old, new)
    return text


def nginx(at: Place) -> list[str]:
    """Write the configuration and return the command."""
    temporary = "".join(
        f"    {kind}_temp_path {at.folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;\n" if os.geteuid() == 0 else ""
    text = changed(
        "nginx.conf",
        {
            "worker_processes auto;\nworker_rlimit_nofile 40000;": f"{user}daemon off;\npid {at.folder}/nginx.pid;",
            "worker_connections 20000;": "worker_connections 200;",
            "http {\n": "http {\n" + temporary,
            "listen 443 ssl http2;": f"listen unix:{at.socket} ssl http2;",
            "/etc/ssl/chat.example.com.pem": f"{at.folder}/cert.pem",
            "/etc/ssl/private/chat.example.com.key": f"{at.folder}/key.pem",
            "127.0.0.1:8080": at.streamd,
            "/usr/local/share/streamd/examples": str(EXAMPLES),
        },
    )
    (at.folder / "nginx.conf").write_text(text, encoding="utf-8")
    return ["nginx", "-e", "stderr", "-p", str(at.folder), "-c", str(at.folder / "nginx.conf")]


def caddy(at: Place, extra: str = "") -> list[str]:
    """Write the configuration and return the command. `extra` is a further line of its reverse_proxy."""
    options = "{\n\tadmin off\n\tauto_https disable_redirects\n\tskip_install_trust\n}\n"
    text = changed(
        "Caddyfile",
        {
            f"{HOST} {{\n": f"https://{HOST}, https://localhost, https://127.0.0.1 {{\n"
            f"\tbind unix/{at.socket}\n\ttls {at.folder}/cert.pem {at.folder}/key.pem\n",
            "reverse_proxy 127.0.0.1:8080 {\n": f"reverse_proxy {at.streamd} {{\n{extra}\n",
            "/usr/local/share/streamd/examples": str(EXAMPLES),
        },
    )
    (at.folder / "Caddyfile").write_text(options + text, encoding="utf-8")
    return ["caddy", "run", "--config", str(at.folder / "Caddyfile"), "--adapter", "caddyfile"]


def haproxy(at: Place) -> list[str]:
    """Write the configuration and return the command."""
    text = changed(
        "haproxy.cfg",
        {
            "maxconn 20000": "maxconn 200",
            "bind :443 ssl crt /etc/ssl/private/chat.example.com.pem": f"bind unix@{at.socket} ssl crt {at.both_pem}",
            "127.0.0.1:8080": at.streamd,
        },
    )
    (at.folder / "haproxy.cfg").write_text(text, encoding="utf-8")
    return ["haproxy", "-db", "-f", str(at.folder / "haproxy.cfg")]


FRONTS: dict[str, Callable[[Place], list[str]]] = {"nginx": nginx, "caddy": caddy, "haproxy": haproxy}


@contextlib.contextmanager
def running(make: Callable[[Place], list[str]], streamd_url: str, folder: Path) -> Iterator[Path]:
    """A running front; yields its socket."""
    at = Place(folder, folder / "s", streamd_url.removeprefix("http://"))
    assert len(str(at.socket)) < SUN_PATH_BYTES_MAX
    certificate(folder)
    home = {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "PATH": tools.PATH}
    log = (folder / "log").open("wb")
    with log, subprocess.Popen(make(at), stdout=log, stderr=log, env=os.environ | home) as process:
        try:
            wait_until_up(at, process, folder / "log")
            yield at.socket
        finally:
            process.terminate()
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_up(at: Place, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the front accepts. Fails with its log if the front ended instead."""
    for _ in range(round(WAIT_S / POLL_S)):
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(at.socket))
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
            break
    raise AssertionError(log.read_text(encoding="utf-8", errors="replace"))


class Door(Watched):
    """A TCP port, chosen by the kernel, that leads to a Unix socket: browsers can't connect to Unix sockets."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.url = ""
        self.connections = 0
        self._path = path
        self._server: asyncio.Server

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = url_of(self._server.sockets[0].getsockname()).replace("http:", "https:")

    def close(self) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        back_reader, back_writer = await asyncio.open_unix_connection(str(self._path))
        await asyncio.gather(self._copy(reader, back_writer), self._copy(back_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(65536):
                writer.write(piece)
                await writer.drain()
        writer.close()
