"""`streamd demo`, and `make run`: the synthetic upstream with streamd in front of it, pages to open and curl lines."""

from __future__ import annotations

import argparse
import sys

from streamd.demo import launch

DEMO = launch.Demo(
    about="mock-llm, a synthetic model",
    command=(sys.executable, "-m", "streamd", "mock-llm", "--listen", "127.0.0.1:0", "--jitter-ms", "15"),
    path="/v1/chat/completions",
    body={"model": "mock-llm", "stream": True, "messages": [{"role": "user", "content": "Tell me about streams."}]},
    has_pages=True,
    again="streamd demo --listen 127.0.0.1:{port} (make run LISTEN=127.0.0.1:{port})",
)
DEFAULT_LISTEN = "127.0.0.1:8080"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Put the flags of `streamd demo` on a parser."""
    parser.description = (
        "Run streamd in front of a synthetic model, and print the addresses of a chat page and of the operations page,"
        " which has the next port if that is free."
    )
    parser.add_argument(
        "--listen",
        type=_listen,
        default=DEFAULT_LISTEN,
        metavar="HOST:PORT",
        help="a loopback address (default %(default)s)",
    )


def _listen(text: str) -> str:
    try:
        return launch.checked_listen(text)
    except ValueError as wanted:
        raise argparse.ArgumentTypeError(f"takes {wanted}, not {text!r}") from None


def run(args: argparse.Namespace) -> int:
    """Run the demonstration until Ctrl-C; returns the exit status."""
    return launch.launch(args.listen, DEMO)
