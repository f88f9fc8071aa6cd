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


@pytest.mark.parametrize("content", [b"sk-1\n", b"sk-1\r\n", b" sk-1 \n\n", b"\xef\xbb\xbfsk-1\r\n"])
def test_a_key_is_read_from_a_file_as_editors_and_secrets_write_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    (tmp_path / "streamd.toml").write_text('[[upstream]]\nurl = "http://127.0.0.1:1"\nkey_file = "key"\n')
    assert load(file=tmp_path / "streamd.toml", environ={}, flags={}).upstreams[0].key == "sk-1"


@pytest.mark.parametrize("value", ["sk-1\n", " sk-1 ", "sk-1"])
def test_a_key_is_read_from_a_variable_as_shells_fill_it(tmp_path: Path, value: str) -> None:
    (tmp_path / "streamd.toml").write_text('[[upstream]]\nurl = "http://127.0.0.1:1"\nkey_env = "KEY"\n')
    assert load(file=tmp_path / "streamd.toml", environ={"KEY": value}, flags={}).upstreams[0].key == "sk-1"


@pytest.mark.parametrize("content", [b"", b"\n", b"sk-1\nsk-2\n", b"sk-\xc3\xa9\n", b"\x00"])
def test_a_file_that_holds_no_single_key_is_refused_without_showing_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    (tmp_path / "streamd.toml").write_text('[[upstream]]\nurl = "http://127.0.0.1:1"\nkey_file = "key"\n')
    with pytest.raises(ConfigError, match="must hold one API key") as raised:
        load(file=tmp_path / "streamd.toml", environ={}, flags={})
    assert "sk-" not in str(raised.value)


CALLS = ("/chat/completions", "/completions", "/responses", "/messages", "/embeddings")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("around", ["http://h:1/v1{}", "https://h/api/paas/v4{}/", "http://h:1/openai{}?api-version=1"])
def test_the_address_of_a_call_is_no_base(call: str, around: str) -> None:
    with pytest.raises(ConfigError, match="without a call's own path"):
        load(file=None, environ={}, flags={"upstream": [around.format(call)]})


@pytest.mark.parametrize(
    "url", ["http://h:1/models", "http://h:1/my-completions", "http://h:1/messages/eu", "http://h:1"]
)
def test_a_base_that_only_looks_like_a_call_is_taken(url: str) -> None:
    assert load(file=None, environ={}, flags={"upstream": [url]}).upstreams[0].url == url
