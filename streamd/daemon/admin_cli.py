"""The commands for a running daemon: `streamd status`, `streams`, `readers`, `usage`, `upstreams`, `kill`, `drain` and
`log-level`. Each asks over the admin surface, prints for people or with --json for programs, and ends with an exit
status that scripts can use (EXITS).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from streamd.addresses import parse_address
from streamd.daemon.admin_client import AdminClient, AdminRefusedError, AdminUnreachableError
from streamd.log_levels import LEVELS
from streamd.rows import Refused

# The packaged daemon's (systemd/streamd-admin.socket).
DEFAULT_ADDRESS: Final = "unix:/run/streamd/admin.sock"
# The daemon's own setting, so that a shell for a daemon by hand needs it once.
ADDRESS_VARIABLE: Final = "STREAMD_ADMIN"

EXIT_DONE: Final = 0
EXIT_REFUSED: Final = 1
EXIT_UNREACHABLE: Final = 3
EXIT_NOTHING: Final = 4
EXIT_UNWELL: Final = 5
EXIT_INCOMPLETE: Final = 6

EXIT_INTERRUPTED: Final = 128 + signal.SIGINT

# By the code of the daemon's refusal; all others are EXIT_REFUSED.
_STATUS_OF: Final = {
    "nothing_to_end": EXIT_NOTHING,
    "not_draining": EXIT_NOTHING,
    "key_not_found": EXIT_NOTHING,
    "worker_busy": EXIT_INCOMPLETE,
}

# Exit statuses beyond 0 and 2, for the man page.
EXITS: Final = (
    (str(EXIT_REFUSED), "The daemon refused the request; standard error has its words. Keys: the command failed."),
    (str(EXIT_UNREACHABLE), "No daemon answers at the admin address."),
    (str(EXIT_NOTHING), "kill: there is nothing of this id. drain --undo: there is no drain. log-level: no such key."),
    (str(EXIT_UNWELL), "status: it starts or drains. upstreams: a server is out. drain --wait: it was taken back."),
    (str(EXIT_INCOMPLETE), "A worker didn't answer within a second, so the table or the kill may be incomplete."),
)

# Interval of the looks of drain --wait.
WAIT_EVERY_S: Final = 0.5
# Looks of drain --wait that may meet a worker to which the order is still on its way, some milliseconds for each.
UNHEARD_MAX: Final = 2

# The kinds of object that kill ends, as the paths of the admin surface name them.
KINDS: Final = ("stream", "reader", "key")


class Column(NamedTuple):
    """A column for people: its head, its cell from a row, and the row's member that it can be sorted by."""

    head: str
    cell: Callable[[Mapping[str, Any]], str]
    member: str


def seconds(value: float | None) -> str:
    """A duration as people read it: 0.3s, 12s, 5m02s, 3h10m, 2d04h."""
    if value is None:
        return "-"
    if value < 10:
        return f"{value:.1f}s"
    whole = round(value)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02}h"


def size(value: float | None) -> str:
    """A number of bytes as people read it: 512, 1.5K, 20M."""
    if value is None:
        return "-"
    for unit in ("", "K", "M", "G"):
        if value < 1024 or unit == "G":
            return f"{value:.0f}{unit}" if value >= 10 or not unit else f"{value:.1f}{unit}"
        value /= 1024
    raise AssertionError


def shown(value: object) -> str:
    """A value in a cell. Names of models come from clients: a terminal must not obey them."""
    if value is None or value == "":
        return "-"
    text = str(value)
    return text if text.isprintable() else ascii(text)[1:-1]


def _plain(head: str, name: str) -> Column:
    return Column(head, lambda row: shown(row.get(name)), name)


def _of(head: str, used: str, limit: str) -> Column:
    """Used of a limit: `3/8`, or `3` without a limit."""
    return Column(
        head, lambda row: shown(row.get(used)) + (f"/{row[limit]}" if row.get(limit) is not None else ""), used
    )


def _seconds(head: str, name: str) -> Column:
    return Column(head, lambda row: seconds(row.get(name)), name)


_KEY = Column("KEY", lambda row: shown(row.get("key_name") or row.get("key")), "key_name")

READER_COLUMNS: Final = (
    _plain("ID", "id"),
    _KEY,
    _plain("PEER", "peer"),
    _plain("STREAM", "stream"),
    _plain("MODEL", "model"),
    _plain("UPSTREAM", "upstream"),
    _plain("STATE", "state"),
    _of("POSITION", "position", "last_seq"),
    _plain("LAG", "lag_events"),
    _seconds("BEHIND", "lag_s"),
    Column("UNSENT", lambda row: size(row.get("unsent_bytes")), "unsent_bytes"),
    _seconds("PAUSED", "paused_s"),
    _seconds("FIRST", "first_s"),
    _seconds("AGE", "age_s"),
)
STREAM_COLUMNS: Final = (
    _plain("ID", "id"),
    _KEY,
    _plain("MODEL", "model"),
    _plain("UPSTREAM", "upstream"),
    _plain("STATE", "state"),
    _plain("READERS", "subscribers"),
    _plain("EVENTS", "last_seq"),
    _plain("TOKENS", "tokens"),
    _plain("TOKENS/S", "tokens_per_s"),
    _plain("LAG", "lag_max"),
    _seconds("FIRST", "first_s"),
    _seconds("IDLE", "idle_s"),
    _seconds("AGE", "age_s"),
)
KEY_COLUMNS: Final = (
    _plain("KEY", "key"),
    _plain("NAME", "key_name"),
    _of("STREAMS", "streams", "streams_max"),
    _plain("READERS", "readers"),
    _plain("REQUESTS", "requests"),
    _plain("TOKENS/S", "tokens_per_s"),
    _of("RPM LEFT", "requests_left", "requests_per_minute"),
    _of("TPM LEFT", "tokens_left", "tokens_per_minute"),
    Column("WAIT", lambda row: seconds(row["wait_s"]) if row.get("wait_s") else "-", "wait_s"),
    _plain("REQUESTS EVER", "requests_total"),
    _plain("TOKENS EVER", "tokens_total"),
)


class TableCommand(NamedTuple):
    """A command that prints a table."""

    path: str
    sorts: tuple[str, ...]  # the first is the default
    filters: tuple[str, ...]
    columns: tuple[Column, ...]
    id_member: str


TABLES: Final = {
    "streams": TableCommand(
        "/streams",
        ("lag", "age", "idle", "tokens", "readers"),
        ("key", "upstream", "model", "stream", "state"),
        STREAM_COLUMNS,
        "id",
    ),
    "readers": TableCommand(
        "/readers",
        ("lag", "paused", "age"),
        ("key", "upstream", "model", "stream"),
        READER_COLUMNS,
        "id",
    ),
    "usage": TableCommand(
        "/keys",
        ("tokens", "streams", "readers", "requests"),
        ("key",),
        KEY_COLUMNS,
        "key",
    ),
}


# The words of help for the filters of tables.
_FILTERED_BY: Final = {
    "key": "a key, by its id or name",
    "upstream": "an upstream",
    "model": "a model",
    "stream": "a stream, by its id",
}


# -- arguments


def fill_table(parser: argparse.ArgumentParser, name: str) -> None:
    """Put the arguments of a command that prints a table on its parser."""
    table = TABLES[name]
    _fill(parser, lambda args: _table(args, table))
    parser.add_argument("--ids", action="store_true", help="only the ids, a line each, for kill and for scripts")
    parser.add_argument("--sort", choices=table.sorts, help=f"the highest first [{table.sorts[0]}]")
    parser.add_argument("--limit", metavar="N", help="rows, 1 to 1000 [100]")
    for each in table.filters:
        if each == "state":
            parser.add_argument("--state", choices=("live", "detached", "sealed"), help="only these")
        else:
            filtered_by = _FILTERED_BY[each]
            option = parser.add_argument(f"--{each}", metavar=each.upper(), help=f"only those of {filtered_by}")
            if each in ("key", "stream"):
                complete_with(option, "usage" if each == "key" else "streams")


def fill_status(parser: argparse.ArgumentParser) -> None:
    """Put the arguments of `status` on its parser."""
    _fill(parser, _status)


def fill_upstreams(parser: argparse.ArgumentParser) -> None:
    """Put the arguments of `upstreams` on its parser."""
    _fill(parser, _upstreams)


def fill_kill(parser: argparse.ArgumentParser) -> None:
    """Put the arguments of `kill` on its parser."""
    _fill(parser, _kill)
    parser.add_argument(
        "--as",
        dest="kind",
        choices=KINDS,
        help="the kind of the ids [s_… is a stream, r_… and req_… are readers, all others need --as]",
    )
    ids = parser.add_argument(
        "id",
        nargs="+",
        help="a stream, a reader or its request, or with --as key everything that a key (its id or name) holds",
    )
    complete_with(ids, "streams", "readers")


def fill_drain(parser: argparse.ArgumentParser) -> None:
    """Put the arguments of `drain` on its parser."""
    _fill(parser, _drain)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--now", action="store_true", help="end at once: readers are told their position, and cut")
    how.add_argument("--undo", action="store_true", help="take the drain back, within drain_delay")
    parser.add_argument("--wait", action="store_true", help="show the drain's progress, and return at its end")


def fill_log_level(parser: argparse.ArgumentParser) -> None:
    """Put the arguments of `log-level` on its parser."""
    _fill(parser, _log_level)
    parser.add_argument(
        "level",
        nargs="?",
        choices=LEVELS,
        help="for all requests, until the next reload or restart; without it the levels are shown",
    )
    parser.add_argument("--for", dest="for_", metavar="DURATION", help="for this time only, 0s to end it")
    watch = parser.add_mutually_exclusive_group()
    key = watch.add_argument("--key", metavar="KEY", help="debug for this key's requests alone, for 5m unless --for")
    stream = watch.add_argument("--stream", metavar="STREAM", help="debug for this stream alone")
    complete_with(key, "usage")
    complete_with(stream, "streams")


def complete_with(action: argparse.Action, *tables: str) -> None:
    """Completion of this argument asks the daemon for the ids of these tables (daemon/completion.py)."""
    action.ids_of = tables  # type: ignore[attr-defined]


def add_address(parser: argparse.ArgumentParser) -> None:
    """Put the flag for the daemon's admin address on a parser; client_of() reads it."""
    parser.add_argument(
        "--admin",
        metavar="ADDRESS",
        help=f"the daemon's admin address, unix:/path or a loopback HOST:PORT [${ADDRESS_VARIABLE}, else"
        f" {DEFAULT_ADDRESS}]",
    )


def _fill(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], int]) -> None:
    add_address(parser)
    parser.add_argument("--json", action="store_true", help="the daemon's own answer (docs/HTTP.md), for programs")
    parser.set_defaults(run=lambda args: run(args, work))


def run(args: argparse.Namespace, work: Callable[[argparse.Namespace], int]) -> int:
    """Do the work of a command; returns the exit status, after a line on stderr where it isn't done."""
    try:
        status = work(args)
        sys.stdout.flush()
        return status
    except AdminUnreachableError as error:
        _complain(str(error))
        return EXIT_UNREACHABLE
    except AdminRefusedError as error:
        _complain(shown(error))
        return _STATUS_OF.get(error.code, EXIT_REFUSED)
    except KeyboardInterrupt:  # of drain --wait; the drain goes on
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `| head` has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


def client_of(args: argparse.Namespace) -> AdminClient:
    """The client for the daemon that the command line or the environment names. Raises AdminUnreachableError."""
    text = args.admin or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
    try:
        return AdminClient(parse_address(text))
    except Refused as error:
        raise AdminUnreachableError(f"{shown(text)} is no address: {error}") from None


def _complain(text: str) -> None:
    print(f"streamd: {text}", file=sys.stderr)


# -- tables


def _table(args: argparse.Namespace, table: TableCommand) -> int:
    names = ("sort", "limit", *table.filters)
    query = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    found = client_of(args).ask("GET", table.path, query)
    rows = found["data"]
    if args.json:
        _print_json(found)
    elif args.ids:
        for row in rows:
            print(shown(row[table.id_member]))
    else:
        print_table(table.columns, rows)
        if found["total"] > len(rows):
            _complain(f"{found['total'] - len(rows)} more; --limit shows up to 1000")
    return _complete(found)


def print_table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows under the columns' heads."""
    lines = [[column.head for column in columns], *([column.cell(row) for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_json(found: Any) -> None:
    print(json.dumps(found, indent=2))


def _complete(found: Mapping[str, Any]) -> int:
    missing = found.get("workers_missing", 0)
    if missing:
        _complain(f"{missing} worker(s) didn't answer in time: this isn't all")
    return EXIT_INCOMPLETE if missing else EXIT_DONE


# -- the daemon


def _status(args: argparse.Namespace) -> int:
    found = client_of(args).ask("GET", "/status")
    if args.json:
        _print_json(found)
    else:
        for line in status_lines(found):
            print(line)
    return EXIT_DONE if found["state"] == "serving" else EXIT_UNWELL


def status_lines(found: Mapping[str, Any]) -> list[str]:
    """The answer of /status in lines for people."""
    streams = found["streams"]
    parts = found["admission"]["saturation"]
    highest = max(parts, key=lambda part: parts[part])
    workers = f", {len(found['workers'])} workers" if "workers" in found else ""
    lines = [
        f"streamd {found['version']}: {found['state']} for {seconds(found['uptime_s'])}{workers}",
        f"connections {found['connections']}, readers {found['subscribers']}",
        f"streams {streams['live']} live ({streams['detached']} of them without a reader), {streams['sealed']} sealed",
        f"saturation {parts[highest]:.2f} ({highest}), replay logs {size(found['log_bytes'])}",
    ]
    for name, upstream in found["upstreams"].items():
        lines.append(f"upstream {shown(name)}: {upstream_word(upstream)}, {upstream['in_flight']} requests")
    if found.get("drain"):
        lines.append(drain_line(found["drain"]))
    return lines


def drain_line(drain: Mapping[str, Any]) -> str:
    """The progress of a drain in a line."""
    return (
        f"draining for {seconds(drain['since_s'])} (by {drain['by']}), at most {seconds(drain['deadline_s'])} more:"
        f" {drain['left']} generations left, {drain['finished']} finished, {drain['sent_away']} readers sent away"
    )


def upstream_word(upstream: Mapping[str, Any]) -> str:
    """The state of an inference server in a word."""
    return shown(upstream.get("state") or ("out" if upstream.get("left_out") else "up"))


def _upstreams(args: argparse.Namespace) -> int:
    found = client_of(args).ask("GET", "/status")["upstreams"]
    if args.json:
        _print_json(found)
    else:
        rows = [{"name": name, **upstream} for name, upstream in found.items()]
        more = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in _KNOWN_OF_UPSTREAMS]
        columns = [_plain("NAME", "name"), Column("STATE", upstream_word, "state"), _plain("REQUESTS", "in_flight")]
        columns += [_plain("IDLE CONNECTIONS", "idle")]
        print_table([*columns, *(_plain(name.replace("_", " ").upper(), name) for name in more)], rows)
    return EXIT_UNWELL if any(upstream_word(each) in ("out", "probing") for each in found.values()) else EXIT_DONE


# Members of an upstream in /status that have columns of their own.
_KNOWN_OF_UPSTREAMS: Final = ("name", "state", "left_out", "in_flight", "idle")


def _kill(args: argparse.Namespace) -> int:
    client, status = client_of(args), EXIT_DONE
    answers = {}
    for word in args.id:
        kind = args.kind or _kind_of(word)
        if kind is None:
            _complain(f"{shown(word)}: say --as stream, --as reader or --as key")
            return 2
        try:
            answers[word] = counts = end(client, kind, word)
        except AdminRefusedError as error:
            if error.code != "nothing_to_end":
                raise
            _complain(f"{shown(word)}: there is no such {kind}")
            status = max(status, EXIT_NOTHING)
            continue
        if not args.json:
            print(f"{shown(word)}: {ended_line(counts)}")
        status = max(status, _complete(counts))
    if args.json:
        _print_json(answers)
    return status


def end(client: AdminClient, kind: str, word: str) -> Any:
    """End a stream, a reader or everything of a key, by its id. Returns the numbers that were ended.

    Raises AdminUnreachableError, and AdminRefusedError: its code is `nothing_to_end` where there is no such thing.
    """
    return client.ask("DELETE", f"/{kind}s/{urllib.parse.quote(word, safe='')}")


def ended_line(counts: Mapping[str, int]) -> str:
    """The numbers that end() returns, for people."""
    return f"ended {counts['streams']} streams, {counts['readers']} readers, {counts['requests']} waiting requests"


def _kind_of(word: str) -> str | None:
    if word.startswith("s_"):
        return "stream"
    return "reader" if word.startswith(("r_", "req_")) else None


# -- drain


def _drain(args: argparse.Namespace) -> int:
    client = client_of(args)
    if args.undo:
        return _said(args, client.ask("DELETE", "/drain"), "the drain is taken back; streamd serves")
    drain = client.ask("GET", "/status")["drain"]
    if drain is None or args.now:
        answer = client.ask("POST", "/drain")
        if drain is None and args.now:
            with contextlib.suppress(AdminUnreachableError):  # it was idle, and has ended
                client.ask("POST", "/drain")
        _said(args, answer, "ending now" if args.now else "draining")
    elif not args.json:
        print("streamd drains already; --now ends it at once")
    return _watch(client, args) if args.wait else EXIT_DONE


def _said(args: argparse.Namespace, answer: Any, text: str) -> int:
    if args.json:
        print(json.dumps(answer))
    else:
        print(text)
    return EXIT_DONE


def _watch(client: AdminClient, args: argparse.Namespace) -> int:
    """Print the drain's progress until the daemon is gone, or the drain is taken back."""
    before = ""
    unheard = 0  # looks before the first that saw the drain
    while True:
        try:
            drain = client.ask("GET", "/status")["drain"]
        except AdminUnreachableError:
            return EXIT_DONE
        if drain is None and not before and unheard < UNHEARD_MAX:
            unheard += 1
            time.sleep(WAIT_EVERY_S)
            continue
        if drain is None:
            _complain("the drain was taken back")
            return EXIT_UNWELL
        line = json.dumps(drain) if args.json else drain_line(drain)
        if line != before:
            print(line, flush=True)
        before = line
        time.sleep(WAIT_EVERY_S)


# -- log level


def _log_level(args: argparse.Namespace) -> int:
    client = client_of(args)
    query = {name: value for name, value in (("for", args.for_), ("key", args.key), ("stream", args.stream)) if value}
    if args.level is None and not query:
        levels = client.ask("GET", "/log-level")
        text = f"the log level is {levels['level']}"
        watched = [f"{shown(each.get('key') or each.get('stream'))} is watched" for each in levels["watches"]]
        return _said(args, levels, "\n".join([text, *watched]))
    client.ask("PUT", "/log-level", query, (args.level or "").encode())
    level = args.level or "debug"
    suffix = f" for {shown(args.key or args.stream)}" if args.key or args.stream else ""
    return _said(args, {"level": level, **query}, f"the log level is {level}{suffix}")
