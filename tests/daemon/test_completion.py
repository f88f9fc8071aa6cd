"""Completion: bash itself is asked for it; of zsh the syntax is checked, where it is installed."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import pytest
from tools import needs, skip_without

from streamd.daemon import completion
from streamd.rows import Kind, Row

ROWS = (
    Row(
        Kind.WORD,
        "A",
        "it's [a] word: one",
        "",
        "info",
        words=("info", "debug"),
        key="log_level",
        attribute="log_level",
    ),
    Row(Kind.PATH, "A", "a path", "", "", key="keys_file", attribute="keys_file"),
    Row(Kind.COUNT, "A", "a number", "", "1", 1, 9, words=("auto",), key="workers", attribute="workers"),
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="streamd")
    parser.add_argument("--version", action="version", version="1")
    commands = parser.add_subparsers()
    serve = commands.add_parser("serve", help="run", description="Run: the [daemon]'s life.\nMore.")
    serve.add_argument("--config", metavar="FILE.toml", help="the file")
    serve.add_argument("--once", action="store_true", help="no value")
    serve.add_argument("--secret", help=argparse.SUPPRESS)
    for row in ROWS:
        serve.add_argument(row.flag, metavar="X", help=row.meaning)
    mock = commands.add_parser("mock-llm", help="mock", description="A mock.")
    mock.add_argument("--fault", choices=("stall", "break"), help="which")
    check = commands.add_parser("check-config", help="check", description="Check.")
    check.add_argument("file", metavar="FILE", help="the file")
    keys = commands.add_parser("keys", help="add and revoke keys").add_subparsers()
    keys.add_parser("add", help="make one").add_argument("--rpm", metavar="N", help="a limit")
    keys.add_parser("revoke", help="take one out").add_argument("id", help="which")
    return parser


@pytest.fixture
def script(tmp_path: Path) -> Path:
    skip_without("bash")
    (tmp_path / "streamd.bash").write_text(completion.bash(_parser(), ROWS))
    (tmp_path / "streamd.toml").touch()
    return tmp_path / "streamd.bash"


@pytest.mark.parametrize(
    ("line", "replies"),
    [
        ("", {"serve", "mock-llm", "check-config", "keys", "--version", "--help"}),
        ("se", {"serve"}),
        ("serve --", {"--help", "--config", "--once", "--log-level", "--keys-file", "--workers"}),
        ("serve --log", {"--log-level"}),
        ("serve --log-level ", {"info", "debug"}),
        ("serve --log-level d", {"debug"}),
        ("serve --workers ", {"auto"}),
        ("serve --config streamd.t", {"streamd.toml"}),
        ("serve --keys-file streamd.t", {"streamd.toml"}),
        ("serve --once --con", {"--config"}),
        ("mock-llm --fault ", {"stall", "break"}),
        ("mock-llm --log", set()),
        ("keys ", {"add", "revoke"}),
        ("keys a", {"add"}),
        ("keys add --r", {"--rpm"}),
        ("check-config streamd.t", {"streamd.toml"}),
    ],
)
def test_bash_completes_commands_options_and_words(script: Path, line: str, replies: set[str]) -> None:
    words = ["streamd", *line.split(" ")]
    asked = " ".join(f"'{word}'" for word in words)
    shell = f"source {script.name}; COMP_WORDS=({asked}); COMP_CWORD={len(words) - 1}; _streamd; "
    shell += "printf '%s\\n' \"${COMPREPLY[@]}\""
    told = subprocess.run(
        ["bash", "--norc", "-c", shell], cwd=script.parent, stdout=subprocess.PIPE, text=True, check=True
    )
    assert set(told.stdout.split()) == replies


def test_zsh_gets_every_option_with_its_words_and_quotes_kept_apart() -> None:
    script = completion.zsh(_parser(), ROWS)
    assert script.startswith("#compdef streamd\n")
    assert "'*--log-level[it'\\''s \\[a\\] word\\: one]:X:(info debug)'" in script
    assert "'*--keys-file[a path]:X:_files'" in script
    assert "'*--once[no value]'" in script
    assert "'*:FILE:_files'" in script
    assert "'serve:Run\\: the \\[daemon\\]'\\''s life.'" in script
    assert "keys) _arguments '1:command:(add revoke)'" in script
    assert "secret" not in script


@needs("zsh")
def test_zsh_accepts_the_syntax_of_the_script(tmp_path: Path) -> None:
    (tmp_path / "_streamd").write_text(completion.zsh(_parser(), ROWS))
    subprocess.run(["zsh", "-fn", str(tmp_path / "_streamd")], check=True)
