"""Apache, lighttpd, Varnish, h2o and Envoy with the configurations of examples/proxies, on a port of the loopback in
front of a running streamd.

Only places are changed: addresses, certificate, folders. Why a port: Apache listens on no Unix socket.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tools
from fronts import EXAMPLES, POLL_S, certificate, changed
from inprocess import WAIT_S

SHARED = "/usr/local/share/streamd/examples"
CERTIFICATE, KEY = "/etc/ssl/chat.example.com.pem", "/etc/ssl/private/chat.example.com.key"
APACHE_MODULES = ("mpm_event", "authz_core", "proxy", "proxy_http", "ssl", "http2", "headers", "env", "socache_shmcb")
IS_ROOT = os.geteuid() == 0


@dataclass
class Place:
    """The places of a front: its folder, its port, and the port of streamd."""

    folder: Path
    port: int
    streamd: int

    @property
    def shared(self) -> dict[str, str]:
        """What all configurations with TLS have."""
        files = {CERTIFICATE: f"{self.folder}/cert.pem", KEY: f"{self.folder}/key.pem"}
        return files | {SHARED: str(EXAMPLES)}

    def write(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return str(path)


def apache(at: Place) -> list[str]:
    """Write the configuration and return the command; the modules are those that its first lines name."""
    vhost = changed("apache.conf", {"*:443": f"*:{at.port}", "127.0.0.1:8080": f"127.0.0.1:{at.streamd}", **at.shared})
    lines = [f"ServerRoot {at.folder}", f"PidFile {at.folder}/pid", "ErrorLog /dev/stderr", "ServerName localhost"]
    lines += [f"Listen 127.0.0.1:{at.port}", *(["User www-data", "Group www-data"] if IS_ROOT else [])]
    lines += [f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so" for name in APACHE_MODULES]
    return ["apache2", "-X", "-f", at.write("apache.conf", "\n".join([*lines, vhost]))]


def lighttpd(at: Place) -> list[str]:
    """Write the configuration and return the command."""
    places = {"server.port = 443": f'server.bind = "127.0.0.1"\nserver.port = {at.port}'}
    places |= {'"port" => 8080': f'"port" => {at.streamd}', **at.shared}
    return ["lighttpd", "-D", "-f", at.write("lighttpd.conf", changed("lighttpd.conf", places))]


def varnish(at: Place) -> list[str]:
    """Write the configuration and return the command."""
    path = at.write("varnish.vcl", changed("varnish.vcl", {'"8080"': f'"{at.streamd}"'}))
    at_port = ["-a", f"127.0.0.1:{at.port}", "-n", f"{at.folder}/v", "-s", "malloc,20m"]
    return ["varnishd", "-F", "-j", "none", "-f", path, *at_port]


def h2o(at: Place) -> list[str]:
    """Write the configuration and return the command."""
    places = {"port: 443": f"port: {at.port}\n      host: 127.0.0.1", "127.0.0.1:8080": f"127.0.0.1:{at.streamd}"}
    user = "user: root\n" if IS_ROOT else ""
    return ["h2o", "-c", at.write("h2o.conf", user + changed("h2o.conf", places | at.shared))]


def envoy(at: Place) -> list[str]:
    """Write the configuration and return the command."""
    places = {"0.0.0.0, port_value: 443": f"127.0.0.1, port_value: {at.port}", "8080": str(at.streamd)}
    files = {old: new for old, new in at.shared.items() if old != SHARED}
    path = at.write("envoy.yaml", changed("envoy.yaml", places | files))
    program = str(tools.TOOLS["envoy"].path())
    return [program, "-c", path, "--concurrency", "1", "--disable-hot-restart", "-l", "warning"]


FRONTS: dict[str, Callable[[Place], list[str]]] = {
    "apache2": apache,
    "lighttpd": lighttpd,
    "varnish": varnish,
    "h2o": h2o,
    "envoy": envoy,
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(kind: str, streamd_url: str, folder: Path) -> Iterator[str]:
    """A running front; yields its address."""
    folder.chmod(0o755)  # Apache's processes have a user of their own
    at = Place(folder, free_port(), int(streamd_url.rpartition(":")[2]))
    certificate(folder)
    log = (folder / "log").open("wb")
    with (
        log,
        subprocess.Popen(FRONTS[kind](at), stdout=log, stderr=log, env=os.environ | {"PATH": tools.PATH}) as process,
    ):
        try:
            _wait_until_up(at, process)
            yield f"{'http' if kind == 'varnish' else 'https'}://127.0.0.1:{at.port}"
        finally:
            process.terminate()
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_up(at: Place, process: subprocess.Popen[bytes]) -> None:
    """Wait until the front accepts. Fails with its log if the front ended instead."""
    for _ in range(round(WAIT_S / POLL_S)):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", at.port), 1):
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
            break
    raise AssertionError((at.folder / "log").read_text(encoding="utf-8", errors="replace"))
