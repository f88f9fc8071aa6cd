"""Addresses of listeners and URLs of upstreams, and the form of other texts among the settings."""

from __future__ import annotations

import ipaddress
import os
import re
import urllib.parse
from typing import NamedTuple

from streamd.rows import Check, Refused


class Address(NamedTuple):
    """Address of a listener: `path` for a Unix socket, else `host` and `port` (0: the kernel's choice)."""

    host: str
    port: int
    path: str

    @property
    def is_unix(self) -> bool:
        return bool(self.path)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address; a name counts as reachable, unless it is localhost."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9])?", re.A)


def parse_address(text: str) -> Address:
    """Read `HOST:PORT`, `[::1]:PORT` or `unix:/path`. Raises Refused."""
    wanted = "HOST:PORT, [IPV6]:PORT or unix:/absolute/path"
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        # Why 107: sun_path has 108 bytes with its NUL (unix(7)).
        if not path.startswith("/") or len(os.fsencode(path)) > 107 or "\0" in path:
            raise Refused(f"{wanted}, the path of at most 107 bytes")
        return Address("", 0, path)
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or len(port) > 5 or int(port) > 65535:
        raise Refused(wanted)
    if host.startswith("[") and host.endswith("]"):
        try:
            return Address(str(ipaddress.IPv6Address(host[1:-1])), int(port), "")
        except ValueError:
            raise Refused(wanted) from None
    if not _HOST.fullmatch(host):
        raise Refused(wanted)
    return Address(host, int(port), "")


# Checks of texts


def check_address(text: str) -> None:
    """Refuse a text that isn't a listener's address."""
    parse_address(text)


def check_admin(text: str) -> None:
    """Refuse an address that other machines can reach."""
    if not parse_address(text).is_loopback:
        raise Refused


def check_network(text: str) -> None:
    """Refuse a text that isn't an IP address, a network, or `unix` for peers on Unix sockets."""
    if text == "unix":
        return
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise Refused from None


HOST_NAME = _HOST
ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?", re.A)
UPSTREAM_NAME = re.compile(r"[A-Za-z0-9._:\[\]-]{1,128}", re.A)
FIELD_VALUE = re.compile(r"[!-~](?:[ -~]*[!-~])?", re.A)  # RFC 9110 5.5, without obs-text and folding
_FIELD_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", re.A)  # RFC 9110 5.1, token
# Fields that streamd writes itself, and those for a single hop (RFC 9110 7.6.1); Authorization comes from the key.
_OWN_FIELDS = frozenset(
    {
        "accept-encoding",
        "authorization",
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
ROUTE_PATH = re.compile(r"/[!-)+-~]*\*?", re.A)


def matching(pattern: re.Pattern[str]) -> Check:
    """A check that refuses a text unless the pattern matches all of it."""

    def check(text: str) -> None:
        if not pattern.fullmatch(text):
            raise Refused

    return check


def check_field_name(text: str) -> None:
    """Refuse a text that isn't the name of a header field, or names a field that streamd writes itself."""
    if not _FIELD_NAME.fullmatch(text) or text.lower() in _OWN_FIELDS:
        raise Refused


def check_passed_field(text: str) -> None:
    """Refuse a text that is no response field's name, or names a CORS field: those are about streamd's own pages."""
    if not _FIELD_NAME.fullmatch(text) or text.lower().startswith("access-control-"):
        raise Refused


def check_url(text: str) -> None:
    """Refuse a text that isn't an upstream's URL."""
    split_url(text)


class UpstreamOrigin(NamedTuple):
    """An upstream's URL taken apart: `base` is the path in front of /v1, without a slash at its end."""

    tls: bool
    host: str
    port: int
    base: str

    @property
    def authority(self) -> str:
        """The Host field's value; the scheme's own port is left out."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.base}"


def split_url(text: str) -> UpstreamOrigin:
    """Take an upstream's URL apart, with or without a trailing /v1 or /v1beta. Raises Refused: no passwords."""
    wanted = "http://HOST[:PORT][/BASE] or https://…, without user, query and fragment"
    try:
        parts = urllib.parse.urlsplit(text)
        port = parts.port
    except ValueError:
        raise Refused(wanted) from None
    base = re.sub(r"/v1(?:beta)?\Z", "", parts.path.rstrip("/")).rstrip("/")
    odd = re.search(r"[^!-~]|//|/\.\.?(/|$)|%2[ef]|%5c|[\\\\?#@]", text.partition("://")[2], re.I)
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or odd or not (_HOST.fullmatch(host) or _is_ipv6(host)) or port == 0:
        raise Refused(wanted)
    tls = parts.scheme == "https"
    return UpstreamOrigin(tls, host, port or (443 if tls else 80), base)


def _is_ipv6(host: str) -> bool:
    try:
        return bool(ipaddress.IPv6Address(host))
    except ValueError:
        return False
