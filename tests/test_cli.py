"""The command line: its output, the stream that it goes to, and the exit status."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import streamd
from streamd import cli, reference
from streamd.config import ROUTE_ROWS, ROWS, SECTIONS, UPSTREAM_ROWS, Settings, load


@pytest.fixture(autouse=True)
def _no_settings_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cli.os.environ.copy():
        if name.startswith("STREAMD_"):
            monkeypatch.delenv(name)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that `serve` ran with; the daemon itself is replaced."""
    ran: list[Settings] = []

    def run(settings: Settings, load: Callable[[], Settings], argv: Sequence[str]) -> int:
        assert load() == settings, "a reload reads what the start has read"
        ran.append(settings)
        return 7

    monkeypatch.setattr("streamd.daemon.parent.run", run)
    return ran


def test_version_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"streamd {streamd.__version__}\n"


def test_serve_without_flags_uses_the_defaults(served: list[Settings]) -> None:
    assert cli.main(["serve"]) == 7
    assert served == [Settings()]


def test_serve_reads_flags_variables_and_a_file(
    served: list[Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "streamd.toml"
    file.write_text('heartbeat = "1s"\nretention = "1s"\nring_slots = 32\n')
    monkeypatch.setenv("STREAMD_CONFIG", str(file))
    monkeypatch.setenv("STREAMD_RETENTION", "2s")
    flags = (
        "--heartbeat 3s --listen 127.0.0.1:0 --listen unix:/a --upstream http://a --upstream http://b/v1 --ops-public"
    )
    cli.main(["serve", *flags.split()])
    (settings,) = served
    assert (settings.heartbeat_s, settings.retention_s, settings.ring_slots) == (3.0, 2.0, 32)
    assert (settings.listen, settings.ops_public) == (("127.0.0.1:0", "unix:/a"), True)
    assert [upstream.url for upstream in settings.upstreams] == ["http://a", "http://b"]


def test_a_flag_is_taken_under_its_earlier_name(served: list[Settings]) -> None:
    cli.main(["serve", "--flush-interval", "50ms"])
    assert served[0].write_interval_s == 0.05


def test_a_flag_overrides_a_variable(served: list[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMD_OPS_PUBLIC", "true")
    cli.main(["serve", "--no-ops-public"])
    assert served[0].ops_public is False


def test_wrong_settings_go_to_standard_error(served: list[Settings], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--ring-slots", "5", "--policy", "drop"]) == 2
    assert served == []
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "streamd: flag --ring-slots: ring_slots = '5': must be a whole number from 32 to 128",
        "streamd: flag --policy: policy = 'drop': must be one of coalesce, drop_oldest, close",
    ]


@pytest.mark.parametrize("argv", [[], ["serv"], ["serve", "--ring", "64"], ["serve", "extra"], ["check-config"]])
def test_a_wrong_command_line_ends_with_the_usage_and_status_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: streamd")


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        ("serv", "did you mean serve?"),
        ("serve --conection-max 3", "did you mean --conns-max?"),
        ("serve --conns_max=3", "did you mean --conns-max?"),
        ("serve --upstrem=http://x --lisen :1", "did you mean --upstream?; did you mean --listen?"),
        ("serve -upstream http://x", "did you mean --upstream?"),
        ("serve --cors-credential", "did you mean --cors-credentials?"),
        ("keys --file x ad bob", "did you mean add?"),
        ("keys --file x add --exipres 1d", "did you mean --expires?"),
        ("mock-llm --lisen 1", "did you mean --listen?"),
        ("check-config streamd.toml --schem", ""),
        ("serve extra", ""),
        ("serve --xyzzy", ""),
        ("neither", ""),
    ],
)
def test_a_misspelt_word_is_asked_back(argv: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(argv.split())
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"; {hint}") if hint else "did you mean" not in last


def help_of(flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", flag])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_all_names_every_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = help_of("--help-all", capsys, monkeypatch)
    assert len(out.split("\n\n")[0].splitlines()) == 1, "the usage is no list of seventy flags"
    assert [row.flag for row in ROWS if row.flag not in out] == []


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_fits_a_screen_and_names_help_all(
    flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = help_of(flag, capsys, monkeypatch).splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    out = " ".join(" ".join(lines).split())
    assert "--config FILE" in out and "--upstream URL" in out and "--help-all" in out
    assert [section for section in SECTIONS if section not in out] == []


def test_check_config_reports_the_faults_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMD_RING_SLOTS", "not the file's fault")
    monkeypatch.setenv("GPU_KEY", "sk-1")
    file = tmp_path / "streamd.toml"
    file.write_text("ring_slots = 64\n[[upstream]]\nurl = 'http://a'\nkey_env = 'GPU_KEY'\n")
    assert cli.main(["check-config", str(file)]) == 0
    assert capsys.readouterr() == (f"{file}: fine\n", "")
    file.write_text("\nring_slots = 5\n")
    assert cli.main(["check-config", str(file)]) == 2
    assert capsys.readouterr() == ("", f"streamd: {file}:2: ring_slots = 5: must be a whole number from 32 to 128\n")


def test_the_reference_has_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config-reference"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for row in (*ROWS, *UPSTREAM_ROWS, *ROUTE_ROWS):
        assert any(line.startswith(f"| `{row.key}`") and row.text.replace("|", "\\|") in line for line in lines), (
            row.key
        )


def uncommented(text: str) -> str:
    """The settings of the example, which follow a # without a blank, without its explanations."""
    return "\n".join(line[1:] for line in text.splitlines() if re.match(r"#\S", line))


def test_the_example_is_a_comment_from_end_to_end_and_explains_every_setting(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["config-reference", "--toml"]) == 0
    text = capsys.readouterr().out
    assert tomllib.loads(text) == {}
    assert max(map(len, text.splitlines())) <= 120
    flowing = " ".join(re.sub(r"^# ", "", text, flags=re.MULTILINE).split())
    for row in (*ROWS, *UPSTREAM_ROWS, *ROUTE_ROWS):
        assert f"{row.text} Takes {row.allowed()}." in flowing, row.key


def test_the_example_has_every_default(tmp_path: Path) -> None:
    file = tmp_path / "streamd.toml"
    file.write_text(uncommented(reference.toml()))
    settings = load(file=file, environ={}, flags={})
    assert settings == Settings(upstreams=settings.upstreams, routes=settings.routes)
    assert (settings.upstreams[0].name, settings.routes[0].path) == ("gpu1", "/v1/responses")
    mentioned = tomllib.loads(file.read_text())
    for row in ROWS:
        table, _, key = row.key.rpartition(".")
        assert key in (mentioned[table] if table else mentioned)
    assert list(mentioned["upstream"][0]) == [row.key for row in UPSTREAM_ROWS]
    assert list(mentioned["route"][0]) == [row.key for row in ROUTE_ROWS]


def test_the_mock_and_the_keys_are_commands_of_streamd(capsys: pytest.CaptureFixture[str]) -> None:
    args = cli.build_parser().parse_args(["mock-llm", "--listen", "127.0.0.1:0"])
    assert callable(args.run)
    args = cli.build_parser().parse_args(["keys", "--file", "keys", "list"])
    assert isinstance(args, argparse.Namespace)
    assert args.run is not None


def test_streamd_runs_as_a_module() -> None:
    ran = subprocess.run([sys.executable, "-m", "streamd", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout == f"streamd {streamd.__version__}\n"
