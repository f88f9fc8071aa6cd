"""The command line: `streamd serve`, `check-config`, `config-reference`, `keys`, `mock-llm`.

The flags of `serve` are the rows of the settings; there is none beside `--config` that isn't one.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import streamd
from streamd import mockllm, reference, schema
from streamd.config import ENV_PREFIX, ROWS, SECTIONS, ConfigError, Settings, load
from streamd.daemon import keys_cli
from streamd.rows import Kind, Row

EXIT_USAGE = 2  # as argparse has it; settings that can't be used are a mistake of the same sort

_METAVARS = {
    Kind.DURATION: "DURATION",
    Kind.BYTES: "SIZE",
    Kind.COUNT: "N",
    Kind.TEXT: "TEXT",
    Kind.PATH: "FILE",
    Kind.LIST: "ENTRY",
}

_SERVE_INTRODUCTION = """\
Relay OpenAI-compatible servers to readers: every token arrives, or the reader
is told which are missing.

    streamd serve --upstream http://127.0.0.1:8000

Every setting is also a key of the file (commit_after = "10s") and a variable
(STREAMD_COMMIT_AFTER=10s). Flags win over variables, variables over the file.
`streamd config-reference` has the bounds and the reasons.
"""
_SERVE_MORE = textwrap.fill(f"--help-all also has: {'; '.join(SECTIONS[1:])}.", 79)

_SERVE: dict[str, Any] = {
    "prog": "streamd serve",
    "usage": "streamd serve [--config FILE] [--upstream URL]... [--SETTING VALUE]...",
    "description": _SERVE_INTRODUCTION,
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "allow_abbrev": False,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit status."""
    command_line = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(command_line)
    args.command_line = command_line
    try:
        status = args.run(args)
    except ConfigError as error:
        for problem in error.problems:
            print(f"streamd: {problem}", file=sys.stderr)
        return EXIT_USAGE
    assert isinstance(status, int)
    return status


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; man pages and completion are made from it."""
    parser = argparse.ArgumentParser(
        prog="streamd", description=streamd.__doc__, allow_abbrev=False, epilog="streamd COMMAND --help says more."
    )
    parser.add_argument("--version", action="version", version=f"streamd {streamd.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    serve = commands.add_parser("serve", help="run the daemon", add_help=False, **_SERVE)
    _add_settings(serve, SECTIONS, _ShortHelp)
    serve.set_defaults(run=_serve)

    check = commands.add_parser("check-config", help="say all that is wrong with a file, without starting")
    check.add_argument("file", metavar="FILE", type=Path)
    check.set_defaults(run=_check_config)

    documents = commands.add_parser("config-reference", help="print the reference of all settings")
    form = documents.add_mutually_exclusive_group()
    form.add_argument("--toml", action="store_true", help="a file with every default as a comment, to start from")
    form.add_argument("--schema", action="store_true", help="a JSON Schema of the file, for editors")
    documents.set_defaults(run=_config_reference)

    keys = commands.add_parser("keys", help="add, list and revoke API keys")
    keys_cli.add_arguments(keys)
    keys.set_defaults(run=keys_cli.run)

    mock = commands.add_parser("mock-llm", help="run the built-in synthetic upstream, for demos, tests and load")
    mockllm.add_arguments(mock)
    mock.set_defaults(run=mockllm.run)
    return parser


class _ShortHelp(argparse.Action):
    """--help of `serve`: one screen, the settings of the first section and where the others are."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        short = argparse.ArgumentParser(add_help=False, epilog=_SERVE_MORE, **_SERVE)
        _add_settings(short, SECTIONS[:1], _ShortHelp)
        short.print_help()
        parser.exit()


def _add_settings(
    parser: argparse.ArgumentParser, sections: Sequence[str], short_help: type[argparse.Action] | str
) -> None:
    first = parser.add_argument_group("to begin with")
    first.add_argument("--config", metavar="FILE", type=Path, help="the file of settings (TOML)")
    first.add_argument("--upstream", metavar="URL", action="append", help="an inference server; repeats")
    first.add_argument("--help", "-h", nargs=0, action=short_help, help="these lines")
    first.add_argument("--help-all", action="help", help="every setting")
    for section in sections:
        group = parser.add_argument_group(section)
        for row in ROWS:
            if row.section == section:
                _add_setting(group, row)


def _add_setting(group: argparse._ArgumentGroup, row: Row) -> None:
    default = f" [{row.written}]" if row.written and row.kind is not Kind.FLAG else ""
    text = (row.what + default).replace("%", "%%")
    if row.kind is Kind.FLAG:
        group.add_argument(row.flag, dest=row.dest, action=argparse.BooleanOptionalAction, default=None, help=text)
    else:
        metavar = _METAVARS.get(row.kind) or "|".join(row.words)
        action = "append" if row.kind is Kind.LIST else "store"
        group.add_argument(row.flag, dest=row.dest, metavar=metavar, action=action, help=text)


def settings_of(args: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """The settings that a `serve` command line asks for; again for each reload. Raises ConfigError."""
    flags = {row.dest: getattr(args, row.dest) for row in ROWS} | {"upstream": args.upstream}
    file = args.config
    if file is None and environ.get(f"{ENV_PREFIX}CONFIG"):
        file = Path(environ[f"{ENV_PREFIX}CONFIG"])
    return load(file=file, environ=environ, flags=flags)


def _serve(args: argparse.Namespace) -> int:
    # Why here: the other commands need neither the loop nor its start-up time.
    from streamd.daemon import member, single, supervisor
    from streamd.daemon.orders import WORKER_VARIABLE

    if WORKER_VARIABLE in os.environ:
        return member.run()
    settings = settings_of(args, os.environ)
    load = functools.partial(settings_of, args, os.environ)
    if settings.workers > 1:
        return supervisor.run(settings, load, args.command_line)
    return single.run(settings, load)


def _check_config(args: argparse.Namespace) -> int:
    load(file=args.file, environ=_without_settings(os.environ), flags={})
    print(f"{args.file}: fine")
    return 0


def _without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without our own variables: a file is judged by itself, but may name a key's variable."""
    return {name: value for name, value in environ.items() if not name.startswith(ENV_PREFIX)}


def _config_reference(args: argparse.Namespace) -> int:
    if args.schema:
        print(json.dumps(schema.schema(), indent=2))
    else:
        print(reference.toml() if args.toml else reference.markdown(), end="")
    return 0
