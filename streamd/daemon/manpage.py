"""streamd(8) and streamd.toml(5) as roff, generated from the argument parsers and the rows of settings.

This module adds the facts that neither of them has: signals, files, exit statuses, the work with systemd. The pages
hold no date, so that two builds of the same tree are the same bytes. The macros are those of man(7), which groff and
mandoc both understand.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from streamd.daemon import admin_cli
from streamd.rows import Kind, Row

NAME = "streams of tokens between inference servers and their readers"

# Facts that no parser and no row has. A pair is a term and its text; line ends and indentation don't count.
SIGNALS = (
    (
        "SIGTERM",
        """Drain: readiness turns to 503, the listeners close, running generations finish within drain_timeout,
        all other readers are told where to resume. Another SIGTERM, at least a second later, ends it at once.""",
    ),
    ("SIGINT", "The same with short times, for a terminal."),
    (
        "SIGHUP",
        """Read the configuration again: upstreams, limits, keys, log level. No connection is dropped. A file with a
        fault changes nothing and is reported. Settings that take a restart keep their values.""",
    ),
)
FILES = (
    ("/etc/streamd/streamd.toml", "The configuration, see streamd.toml(5)."),
    (
        "/etc/streamd/credentials/",
        """Keys of upstreams, a file of one line each, read by root alone. In the settings FILE is
        credential:upstream_FILE; a changed key takes a restart.""",
    ),
    ("/run/streamd/admin.sock", "The admin listener, for members of the group streamd."),
    ("/var/lib/streamd/", "Logs of streams between a stop and the next start."),
)
SYSTEMD = (
    """The service is of Type=notify: it is started when it listens, its STATUS shows connections and streams, its
    watchdog is fed from the event loop. streamd.socket and streamd-admin.socket hold the listeners, so that
    connections wait in the kernel while the daemon is restarted. To stop it for good, name all three: systemctl stop
    streamd.socket streamd-admin.socket streamd.service. systemctl reload checks the file first and fails with the
    reason when it has a fault.""",
    """With PrivateUsers=yes a peer on the admin socket looks like root, streamd or nobody: the socket's mode decides
    who may connect.""",
)
EXITS = (
    ("0", "Stopped in an orderly way, or done."),
    ("2", "A command line or settings that can't be used; standard error says why. systemd doesn't try again."),
    *admin_cli.EXITS,
)
UNITS = (
    """Durations are written 500ms, 30s, 2m, 1h, sizes 16KiB, 1MiB, 64kB; bare numbers are seconds and bytes. Flags go
    over environment variables, variables over the file, and the file over the default. All given values are checked,
    and all mistakes are reported at once, each with the key, the value, the allowed values and the line.""",
)


def command_page(parser: argparse.ArgumentParser, rows: Sequence[Row], version: str) -> str:
    """streamd(8): every command and option of `parser`. It explains only the first section of the settings."""
    commands = commands_of(parser)
    lines = [_title("streamd", 8, version), *_section("NAME"), f"streamd \\- {NAME}", *_section("SYNOPSIS")]
    for name, (command, _) in commands.items():
        lines += [f".B streamd {escaped(name)}", escaped(_operands(command)), ".br"]
    lines += [*_section("DESCRIPTION"), *_prose(parser.description or NAME), *_options(parser, {})]
    lines += _section("COMMANDS")
    settings = {row.flag: row for row in rows}
    for name, (command, about) in commands.items():
        flags = {flag for action in options(command) for flag in action.option_strings}
        lines += [f".SS streamd {escaped(name)}", *_prose(about)]
        lines += _options(command, settings if settings.keys() <= flags else {})
        lines += [".PP", *_prose(command.epilog)] if command.epilog else []
    lines += [*_section("SIGNALS"), *_terms(SIGNALS), *_section("FILES"), *_terms(FILES)]
    lines += [*_section("EXIT STATUS"), *_terms(EXITS)]
    lines += [*_section("SYSTEMD"), *_paragraphs(SYSTEMD)]
    lines += [*_section("ENVIRONMENT"), *_paragraphs([_environment(rows)])]
    lines += [*_section("SEE ALSO"), ".BR streamd.toml (5),", ".BR systemctl (1),", ".BR journalctl (1)"]
    return "\n".join(lines) + "\n"


def settings_page(rows: Sequence[Row], tables: Mapping[str, Sequence[Row]], version: str) -> str:
    """streamd.toml(5): all rows by section, then each array of tables (`upstream` becomes [[upstream]])."""
    lines = [_title("streamd.toml", 5, version), *_section("NAME"), "streamd.toml \\- configuration of streamd"]
    lines += [*_section("SYNOPSIS"), ".I /etc/streamd/streamd.toml"]
    lines += [*_section("DESCRIPTION"), *_paragraphs(UNITS)]
    for section in dict.fromkeys(row.section for row in rows):
        lines += _section(section)
        for row in rows:
            if row.section == section:
                lines += _setting(row, reached=f"{row.flag}, {row.variable}")
    for name, table in tables.items():
        lines += _section(f"[[{name}]]")
        for row in table:
            lines += _setting(row, reached="")
    lines += [*_section("SEE ALSO"), ".BR streamd (8)"]
    return "\n".join(lines) + "\n"


class Command(NamedTuple):
    """A command: its parser, and a description of a sentence or more."""

    parser: argparse.ArgumentParser
    about: str


def commands_of(parser: argparse.ArgumentParser) -> dict[str, Command]:
    """The commands of a parser by their words (`keys add`), in order; a command without a help text is left out."""
    found = {}
    # Why the underscores, here and below: argparse has no public way to list a parser's arguments.
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for told in action._choices_actions:
                command: argparse.ArgumentParser = action.choices[told.dest]
                nested = {f"{told.dest} {name}": inner for name, inner in commands_of(command).items()}
                about = command.description or f"{_capital(told.help or '')}."
                found.update(nested or {told.dest: Command(command, about)})
    return found


def options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options and operands of a command, without its subcommands, --help and hidden options."""
    return [
        action
        for action in parser._actions
        if action.help != argparse.SUPPRESS
        and not isinstance(action, argparse._SubParsersAction)
        and "--help" not in action.option_strings
    ]


def escaped(text: str) -> str:
    """Plain text for roff: no character acts as a command, and hyphens can be copied as minus signs."""
    text = (
        text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("^", "\\(ha").replace("~", "\\(ti")
    )
    return "\n".join("\\&" + line if line.startswith(".") else line for line in text.split("\n"))


def help_text(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """The help with its `%(default)s` and `%%` filled in, as --help would show it."""
    return (action.help or "") % {**vars(action), "prog": parser.prog}


def _title(page: str, number: int, version: str) -> str:
    # Ragged right and without hyphenation: names of settings stay whole and can be copied.
    return f'.TH {escaped(page)} {number} "" "streamd {escaped(version)}" "streamd"\n.nh\n.ad l'


def _section(title: str) -> list[str]:
    return [f'.SH "{escaped(title.upper())}"']


def _paragraphs(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if text:
            yield ".PP"
            yield escaped(" ".join(text.split()))


def _prose(text: str) -> Iterator[str]:
    """Paragraphs between blank lines; indented lines stay as they are."""
    examples = False
    for line in text.expandtabs().strip("\n").split("\n"):
        if line.startswith("  ") != examples:
            examples = not examples
            yield ".PP\n.RS 4\n.EX" if examples else ".EE\n.RE\n.PP"
        if examples:
            yield escaped(line.removeprefix("    "))
        else:
            yield escaped(line) if line.strip() else ".PP"
    if examples:
        yield ".EE\n.RE"


def _terms(terms: Iterable[tuple[str, str]]) -> Iterator[str]:
    for term, text in terms:
        yield ".TP"
        yield f".B {escaped(term)}"
        yield escaped(" ".join(text.split()))


def _operands(command: argparse.ArgumentParser) -> str:
    """The part of the synopsis after the command's name: `[options]` for all options, then the operands by name."""
    operands = [str(action.metavar or action.dest) for action in options(command) if not action.option_strings]
    return " ".join(["[options]", *operands])


def _options(command: argparse.ArgumentParser, settings: Mapping[str, Row]) -> Iterator[str]:
    elsewhere: dict[str, list[str]] = {}
    first_section = next(iter(settings.values())).section if settings else ""
    for action in options(command):
        row = next((settings[flag] for flag in action.option_strings if flag in settings), None)
        if row is None or row.section == first_section:
            yield from _terms([(_option(action), help_text(command, action))])
        else:
            elsewhere.setdefault(row.section, []).append(row.flag)
    if elsewhere:
        yield from _paragraphs(["The other settings, explained in streamd.toml(5):"])
        yield from _terms((section, ", ".join(flags)) for section, flags in elsewhere.items())


def _option(action: argparse.Action) -> str:
    if not action.option_strings:
        return str(action.metavar or action.dest)
    value = ""
    if action.nargs != 0:
        choices = "|".join(str(choice) for choice in action.choices) if action.choices else ""
        value = f" {action.metavar or choices or action.dest.upper()}"
    return ", ".join(action.option_strings) + value


def _setting(row: Row, reached: str) -> Iterator[str]:
    default = f"; {row.written} unless set" if row.written else ""
    yield ".TP"
    yield f".B {escaped(row.key)}"
    yield escaped(f"Takes {row.allowed()}{default}.")
    yield ".br"
    yield escaped(row.text)
    if row.restart:
        yield "A change takes a restart."
    if reached and row.kind is not Kind.TABLE:
        yield ".br"
        yield escaped(reached)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _environment(rows: Sequence[Row]) -> str:
    return (
        f"Every setting has a variable, such as {rows[0].variable} for {rows[0].key}; streamd.toml(5) names them. "
        "NOTIFY_SOCKET, WATCHDOG_USEC, LISTEN_FDS, CREDENTIALS_DIRECTORY and their like are systemd's."
    )
