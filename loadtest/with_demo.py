"""Run a load generator against the synthetic upstream with streamd in front of it: `with_demo.py -- locust …`.

Adds `--host URL` to the command. Both servers are started for it and stopped after it; its exit status is returned.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys

from streamd.demo import launch

UPSTREAM = ("mock-llm", "--listen", "127.0.0.1:0", "--interval-ms", "50", "--jitter-ms", "15")


def free_address() -> str:
    """A HOST:PORT without a listener at present."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1", help="of streamd (default 1: locust needs the other core)")
    parser.add_argument("command", nargs="+", help="the command to run, after --")
    options = parser.parse_args()
    address = free_address()
    try:
        with launch.Launcher().running() as children:
            upstream = children.start("mock-llm", (sys.executable, "-m", "streamd", *UPSTREAM))
            url = children.wait_url(upstream)
            serve = ("--listen", address, "--upstream", url, "--workers", options.workers, "--log-level", "warning")
            children.wait_ready(children.start("streamd", (*launch.STREAMD, *serve)), address)
            return subprocess.run([*options.command, "--host", f"http://{address}"], check=False).returncode
    except launch.Stopped:
        return 130
    except launch.LaunchError as wrong:
        print(f"{wrong}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
