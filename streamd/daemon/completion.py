"""Completion for bash and zsh, from the argument parsers and the rows of settings, like the man pages.

Both scripts are tables with a little code around them: a command's options, and what each option takes (words, a file,
or anything). Nothing is run on the person's machine to complete a word.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from streamd.daemon.manpage import help_text, options, subcommands
from streamd.rows import Kind, Row

# What a metavar has to contain for the value to be a file's name.
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
        -*) COMPREPLY=($(compgen -W "$words" -- "$current")) ;;
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


def bash(parser: argparse.ArgumentParser, rows: Sequence[Row]) -> str:
    """The script for bash-completion's folder; without bash-completion it can be sourced."""
    commands = subcommands(parser)
    values, tables = [], []
    for name, command in commands.items():
        for action in options(command):
            keys = "|".join(f'"{name} {flag}"' for flag in action.option_strings)
            if keys and _takes_value(action):
                values.append(f"        {keys}) {_bash_reply(action, rows)}; return ;;")
        flags = " ".join(flag for action in options(command) for flag in action.option_strings)
        tables.append(f'        {name}) words="{flags}" ;;')
    own = [flag for action in options(parser) for flag in action.option_strings]
    return _BASH.format(commands=" ".join([*commands, *own]), values="\n".join(values), options="\n".join(tables))


def zsh(parser: argparse.ArgumentParser, rows: Sequence[Row]) -> str:
    """The script for a folder of zsh's fpath, to be named `_streamd`."""
    commands = subcommands(parser)
    described = [_zsh_quoted(f"{name}:{_first_line(command)}") for name, command in commands.items()]
    tables = []
    for name, command in commands.items():
        specs = [_zsh_quoted(spec) for action in options(command) for spec in _zsh_specs(command, action, rows)]
        tables.append(f"        {name}) _arguments {' '.join(specs)} ;;")
    return _ZSH.format(commands="\n".join(f"        {line}" for line in described), options="\n".join(tables))


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


def _bash_reply(action: argparse.Action, rows: Sequence[Row]) -> str:
    if words := _words(action, rows):
        return f'COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$current"))'
    return 'COMPREPLY=($(compgen -f -- "$current"))' if _is_file(action, rows) else "COMPREPLY=()"


def _zsh_specs(command: argparse.ArgumentParser, action: argparse.Action, rows: Sequence[Row]) -> list[str]:
    """What _arguments wants: `*--flag[help]:value:(words)`, the star for an option that may come again."""
    words = _words(action, rows)
    values = f"({' '.join(words)})" if words else "_files" if _is_file(action, rows) else " "
    if not action.option_strings:
        return [f"*:{action.metavar or action.dest}:{values if values != ' ' else '_files'}"]
    told = _zsh_text(help_text(command, action))
    value = f":{_zsh_text(str(action.metavar or action.dest))}:{values}" if _takes_value(action) else ""
    return [f"*{flag}[{told}]{value}" for flag in action.option_strings]


def _zsh_text(text: str) -> str:
    """One line without the characters that end a part of a spec."""
    line = " ".join(text.split())
    return "".join("\\" + letter if letter in "[]:\\" else letter for letter in line)


def _zsh_quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _first_line(command: argparse.ArgumentParser) -> str:
    return _zsh_text((command.description or command.prog).split("\n")[0])
