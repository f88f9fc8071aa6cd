"""Addresses of listeners and URLs of upstreams, and the form of other texts among the settings."""

from __future__ import annotations

import ipaddress
import os
import re
import urllib.parse
from typing import Final, NamedTuple

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


def check_collector(text: str) -> None:
    """Refuse a text that is no base URL of a collector."""
    if len(text) > 2048 or not text.isascii() or " " in text:
        raise Refused
    try:
        parts = urllib.parse.urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise Refused from None
    is_plain = parts.username is None and not parts.query and not parts.fragment and "?" not in text
    if parts.scheme not in ("http", "https") or not is_host(host) or port == 0 or not is_plain:
        raise Refused


# A version as servers write it in their paths: /v1, /api/paas/v4, /v1beta/openai.
_VERSION: Final = re.compile(r"/v[0-9]+(?:(?:alpha|beta)[0-9]*)?(?=/|\Z)")
# The version in a request's path.
_REQUESTED_VERSION: Final = re.compile(rb"/v1(?:beta)?(?=/|\Z)")
# At the end of a URL it says nothing: requests have it.
_OWN_VERSION: Final = re.compile(r"/v1(?:beta)?\Z")
# In words: the upstreams' URLs that are taken.
UPSTREAM_URL: Final = (
    "http://HOST[:PORT][/BASE][?QUERY], https://…, unix:/PATH or http+unix://%2FPATH[/BASE], without user, "
    "and without a call's own path (/chat/completions)"
)
# The address of a single call, which many programs take for a base. Azure has bases that end in /models.
_ENDPOINT: Final = re.compile(r"/(?:chat/completions|completions|responses|messages|embeddings)/*\Z")
_QUERY: Final = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@/?%-]{1,1000}", re.A)

UPSTREAM_PATHS: Final = ("auto", "replace", "append")


class UpstreamOrigin(NamedTuple):
    """An upstream's URL taken apart.

    `base` is the path in front of a request's path, without a slash at its end; if it `replaces`, it stands for the
    version in front of the request's path. `query` is a part of each request. `socket`: the path of a Unix socket.
    """

    tls: bool
    host: str
    port: int
    base: str
    replaces: bool = False
    query: str = ""
    socket: str = ""

    @property
    def authority(self) -> str:
        """The Host field's value; the scheme's own port is left out."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        rest = self.base + (f"?{self.query}" if self.query else "")
        if self.socket:
            return f"http+unix://{urllib.parse.quote(self.socket, safe='')}{rest}" if rest else f"unix:{self.socket}"
        return f"{'https' if self.tls else 'http'}://{self.authority}{rest}"

    @property
    def name(self) -> str:
        """A name for logs and metrics: host and port, or the socket's path without slashes."""
        if self.socket:
            return "unix:" + re.sub(r"[^A-Za-z0-9._-]", "-", self.socket.strip("/"))[-100:]
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def version(self) -> bytes:
        """The part of a request's path that `base` stands for."""
        return b"/v1" if self.replaces else b""

    def target(self, asked: bytes) -> bytes:
        """The target of a request as this server has it: its base, and its query behind the request's own.

        Of a parameter that both have, the server's own value alone is sent.
        """
        path, mark, query = asked.partition(b"?")
        if self.replaces:
            path = _REQUESTED_VERSION.sub(b"", path, count=1) if _REQUESTED_VERSION.match(path) else path
        path = (self.base.encode() + path) or b"/"
        if not self.query:
            return path + mark + query
        own = self.query.encode()
        names = {_parameter_name(each) for each in own.split(b"&")}
        kept = [each for each in query.split(b"&") if each and _parameter_name(each) not in names]
        return b"%b?%b" % (path, b"&".join([*kept, own]))


def _parameter_name(pair: bytes) -> bytes:
    return urllib.parse.unquote_to_bytes(pair.partition(b"=")[0].replace(b"+", b" "))


def split_url(text: str, path: str = "auto") -> UpstreamOrigin:
    """Take an upstream's URL apart; `path`, of UPSTREAM_PATHS, says how its path meets those of requests.

    `auto`: a path with a version in it replaces the version of requests, any other stands in front of their paths.
    Raises Refused: no passwords.
    """
    wanted = UPSTREAM_URL
    if text.startswith("unix:"):
        try:
            address = parse_address(re.sub(r"\Aunix://(?=/)", "unix:", text))
        except Refused as refused:
            raise Refused(f"{wanted} ({refused})") from None
        return UpstreamOrigin(False, "localhost", 80, "", path == "replace", socket=address.path)
    try:
        parts = urllib.parse.urlsplit(text)
        port = parts.port
    except ValueError:
        raise Refused(wanted) from None
    before_query, mark, _ = text.partition("?")
    rest = before_query.partition("://")[2]
    is_unix = parts.scheme == "http+unix"
    below_host = rest.partition("/")[1] + rest.partition("/")[2] if is_unix else rest
    odd = re.search(r"[^!-~]|//|/\.\.?(/|$)|%2[ef]|%5c|[\\\\#@]", below_host, re.I)
    if odd or (mark and not _QUERY.fullmatch(parts.query)) or "#" in text or _ENDPOINT.search(parts.path):
        raise Refused(wanted)
    base, replaces = _base_of(parts.path.rstrip("/"), path)
    if is_unix:
        return UpstreamOrigin(False, "localhost", 80, base, replaces, parts.query, _socket_of(parts.netloc, wanted))
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not is_host(host) or port == 0:
        raise Refused(wanted)
    tls = parts.scheme == "https"
    return UpstreamOrigin(tls, host, port or (443 if tls else 80), base, replaces, parts.query)


def _base_of(written: str, path: str) -> tuple[str, bool]:
    """The base of a URL's path, and whether it replaces the version of requests."""
    if path != "auto":
        return written, path == "replace"
    shorter = _OWN_VERSION.sub("", written).rstrip("/")
    if _VERSION.search(shorter) is None:
        return shorter, False
    return written, True


def _socket_of(quoted: str, wanted: str) -> str:
    try:
        return parse_address("unix:" + urllib.parse.unquote(quoted, errors="strict")).path
    except (Refused, UnicodeError):
        raise Refused(wanted) from None


def is_host(text: str) -> bool:
    """Whether this is a host's name or address, without brackets."""
    return bool(_HOST.fullmatch(text)) or _is_ipv6(text)


def _is_ipv6(host: str) -> bool:
    try:
        return bool(ipaddress.IPv6Address(host))
    except ValueError:
        return False
