"""Modes of files with credentials, before anything listens."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamd.config import ConfigError, Settings
from streamd.daemon.file_modes import check_modes

SECRETS = ("keys_file", "token_secret_file", "tls_key")


def named(tmp_path: Path, name: str, mode: int) -> Settings:
    path = tmp_path / name
    path.touch()
    path.chmod(mode)
    return Settings(**{name: str(path)})


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize(("mode", "fits"), [(0o600, True), (0o640, True), (0o644, False), (0o620, False)])
def test_a_secret_that_others_may_read_or_change_is_refused(tmp_path: Path, name: str, mode: int, fits: bool) -> None:
    settings = named(tmp_path, name, mode)
    if fits:
        check_modes(settings)
    else:
        with pytest.raises(ConfigError, match=f"credential files: {name}: .* has mode {mode:04o}.*chmod 600"):
            check_modes(settings)


@pytest.mark.parametrize(("mode", "fits"), [(0o644, True), (0o664, False), (0o666, False)])
def test_a_key_set_that_others_may_write_is_refused(tmp_path: Path, mode: int, fits: bool) -> None:
    settings = named(tmp_path, "token_jwks_file", mode)
    if fits:
        check_modes(settings)
    else:
        with pytest.raises(ConfigError, match="token_jwks_file: .* others may write it"):
            check_modes(settings)


def test_a_missing_file_is_left_to_its_reader(tmp_path: Path) -> None:
    check_modes(Settings(keys_file=str(tmp_path / "none")))
