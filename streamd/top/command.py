"""The command line of `streamd top`. It imports the library for terminals only when the command runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Final

from streamd.daemon import admin_cli
from streamd.daemon.admin_client import AdminUnreachableError
from streamd.daemon.complaint import complain
from streamd.extras import missing_extra
from streamd.rows import Refused, format_duration, parse_duration
from streamd.top.views import DEFAULT_VIEW, VIEWS

EXIT_USAGE: Final = 2

# Seconds between looks. A look costs the daemon some milliseconds, and a person reads no faster than five a second.
INTERVAL_S: Final = 1.0
INTERVAL_S_MIN: Final = 0.2
INTERVAL_S_MAX: Final = 60.0

_NO_TERMINAL: Final = "top needs a terminal; for scripts there are streamd status, streams and readers with --json"


def fill(parser: argparse.ArgumentParser) -> None:
    """Put the arguments of `top` on its parser."""
    admin_cli.add_address(parser)
    parser.add_argument(
        "--interval",
        metavar="DURATION",
        type=_interval_s,
        default=INTERVAL_S,
        help=f"time between two looks at the daemon [{format_duration(INTERVAL_S)}]",
    )
    parser.add_argument(
        "--filter",
        metavar="TEXT",
        default="",
        help="only rows with all of these words; key=NAME, model=NAME, upstream=NAME and stream=ID are exact",
    )
    parser.add_argument("--view", choices=tuple(VIEWS), default=DEFAULT_VIEW, help=f"the first table [{DEFAULT_VIEW}]")


def _interval_s(raw: str) -> float:
    try:
        value = parse_duration(raw)
    except Refused as error:
        raise argparse.ArgumentTypeError(f"{raw!r} has to be {error}") from None
    if not INTERVAL_S_MIN <= value <= INTERVAL_S_MAX:
        bounds = f"{format_duration(INTERVAL_S_MIN)} to {format_duration(INTERVAL_S_MAX)}"
        raise argparse.ArgumentTypeError(f"{raw!r} has to be a duration from {bounds}")
    return value


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Show the tables until the user quits. Returns the exit status, after a line on stderr where they can't be shown.

    `environ`: a NO_COLOR in it, even an empty one, turns colours off.
    """
    if missing := missing_extra("top"):
        complain(f"top {missing}")
        return EXIT_USAGE
    # The library draws on standard error.
    if not all(each.isatty() for each in (sys.stdin, sys.stdout, sys.stderr)):
        complain(_NO_TERMINAL)
        return EXIT_USAGE
    try:
        client = admin_cli.client_of(args)
    except AdminUnreachableError as error:
        complain(str(error))
        return admin_cli.EXIT_UNREACHABLE
    from streamd.top.app import TopApp

    app = TopApp(
        client, interval_s=args.interval, view=args.view, filter_text=args.filter, colours="NO_COLOR" not in environ
    )
    app.run()
    return app.return_code or 0
