"""Settings as editors, shells and clusters have been seen to hand them over (README.md has the reports)."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamd.config import ConfigError, Settings, load

TEXT = '# streamd\nheartbeat = "7s"\n[[upstream]]\nname = "a"\nurl = "http://127.0.0.1:1"\n'


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_file_that_an_editor_on_windows_saved_is_read(tmp_path: Path, line_end: str) -> None:
    file = tmp_path / "streamd.toml"
    file.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", line_end).encode())
    settings = load(file=file, environ={}, flags={})
    assert settings.heartbeat_s == 7.0 and settings.upstreams[0].name == "a"
    file.write_bytes(b"\xef\xbb\xbf" + (TEXT + "nonsense = 1\n").replace("\n", line_end).encode())
    with pytest.raises(ConfigError, match=r"streamd\.toml:6: "):
        load(file=file, environ={}, flags={})


def test_a_service_of_kubernetes_with_the_daemons_name_changes_no_setting() -> None:
    environ = {
        "STREAMD_SERVICE_HOST": "10.98.190.45",
        "STREAMD_SERVICE_PORT": "80",
        "STREAMD_SERVICE_PORT_HTTP": "80",
        "STREAMD_PORT": "tcp://10.98.190.45:80",
        "STREAMD_PORT_80_TCP": "tcp://10.98.190.45:80",
        "STREAMD_PORT_80_TCP_ADDR": "10.98.190.45",
        "STREAMD_PORT_80_TCP_PORT": "80",
        "STREAMD_PORT_80_TCP_PROTO": "tcp",
    }
    assert load(file=None, environ=environ, flags={}) == Settings()


def test_a_whole_answer_may_take_as_long_as_the_sdks_wait_for_it() -> None:
    settings = Settings()
    assert settings.ttft_timeout_s >= 600 and settings.idle_timeout_s >= 600
