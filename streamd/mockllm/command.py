"""`streamd mock-llm`: turns flags into a server that runs until a signal stops it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import resource
import signal
import sys
from collections.abc import Callable

import uvloop

from streamd.mockllm.faults import BadOption, describe, parse_faults
from streamd.mockllm.options import MockOptions, parse_count, parse_integer, parse_seconds
from streamd.mockllm.server import start_mock


def _checked(parse: Callable[[str], object]) -> Callable[[str], object]:
    """Turn BadOption into argparse's exception, so that argparse shows the reason."""

    def argument(value: str) -> object:
        try:
            return parse(value)
        except BadOption as wrong:
            raise argparse.ArgumentTypeError(str(wrong)) from None

    return argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Put the mock's flags on a parser."""
    defaults = MockOptions()
    parser.description = (
        "A synthetic server for the OpenAI and Anthropic HTTP APIs. It writes readable text; no model is asked."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "The headers X-Mock-Tokens, X-Mock-Interval-Ms, X-Mock-Jitter-Ms, X-Mock-Ttft-Ms, X-Mock-Text-Seed,\n"
        "X-Mock-Stamp and X-Mock-Fault change these for one request. Faults, several joined with `;`:\n" + describe()
    )
    milliseconds, default_ms = _checked(parse_seconds), "(default %d)"
    add = parser.add_argument
    add(
        "--listen",
        default="127.0.0.1:8000",
        metavar="HOST:PORT",
        help="port 0: the kernel chooses (default %(default)s)",
    )
    for flag, key, doc in (
        ("--interval-ms", "interval_s", "time between two tokens of a stream; 0: as fast as it goes"),
        ("--jitter-ms", "jitter_s", "each interval is off by up to this much"),
        ("--ttft-ms", "ttft_s", "time to the first event"),
    ):
        default_s = getattr(defaults, key)
        add(
            flag,
            dest=key,
            type=milliseconds,
            default=default_s,
            metavar="MS",
            help=f"{doc} {default_ms % (default_s * 1000)}",
        )
    add(
        "--tokens",
        type=_checked(parse_count),
        default=defaults.tokens,
        metavar="N",
        help="tokens of an answer (default %(default)s)",
    )
    add(
        "--seed",
        type=_checked(parse_integer),
        default=defaults.seed,
        metavar="N",
        help="seed of texts and jitter (default %(default)s)",
    )
    add("--stamp", action="store_true", help="tokens are `@<monotonic ns> ` in place of text")
    add(
        "--model",
        action="append",
        dest="models",
        metavar="NAME",
        help="a model to list, may be repeated (default mock-llm)",
    )
    add("--fault", action="append", default=[], metavar="FAULT", help="see below, may be repeated")


def from_arguments(args: argparse.Namespace) -> MockOptions:
    """The options that the flags give. Raises BadOption."""
    return MockOptions(
        interval_s=args.interval_s,
        jitter_s=args.jitter_s,
        ttft_s=args.ttft_s,
        tokens=args.tokens,
        seed=args.seed,
        stamp=args.stamp,
        models=tuple(args.models or MockOptions().models),
        faults=parse_faults(";".join(args.fault)),
    )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status. Prints the URL once the mock listens."""
    try:
        options = from_arguments(args)
        host, port = _address(args.listen)
    except BadOption as wrong:
        print(f"mock-llm: {wrong}", file=sys.stderr)
        return 2
    _raise_descriptor_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(_serve(host, port, options))
        except OSError as wrong:
            print(f"mock-llm: can't listen on {args.listen}: {wrong}", file=sys.stderr)
            return 1
    return 0


def _address(listen: str) -> tuple[str, int]:
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise BadOption(f"--listen takes HOST:PORT, not {listen!r}")
    return host.strip("[]") or "127.0.0.1", int(port)


def _raise_descriptor_limit() -> None:
    """Raise the limit to the hard limit: each stream needs a descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it; then fewer streams are possible
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _serve(host: str, port: int, options: MockOptions) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    server = await start_mock(loop, host, port, options)
    print(f"mock-llm listening on {server.url}", flush=True)
    await stop.wait()
    server.close()
