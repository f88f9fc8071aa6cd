"""Forward proxies: what settings and the environment say, and which servers NO_PROXY excepts."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest

from streamd.config import ConfigError, UpstreamSettings, load
from streamd.forward_proxy import ForwardProxy, check_proxy, is_excepted, of_environment, parse_proxy
from streamd.rows import Refused


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("text", "proxy"),
    [
        ("http://proxy.corp:3128", ForwardProxy("proxy.corp", 3128)),
        ("http://proxy.corp:3128/", ForwardProxy("proxy.corp", 3128)),
        ("proxy.corp:3128", ForwardProxy("proxy.corp", 3128)),
        ("http://proxy", ForwardProxy("proxy", 80)),
        ("HTTP://[::1]:1", ForwardProxy("::1", 1)),
        ("http://me:p%40ss%3A@proxy:1", ForwardProxy("proxy", 1, basic("me:p@ss:"))),
        ("http://me@proxy:1", ForwardProxy("proxy", 1, basic("me:"))),
    ],
)
def test_a_proxy_of_the_environment_is_read(text: str, proxy: ForwardProxy) -> None:
    assert parse_proxy(text, with_user=True) == proxy
    assert of_environment({"HTTPS_PROXY": f" {text} "}, "api.example", 443) == proxy
    assert "Basic" not in repr(proxy)


@pytest.mark.parametrize(
    "text",
    [
        *("https://proxy:3128", "socks5://proxy:1080", "http://", "http://proxy:x", "http://proxy/path"),
        *("http://proxy?x", "http://pro xy", "http://proxy\r\nX: y", "http://proxy\\@evil", "http://a/b@proxy"),
    ],
)
def test_a_text_that_names_no_proxy_is_refused(text: str) -> None:
    for read in (check_proxy, lambda text: parse_proxy(text, with_user=True)):
        with pytest.raises(Refused):
            read(text)


def test_a_setting_names_no_user() -> None:
    check_proxy("http://proxy:3128")
    check_proxy("direct")
    with pytest.raises(Refused):
        check_proxy("http://me:secret@proxy:3128")


@pytest.mark.parametrize(
    ("exceptions", "host", "port", "excepted"),
    [
        ("*", "api.example", 443, True),
        ("api.example", "api.example", 443, True),
        ("API.Example", "api.example", 443, True),
        ("example", "api.example", 443, True),
        (".example", "api.example", 443, True),
        ("*.example", "api.example", 443, True),
        ("ple", "api.example", 443, False),
        ("other, api.example ,", "api.example", 443, True),
        ("api.example:8443", "api.example", 443, False),
        ("api.example:8443", "api.example", 8443, True),
        ("10.0.0.0/8", "10.1.2.3", 443, True),
        ("10.0.0.0/8", "11.1.2.3", 443, False),
        ("10.0.0.0/8", "api.example", 443, False),
        ("10.1.2.3", "10.1.2.3", 443, True),
        ("10.1.2.3:443", "10.1.2.3", 443, True),
        ("fd00::/8", "fd00::1", 443, True),
        ("[fd00::1]:443", "fd00::1", 443, True),
        ("fd00::1", "fd00::1", 443, True),
        ("", "api.example", 443, False),
        (".", "api.example", 443, False),
    ],
)
def test_no_proxy_names_servers_as_other_programs_read_it(
    exceptions: str, host: str, port: int, excepted: bool
) -> None:
    assert is_excepted(host, port, exceptions) is excepted
    found = of_environment({"HTTPS_PROXY": "http://proxy:1", "NO_PROXY": exceptions}, host, port)
    assert (found is None) is excepted


@pytest.mark.parametrize("host", ["localhost", "a.localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_a_server_of_this_machine_is_asked_directly(host: str) -> None:
    assert of_environment({"HTTPS_PROXY": "http://proxy:1"}, host, 443) is None


def test_the_lower_case_wins() -> None:
    environ = {"HTTPS_PROXY": "http://a:1", "https_proxy": "http://b:1", "NO_PROXY": "*", "no_proxy": "other"}
    assert of_environment(environ, "api.example", 443) == ForwardProxy("b", 1)


# -- settings


def loaded(folder: Path, text: str, environ: dict[str, str]) -> dict[str, UpstreamSettings]:
    file = folder / "streamd.toml"
    file.write_text(text)
    return {each.name: each for each in load(file=file, environ=environ, flags={}).upstreams}


FOUR = """[[upstream]]
name = "far"
url = "https://api.example/v1"
[[upstream]]
name = "direct"
url = "https://api.example/v1"
proxy = "direct"
[[upstream]]
name = "own"
url = "http://gpu.example"
proxy = "http://gate:8080"
proxy_auth_file = "auth"
[[upstream]]
name = "near"
url = "http://10.0.0.1"
[[upstream]]
name = "socket"
url = "unix:/run/a"
"""


def test_each_upstream_has_the_proxy_that_its_table_or_else_the_environment_names(tmp_path: Path) -> None:
    (tmp_path / "auth").write_text("me:pass word\n")
    found = loaded(tmp_path, FOUR, {"HTTPS_PROXY": "http://u:p@proxy:3128"})
    assert {name: each.through for name, each in found.items()} == {
        "far": ForwardProxy("proxy", 3128, basic("u:p")),
        "direct": None,
        "own": ForwardProxy("gate", 8080, basic("me:pass word")),
        "near": None,
        "socket": None,
    }
    assert not re.search("Basic|pass word", repr(found))
    assert all(each.through is None for name, each in loaded(tmp_path, FOUR, {}).items() if name != "own")


def test_an_upstream_of_a_flag_has_the_environments_proxy_too() -> None:
    settings = load(file=None, environ={"https_proxy": "http://proxy:1"}, flags={"upstream": ["https://api.example"]})
    assert settings.upstreams[0].through == ForwardProxy("proxy", 1)


@pytest.mark.parametrize(
    ("text", "environ", "problem"),
    [
        ("proxy = 'http://p:1'\nurl = 'unix:/a'", {}, "must be left out for a socket"),
        ("", {"HTTPS_PROXY": "socks5://me:secret@p"}, "environment HTTPS_PROXY: upstream.proxy: must be http://"),
        ("proxy_auth_file = 'auth'", {}, "must be set for proxy_auth_file"),
        ("proxy = 'http://p:1'\nproxy_auth_file = 'bad'", {}, "must hold USER:PASSWORD on one line"),
        ("proxy = 'ftp://p:1'", {}, "must be http://HOST[:PORT], without user and path, or direct"),
    ],
)
def test_a_proxy_that_can_not_be_used_ends_the_start(
    tmp_path: Path, text: str, environ: dict[str, str], problem: str
) -> None:
    (tmp_path / "auth").write_text("a:b")
    (tmp_path / "bad").write_text("secret without a colon")
    with pytest.raises(ConfigError) as caught:
        url = "" if "url" in text else "url = 'https://api.example'"
        loaded(tmp_path, f"[[upstream]]\n{url}\n{text}\n", environ)
    assert problem in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("url = 'https://h'\nclient_cert = 'c'", "upstream.client_key: must be set"),
        ("url = 'https://h'\nclient_key = 'c'", "upstream.client_cert: must be set"),
        ("url = 'http://h'\nclient_cert = 'c'\nclient_key = 'c'", "url must begin with https://"),
    ],
)
def test_a_client_certificate_needs_its_key_and_tls(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "c").write_text("")
    with pytest.raises(ConfigError, match=problem):
        loaded(tmp_path, f"[[upstream]]\n{text}\n", {})
