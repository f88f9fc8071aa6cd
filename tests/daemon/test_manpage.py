"""The man pages hold everything that the parsers and the rows know, and groff accepts them without a warning."""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

import pytest
from tools import needs

from streamd.config import ROUTE_ROWS, ROWS, UPSTREAM_ROWS
from streamd.daemon import manpage
from streamd.rows import Kind, Row

TABLES = {"upstream": UPSTREAM_ROWS, "route": ROUTE_ROWS}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="streamd", description="One daemon.")
    parser.add_argument("--version", action="version", version="1")
    commands = parser.add_subparsers(dest="command")
    serve = commands.add_parser("serve", help="run", description="Run the daemon.")
    serve.add_argument("--config", metavar="FILE", help="the file; 100%% yours")
    serve.add_argument("--upstream", "-u", action="append", metavar="URL", help="one more server")
    serve.add_argument("--mode", choices=("fast", "slow"), default="fast", help="%(default)s unless set")
    serve.add_argument("--hushed", help=argparse.SUPPRESS)
    for row in ROWS:
        serve.add_argument(row.flag, dest=row.dest, metavar=row.kind.value.upper(), help=row.meaning.replace("%", "%%"))
    check = commands.add_parser("check-config", help="check", description="Check a file.")
    check.add_argument("file", metavar="FILE", help=".dotted help")
    commands.add_parser("internal")
    keys = commands.add_parser("keys", help="keys").add_subparsers()
    add = keys.add_parser("add", help="make one", epilog="At the end:\n\n    kept   as it is\n    -- too\nand on.")
    add.add_argument(ROWS[0].flag, help="of this key")
    return parser


def _shown(page: str) -> str:
    """The page as plain words, roff's escapes undone."""
    for escape, character in (("\\-", "-"), ("\\(aq", "'"), ("\\(ha", "^"), ("\\(ti", "~"), ("\\&", ""), ("\\e", "\\")):
        page = page.replace(escape, character)
    return page


@pytest.fixture(scope="module")
def command_page() -> str:
    return manpage.command_page(_parser(), ROWS, "1.2.3")


@pytest.fixture(scope="module")
def settings_page() -> str:
    return manpage.settings_page(ROWS, TABLES, "1.2.3")


def test_every_command_and_option_is_in_the_page(command_page: str) -> None:
    shown = _shown(command_page)
    for term in ("--config FILE", "--upstream, -u URL", "--mode fast|slow", "--version", "streamd check-config"):
        assert f".B {term}\n" in shown or f".SS {term}\n" in shown
    assert "the file; 100% yours\n" in shown
    assert "fast unless set\n" in shown
    for row in ROWS:
        assert re.search(rf"{re.escape(row.flag)}\b", shown), row.flag


def test_hidden_commands_and_options_are_left_out(command_page: str) -> None:
    assert "hushed" not in command_page
    assert "internal" not in command_page


def test_a_nested_command_has_a_section_with_its_own_options(command_page: str) -> None:
    part = _shown(command_page).partition(".SS streamd keys add\n")[2]
    assert part.startswith("Make one.\n.TP\n.B " + ROWS[0].flag)
    assert "\nof this key\n" in part


def test_indented_lines_stay_unchanged(command_page: str) -> None:
    shown = _shown(command_page)
    assert "At the end:\n.PP\n.PP\n.RS 4\n.EX\nkept   as it is\n-- too\n.EE\n.RE\n.PP\nand on.\n" in shown


def test_only_settings_of_the_first_section_are_explained_beside_their_flags(command_page: str) -> None:
    shown = _shown(command_page)
    for row in ROWS:
        assert (f"\n{row.meaning}\n" in shown) == (row.section == ROWS[0].section), row.key


def test_every_setting_is_in_the_page_with_its_allowed_values(settings_page: str) -> None:
    shown = _shown(settings_page)
    for row in ROWS:
        assert f".B {row.key}\nTakes {row.allowed()}" in shown
        assert f"\n{row.flag}, {row.variable}\n" in shown
        assert row.text in shown
    for name, rows in TABLES.items():
        table = shown.partition(f'.SH "[[{name.upper()}]]"')[2] or shown.partition(f'.SH "[[{name}]]"')[2]
        for row in rows:
            assert f".B {row.key}\n" in table


def test_a_default_and_a_restart_are_told() -> None:
    row = Row(
        Kind.WORD, "A", "Hue", "Why not", "red", words=("red", "blue"), restart=True, key="colour", attribute="colour"
    )
    page = _shown(manpage.settings_page([row], {}, "1"))
    taken = "Takes one of red, blue; red unless set.\n"
    told = ".br\nHue. Why not.\nA change takes a restart.\n.br\n--colour, STREAMD_COLOUR"
    assert taken + told in page


@pytest.mark.parametrize("text", [".dot", "'quote", "a\n.b", "\\*x", "a-b", "`x' ~^", ""])
def test_no_text_is_a_command_to_roff(text: str) -> None:
    escaped = manpage.escaped(text)
    assert not any(line.startswith((".", "'")) for line in escaped.split("\n"))
    assert _shown(escaped) == text


def test_two_builds_are_the_same_bytes(command_page: str) -> None:
    assert manpage.command_page(_parser(), ROWS, "1.2.3") == command_page


@needs("groff")
@pytest.mark.parametrize("page", ["command_page", "settings_page"])
def test_groff_accepts_the_page_without_a_warning(page: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    (tmp_path / "page").write_text(request.getfixturevalue(page), encoding="utf-8")
    said = subprocess.run(
        ["groff", "-man", "-Tutf8", "-Kutf8", "-ww", "-z", "page"], cwd=tmp_path, capture_output=True, check=False
    )
    assert said.stderr == b""
    assert said.returncode == 0
