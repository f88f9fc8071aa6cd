"""The command line: `streamd serve`, `check-config`, `config-reference`, `keys`, `demo`, `mock-llm`, and those for a
running daemon (daemon/admin_cli.py).

The flags of `serve` are the rows of the settings, beside `--config` and the two kinds of help.

A command imports its code and fills its parser only when it is called, because `serve` stays in memory as the daemon's
parent.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import streamd
from streamd.config import ENV_PREFIX, ROWS, SECTIONS, ConfigError, Settings, load
from streamd.rows import Kind, Row

EXIT_USAGE = 2  # argparse's own status; settings that can't be used are the same kind of mistake

_METAVARS = {
    Kind.DURATION: "DURATION",
    Kind.BYTES: "SIZE",
    Kind.COUNT: "N",
    Kind.RATIO: "SHARE",
    Kind.TEXT: "TEXT",
    Kind.PATH: "FILE",
    Kind.LIST: "ENTRY",
}

_SERVE_INTRODUCTION = """\
Relay model servers to readers: every token arrives, or its reader is told so.

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
    args = build_parser(next(iter(command_line), "")).parse_args(command_line)
    args.command_line = command_line
    try:
        status = args.run(args)
    except ConfigError as error:
        from streamd.daemon.complaint import complain

        for problem in error.problems:
            complain(str(problem))
        return EXIT_USAGE
    assert isinstance(status, int)
    return status


class _Subcommand(NamedTuple):
    text: str
    fill: Callable[[argparse.ArgumentParser], None]
    options: dict[str, Any]


class Parser(argparse.ArgumentParser):
    """A parser that asks back when a word is misspelt, and complains as the daemon does (daemon/complaint.py)."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but words that are left over are an error of this command, which knows its own flags."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            # Why the underscore: argparse has no public way to list a parser's flags.
            hints = [hint for word in unknown if (hint := _flag_hint(word, tuple(self._option_string_actions)))]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{'; '.join(['', *hints])}")
        return known, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = tuple(map(str, action.choices or ()))
        if choices and str(value) not in choices:
            near = difflib.get_close_matches(str(value), choices, 1, 0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentError(action, f"invalid choice: {value!r} (choose from {', '.join(choices)}){hint}")

    def error(self, message: str) -> NoReturn:
        from streamd.daemon.complaint import write_lines

        write_lines(f"{self.format_usage()}{self.prog}: error: {message}")
        sys.exit(EXIT_USAGE)


def _flag_hint(word: str, flags: tuple[str, ...]) -> str:
    """The nearest flag as a question; "" for a word that is no flag, or like none."""
    name = word.partition("=")[0]
    if not name.startswith("-") or len(name) < 3:
        return ""
    name = f"--{name.lstrip('-').replace('_', '-').lower()}"
    near = [name] if name in flags else difflib.get_close_matches(name, flags, 1, 0.7)
    return f"did you mean {near[0]}?" if near else ""


def build_parser(command: str = "") -> argparse.ArgumentParser:
    """The parser of the whole command line, from which man pages and completion are made. With `command`, it has the
    arguments of this command alone."""
    parser = Parser(
        prog="streamd", description=streamd.__doc__, allow_abbrev=False, epilog="streamd COMMAND --help says more."
    )
    parser.add_argument("--version", action="version", version=f"streamd {streamd.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, each in _COMMANDS.items():
        of_command = commands.add_parser(name, help=each.text, **each.options)
        if command in ("", name):
            each.fill(of_command)
    return parser


def _fill_serve(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser, SECTIONS, _ShortHelp)
    parser.set_defaults(run=_serve)


def _fill_check_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.set_defaults(run=_check_config)


def _fill_config_reference(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--toml", action="store_true", help="a file with every default as a comment, to start from")
    form.add_argument("--schema", action="store_true", help="a JSON Schema of the file, for editors")
    parser.set_defaults(run=_config_reference)


def _fill_keys(parser: argparse.ArgumentParser) -> None:
    from streamd.daemon import keys_cli

    keys_cli.add_arguments(parser)
    parser.set_defaults(run=keys_cli.run)


def _fill_status(parser: argparse.ArgumentParser) -> None:
    from streamd.daemon import admin_cli

    admin_cli.fill_status(parser)


def _fill_table(name: str, parser: argparse.ArgumentParser) -> None:
    from streamd.daemon import admin_cli

    admin_cli.fill_table(parser, name)


def _fill_upstreams(parser: argparse.ArgumentParser) -> None:
    from streamd.daemon import admin_cli

    admin_cli.fill_upstreams(parser)


def _fill_kill(parser: argparse.ArgumentParser) -> None:
    from streamd.daemon import admin_cli

    admin_cli.fill_kill(parser)


def _fill_drain(parser: argparse.ArgumentParser) -> None:
    from streamd.daemon import admin_cli

    admin_cli.fill_drain(parser)


def _fill_log_level(parser: argparse.ArgumentParser) -> None:
    from streamd.daemon import admin_cli

    admin_cli.fill_log_level(parser)


def _fill_demo(parser: argparse.ArgumentParser) -> None:
    from streamd.demo import command

    command.add_arguments(parser)
    parser.set_defaults(run=command.run)


def _fill_top(parser: argparse.ArgumentParser) -> None:
    from streamd.top import command

    command.fill(parser)
    parser.set_defaults(run=lambda args: command.run(args, os.environ))


def _fill_mock_llm(parser: argparse.ArgumentParser) -> None:
    from streamd import mockllm

    mockllm.add_arguments(parser)
    parser.set_defaults(run=mockllm.run)


_COMMANDS = {
    "serve": _Subcommand("run the daemon", _fill_serve, {"add_help": False, **_SERVE}),
    "check-config": _Subcommand("report all mistakes in a file, without starting", _fill_check_config, {}),
    "config-reference": _Subcommand("print the reference of all settings", _fill_config_reference, {}),
    "status": _Subcommand("show how a running daemon is", _fill_status, {}),
    "streams": _Subcommand("show its streams", functools.partial(_fill_table, "streams"), {}),
    "readers": _Subcommand("show its readers, the slowest first", functools.partial(_fill_table, "readers"), {}),
    "usage": _Subcommand(
        "show what each API key holds now, and the rest of its limits", functools.partial(_fill_table, "usage"), {}
    ),
    "upstreams": _Subcommand("show its inference servers", _fill_upstreams, {}),
    "top": _Subcommand("watch its upstreams, streams, readers and keys, and end them, in a terminal", _fill_top, {}),
    "kill": _Subcommand("end streams, readers, or everything of a key", _fill_kill, {}),
    "drain": _Subcommand("let it finish and stop, end that at once, or take it back", _fill_drain, {}),
    "log-level": _Subcommand("change how much it logs", _fill_log_level, {}),
    "keys": _Subcommand("add, list and revoke API keys in the key file", _fill_keys, {}),
    "demo": _Subcommand("try streamd out in a browser, with a synthetic model", _fill_demo, {}),
    "mock-llm": _Subcommand("run the built-in synthetic upstream, for demos, tests and load", _fill_mock_llm, {}),
}


class _ShortHelp(argparse.Action):
    """--help of `serve`, on a single screen: the settings of the first section, and the names of the other sections."""

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
    text = (row.meaning + default).replace("%", "%%")
    if row.kind is Kind.FLAG:
        group.add_argument(row.flag, dest=row.dest, action=argparse.BooleanOptionalAction, default=None, help=text)
    else:
        metavar = _METAVARS.get(row.kind) or "|".join(row.words)
        action = "append" if row.kind is Kind.LIST else "store"
        group.add_argument(row.flag, dest=row.dest, metavar=metavar, action=action, help=text)
        if row.old_flag:
            group.add_argument(row.old_flag, dest=row.dest, metavar=metavar, help=argparse.SUPPRESS)


def settings_of(args: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """The settings of a `serve` command line, read again for each reload. Raises ConfigError."""
    flags = {row.dest: getattr(args, row.dest) for row in ROWS} | {"upstream": args.upstream}
    file = args.config
    if file is None and environ.get(f"{ENV_PREFIX}CONFIG"):
        file = Path(environ[f"{ENV_PREFIX}CONFIG"])
    return load(file=file, environ=environ, flags=flags)


def _serve(args: argparse.Namespace) -> int:
    from streamd.daemon import parent

    settings = settings_of(args, os.environ)
    return parent.run(settings, functools.partial(settings_of, args, os.environ), args.command_line)


def _check_config(args: argparse.Namespace) -> int:
    load(file=args.file, environ=_without_settings(os.environ), flags={})
    print(f"{args.file}: fine")
    return 0


def _without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without the settings' variables: a file is checked by itself, but may name a key's variable."""
    return {name: value for name, value in environ.items() if not name.startswith(ENV_PREFIX)}


def _config_reference(args: argparse.Namespace) -> int:
    import json

    from streamd import reference, schema

    if args.schema:
        print(json.dumps(schema.schema(), indent=2))
    else:
        print(reference.toml() if args.toml else reference.markdown(), end="")
    return 0
