"""The command line of `streamd top`: its flags, and its words where it can't run."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
from typing import Any, cast

import pytest

from streamd import cli
from streamd.daemon import admin_cli
from streamd.top import app, command


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def in_terminal(monkeypatch: pytest.MonkeyPatch) -> _Terminal:
    """Standard streams that are a terminal; returns standard error."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, _Terminal())
    return cast(_Terminal, sys.stderr)


def test_without_the_library_a_sentence_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "textual" else found(name))
    assert cli.main(["top"]) == 2
    ways = "make install EXTRAS=top, or pip install '.[top]' in streamd's source"
    told = f"streamd: top needs the packages of the extra top: {ways}\n"
    assert capsys.readouterr() == ("", told)


def test_without_a_terminal_scripts_are_told_of_their_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top"]) == 2
    assert "top needs a terminal" in capsys.readouterr().err


def test_an_address_that_is_none_is_refused_before_the_screen_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = in_terminal(monkeypatch)
    assert cli.main(["top", "--admin", "nonsense"]) == admin_cli.EXIT_UNREACHABLE
    assert "nonsense is no address" in stderr.getvalue()


@pytest.mark.parametrize("interval", ["0.1s", "2h", "soon"])
def test_an_interval_out_of_bounds_is_refused(interval: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["top", "--interval", interval])
    assert ended.value.code == 2 and "has to be" in capsys.readouterr().err


def test_the_flags_reach_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    in_terminal(monkeypatch)
    made: list[dict[str, Any]] = []

    class Screen:
        return_code = 0

        def __init__(self, client: object, **told: Any) -> None:
            made.append(told)

        def run(self) -> None:
            pass

    monkeypatch.setattr(app, "TopApp", Screen)
    words = ["top", "--admin", "127.0.0.1:9", "--interval", "500ms", "--filter", "key=alice gpu", "--view", "keys"]
    args = cli.build_parser("top").parse_args(words)
    assert command.run(args, {"NO_COLOR": ""}) == 0 and command.run(args, {}) == 0
    wanted = {"interval_s": 0.5, "view": "keys", "filter_text": "key=alice gpu"}
    assert made == [{**wanted, "colours": False}, {**wanted, "colours": True}]


def test_the_parser_loads_no_library_for_terminals() -> None:
    """Completion and --help wait for it."""
    code = (
        "import sys; from streamd import cli; cli.build_parser('top');"
        "print(sorted(name for name in ('textual', 'rich', 'asyncio') if name in sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert told.stdout.strip() == "[]"
