from __future__ import annotations

import pytest

from streamd.wire.pages import host_of, is_local, is_of_another_page


@pytest.mark.parametrize(
    ("authority", "host"),
    [
        (b"", ""),
        (b"localhost", "localhost"),
        (b"LOCALHOST:8080", "localhost"),
        (b"localhost.:8080", "localhost"),
        (b"127.0.0.1:80", "127.0.0.1"),
        (b"[::1]:8080", "::1"),
        (b"[::1]", "::1"),
        (b"Evil.Example.:", "evil.example"),
    ],
)
def test_the_host_of_a_host_field_has_no_port_brackets_and_root_dot(authority: bytes, host: str) -> None:
    assert host_of(authority) == host


LOCAL = ["", "localhost", "streamd.localhost", "a.b.localhost", "127.0.0.1", "10.0.0.7", "::1", "fe80::1%eth0"]
OTHERS = ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evillocalhost", "0x7f000001", "1.2.3"]


@pytest.mark.parametrize("host", LOCAL)
def test_loopback_names_and_addresses_are_local(host: str) -> None:
    assert is_local(host, (), plain_names=False)


@pytest.mark.parametrize("host", OTHERS)
def test_names_that_others_can_bind_are_not_local_unless_they_are_allowed(host: str) -> None:
    assert not is_local(host, ("allowed.example",), plain_names=False)
    assert is_local(host, (host,), plain_names=False)


def test_a_name_without_a_dot_is_local_only_where_plain_names_are() -> None:
    assert is_local("streamd", (), plain_names=True)
    assert not is_local("streamd", (), plain_names=False)
    assert not is_local("evil.example", (), plain_names=True)


HOST = b"127.0.0.1:9000"
OURS = b"http://127.0.0.1:9000"


@pytest.mark.parametrize(
    ("site", "origin", "another"),
    [
        (None, None, False),  # a program
        (None, OURS, False),
        (None, b"HTTP://127.0.0.1:9000", False),
        (None, b"http://127.0.0.1", True),  # another port is another origin
        (None, b"http://127.0.0.1:9001", True),
        (None, b"https://evil.example", True),
        (None, b"null", True),
        (None, b"", True),
        (b"same-origin", OURS, False),
        (b"same-origin", None, False),
        (b"same-origin", b"https://ops.example", False),  # a proxy in front has changed Host
        (b"Same-Origin", None, False),
        (b"none", None, False),  # an address that the user typed
        (b"none", b"https://evil.example", True),
        (b"same-site", None, True),
        (b"same-site", OURS, True),
        (b"cross-site", None, True),
        (b"cross-site", OURS, True),
        (b"same-origin, cross-site", OURS, True),
        (b"", None, True),
        (b"unknown", None, True),
    ],
)
def test_a_browser_says_for_which_page_it_asks(site: bytes | None, origin: bytes | None, another: bool) -> None:
    fields = {b"sec-fetch-site": site, b"origin": origin}
    assert is_of_another_page(fields.get, HOST) is another


def test_the_schemes_own_port_may_be_left_out() -> None:
    assert not is_of_another_page({b"origin": b"https://ops.example"}.get, b"ops.example:443")
    assert not is_of_another_page({b"origin": b"http://ops.example:80"}.get, b"ops.example")
    assert is_of_another_page({b"origin": b"https://ops.example"}.get, b"ops.example:80")
