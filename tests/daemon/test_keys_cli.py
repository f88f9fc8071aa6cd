import argparse
import re
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from streamd.core.auth import Principal
from streamd.core.keys import EXPIRED, INVALID, Keys
from streamd.daemon import keyfile, keys_cli

NOW = datetime(2029, 1, 1, tzinfo=UTC).timestamp()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def run(path: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    keys_cli.add_arguments(parser)
    return keys_cli.run(parser.parse_args(["--file", str(path), *words]))


def add(path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(path, "add", *words) == 0
    return capsys.readouterr().out.strip()


def test_a_key_is_printed_once_and_works(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    presented = add(path, capsys, "alice")
    assert re.fullmatch(r"sk-[A-Za-z0-9]{8}-[A-Za-z0-9]{32}", presented)
    content = keyfile.read(path)
    secret = presented.rpartition("-")[2]
    assert secret.encode() not in content
    principal = Keys.parse(content).authenticate(presented.encode(), time.time())
    assert isinstance(principal, Principal)
    assert presented.split("-")[1] == principal.id
    assert run(path, "list") == 0
    listed = capsys.readouterr().out
    assert principal.id in listed
    assert "alice" in listed
    assert secret not in listed
    assert not re.search("[0-9a-f]{16}", listed)  # no salt, no hash


def test_root_is_told_that_the_daemon_has_to_read_a_new_file(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for euid, is_told in ((1000, False), (0, True), (0, False)):  # the last: the file is there already
        if euid == 0 and is_told:
            path.unlink()
        monkeypatch.setattr(keys_cli.os, "geteuid", lambda euid=euid: euid)
        assert run(path, "add", "alice") == 0
        assert ("belongs to root" in capsys.readouterr().err) is is_told


def test_the_flags_of_add_set_rights_and_limits(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "alice --model llama-* --model mock --route /v1/chat/* --streams-max 8 --rpm 60 --tpm 1000 --expires 2099-01-31"
    )
    add(path, capsys, *words.split())
    (key,) = Keys.parse(keyfile.read(path))
    assert (key.models, key.routes) == (("llama-*", "mock"), ("/v1/chat/*",))
    assert (key.streams_max, key.requests_per_minute, key.tokens_per_minute) == (8, 60, 1000)
    assert key.expires_unix == datetime(2099, 1, 31, tzinfo=UTC).timestamp()
    assert run(path, "list") == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[1:] == ["alice", "/v1/chat/*", "llama-*,mock", "8", "60", "1000", "2099-01-31T00:00:00Z"]


def test_an_expiry_is_kept(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    presented = add(path, capsys, "alice", "--expires", "1h").encode()
    keys = Keys.parse(keyfile.read(path))
    assert isinstance(keys.authenticate(presented, time.time()), Principal)
    assert keys.authenticate(presented, time.time() + 3602) is EXPIRED


def test_a_revoked_key_is_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    presented = [add(path, capsys, name) for name in ("alice", "bob")]
    assert run(path, "revoke", presented[0].split("-")[1]) == 0
    keys = Keys.parse(keyfile.read(path))
    assert keys.authenticate(presented[0].encode(), NOW) is INVALID
    assert isinstance(keys.authenticate(presented[1].encode(), NOW), Principal)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["revoke", "nobody"], "no key has the id 'nobody'"),
        (["add", "a\nb"], "name: has to be"),
        (["add", "alice", "--streams-max", "0"], "streams_max: has to be a whole number from 1"),
        (["add", "alice", "--rpm", "-1"], "requests_per_minute"),
        (["add", "alice", "--route", "v1"], "routes"),
        (["add", "alice", "--model", ""], "models"),
        (["add", "alice", "--expires", "soon"], "--expires soon: give 12h, 30d, 4w, 2030-01-31"),
        (["add", "alice", "--expires", "2001-01-31"], "in the past"),
        (["add", "alice", "--expires", "0d"], "--expires 0d: give"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(
    path: Path, capsys: pytest.CaptureFixture[str], words: list[str], text: str
) -> None:
    add(path, capsys, "first")
    content = path.read_bytes()
    assert run(path, *words) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("streamd keys: ")
    assert err.count("\n") == 1
    assert text in err
    assert path.read_bytes() == content


def test_a_missing_or_unusable_key_file_is_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(path, "list") == 1
    assert run(path, "revoke", "k1") == 1
    assert not path.exists()  # revoking makes no file
    assert run(path / "x", "add", "alice") == 1
    path.write_text("# people\nrubbish\n")
    path.chmod(0o600)
    capsys.readouterr()
    for words in (["list"], ["add", "alice"], ["revoke", "k1"]):
        assert run(path, *words) == 1
        assert "line 2: not a JSON object" in capsys.readouterr().err
    path.chmod(0o644)
    assert run(path, "list") == 1
    assert "chmod 600" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("90s", "2029-01-01T00:01:30Z"),
        ("5m", "2029-01-01T00:05:00Z"),
        ("12h", "2029-01-01T12:00:00Z"),
        ("30d", "2029-01-31T00:00:00Z"),
        ("4w", "2029-01-29T00:00:00Z"),
        ("2030-01-31", "2030-01-31T00:00:00Z"),
        ("2030-01-31T12:00:00+01:00", "2030-01-31T11:00:00Z"),
    ],
)
def test_an_expiry_is_a_duration_or_a_time(text: str, when: str) -> None:
    assert keys_cli.parse_when(text, NOW) == datetime.fromisoformat(when).timestamp()


@pytest.mark.parametrize("text", ["", "d", "-1d", "1.5d", "1y", "30", "9999999d", "2030-13-01", "2030-01-31T12:00:00"])
def test_a_text_that_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--expires"):
        keys_cli.parse_when(text, NOW)
