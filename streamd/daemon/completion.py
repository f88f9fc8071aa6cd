"""Completion for bash and zsh, generated from the argument parsers and the rows of settings, like the man pages.

Both scripts are tables with a little code around them: the options of each command, and the values of each option and
operand (words, a file, ids, or anything). The shell runs a program for ids alone: `streamd streams --ids` and its like
ask the daemon for them, and reply nothing where there is none.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from streamd.daemon.manpage import commands_of, help_text, options
from streamd.rows import Kind, Row

# Words in a metavar that mark its value as the name of a file.
_FILE_WORDS = ("FILE", "PATH", "DIR", "TOML")

_BASH = """\
# bash completion of streamd
_streamd() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}} words=
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "{commands}" -- "$current"))
        return
    fi
    case "$command $previous" in
{values}
    esac
    case "$command" in
{options}
    esac
    case "$current" in
        -*) COMPREPLY=($(compgen -W "$words" -- "$current")); return ;;
    esac
    case "$command" in
{operands}
        *) COMPREPLY=($(compgen -f -- "$current")) ;;
    esac
}}
complete -o filenames -F _streamd streamd
"""

_ZSH = """\
#compdef streamd
_streamd() {{
    local -a commands
    commands=(
{commands}
    )
    if ((CURRENT == 2)); then
        _describe command commands
        return
    fi
    local command=$words[2]
    shift words
    ((CURRENT--))
    case $command in
{options}
    esac
}}
_streamd "$@"
"""


class _FirstWord(NamedTuple):
    """A first word (`keys`): its second words (`add`, `list`), and the options and operands of all of them."""

    about: str
    words: list[str]
    actions: list[tuple[argparse.Action, str]]  # each with its help text


def bash(parser: argparse.ArgumentParser, rows: Sequence[Row]) -> str:
    """The script for bash-completion's folder; without bash-completion it can be sourced."""
    commands = _by_first_word(parser)
    values, tables, operands = [], [], []
    for name, command in commands.items():
        for action, _ in command.actions:
            keys = "|".join(f'"{name} {flag}"' for flag in action.option_strings)
            if keys and _takes_value(action):
                values.append(f"        {keys}) {_bash_reply(action, rows)}; return ;;")
        if command.words:
            values.append(f'        "{name} {name}") {_bash_choice(command.words)}; return ;;')
        flags = dict.fromkeys(flag for action, _ in command.actions for flag in action.option_strings)
        tables.append(f'        {name}) words="{" ".join([*flags, "--help"])}" ;;')
        operands += [
            f"        {name}) {_bash_reply(action, rows)} ;;"
            for action, _ in command.actions
            if not action.option_strings and (_ids_of(action) or _words(action, rows))
        ]
    own = [flag for action in options(parser) for flag in action.option_strings]
    return _BASH.format(
        commands=" ".join([*commands, *own, "--help"]),
        values="\n".join(values),
        options="\n".join(tables),
        operands="\n".join(operands),
    )


def zsh(parser: argparse.ArgumentParser, rows: Sequence[Row]) -> str:
    """The script for a folder of zsh's fpath, to be named `_streamd`."""
    commands = _by_first_word(parser)
    described = [_zsh_quoted(f"{name}:{_zsh_text(command.about)}") for name, command in commands.items()]
    tables = []
    for name, command in commands.items():
        specs = ["--help[say more]", *(spec for action in command.actions for spec in _zsh_specs(*action, rows))]
        if command.words:
            specs.insert(0, f"1:command:({' '.join(command.words)})")
        tables.append(f"        {name}) _arguments {' '.join(map(_zsh_quoted, specs))} ;;")
    return _ZSH.format(commands="\n".join(f"        {line}" for line in described), options="\n".join(tables))


def _by_first_word(parser: argparse.ArgumentParser) -> dict[str, _FirstWord]:
    found: dict[str, _FirstWord] = {}
    for name, (command, about) in commands_of(parser).items():
        first, _, second = name.partition(" ")
        entry = found.setdefault(first, _FirstWord(about.split("\n")[0], [], []))
        entry.words.extend([second] if second else [])
        entry.actions.extend((action, help_text(command, action)) for action in options(command))
    return found


def _words(action: argparse.Action, rows: Sequence[Row]) -> list[str]:
    if action.choices:
        return [str(choice) for choice in action.choices]
    return [word for row in rows if row.flag in action.option_strings for word in row.words]


def _is_file(action: argparse.Action, rows: Sequence[Row]) -> bool:
    named = str(action.metavar or action.dest).upper()
    is_path = any(row.kind is Kind.PATH for row in rows if row.flag in action.option_strings)
    return is_path or any(word in named for word in _FILE_WORDS)


def _takes_value(action: argparse.Action) -> bool:
    return action.nargs != 0


def _ids_of(action: argparse.Action) -> str:
    """The shell's command that prints the ids for this argument; empty: its values aren't ids of a daemon."""
    tables: Sequence[str] = getattr(action, "ids_of", ())
    return "; ".join(f"streamd {table} --ids 2>/dev/null" for table in tables)


def _bash_reply(action: argparse.Action, rows: Sequence[Row]) -> str:
    if ids := _ids_of(action):
        return f'COMPREPLY=($(compgen -W "$({ids})" -- "$current"))'
    if words := _words(action, rows):
        return _bash_choice(words)
    return 'COMPREPLY=($(compgen -f -- "$current"))' if _is_file(action, rows) else "COMPREPLY=()"


def _bash_choice(words: Sequence[str]) -> str:
    return f'COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$current"))'


def _zsh_specs(action: argparse.Action, help_said: str, rows: Sequence[Row]) -> list[str]:
    """Specs for zsh's _arguments: `*--flag[help]:value:(words)`; the star lets an option be repeated."""
    words = _words(action, rows)
    values = f"({' '.join(words)})" if words else "_files" if _is_file(action, rows) else " "
    if ids := _ids_of(action):
        values = f"($({ids}))"
    if not action.option_strings:
        return [f"*:{action.metavar or action.dest}:{values if values != ' ' else '_files'}"]
    told = _zsh_text(help_said)
    value = f":{_zsh_text(str(action.metavar or action.dest))}:{values}" if _takes_value(action) else ""
    return [f"*{flag}[{told}]{value}" for flag in action.option_strings]


def _zsh_text(text: str) -> str:
    """The text on a single line, with a backslash before each character that would end a part of a spec."""
    line = " ".join(text.split())
    return "".join("\\" + letter if letter in "[]:\\" else letter for letter in line)


def _zsh_quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
