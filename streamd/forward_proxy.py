"""Forward proxies: the way out of a network, by CONNECT (RFC 9110 9.3.6), as settings or the environment name them.

The environment says it as curl, Go and the SDKs read it: HTTPS_PROXY for https servers, in either case, the lower case
first; NO_PROXY for exceptions. A server of this machine is never asked through a proxy for the environment's sake.
"""

from __future__ import annotations

import base64
import ipaddress
import re
import urllib.parse
from collections.abc import Mapping
from typing import Final, NamedTuple

from streamd.addresses import is_host
from streamd.rows import Refused

DIRECT: Final = "direct"
WANTED: Final = "http://HOST[:PORT], without user and path, or direct"
_VARIABLES: Final = ("https_proxy", "HTTPS_PROXY")
_EXCEPTIONS: Final = ("no_proxy", "NO_PROXY")


class ForwardProxy(NamedTuple):
    """A proxy; `credentials` is the value of Proxy-Authorization, or empty."""

    host: str
    port: int
    credentials: str = ""

    def __repr__(self) -> str:
        return f"ForwardProxy({self.host}:{self.port})"  # the credentials are a secret


def parse_proxy(text: str, *, with_user: bool = False) -> ForwardProxy:
    """Read `http://[USER:PASSWORD@]HOST[:PORT]`, the user only if that is allowed; the scheme may be missing.

    Raises Refused.
    """
    try:
        parts = urllib.parse.urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port or 80
    except ValueError:
        raise Refused(WANTED) from None
    host = parts.hostname or ""
    odd = re.search(r"[^!-~]|\\", text) or parts.path not in ("", "/") or parts.query or parts.fragment
    if parts.scheme.lower() != "http" or odd or not is_host(host) or (parts.username is not None and not with_user):
        raise Refused(WANTED)
    if parts.username is None:
        return ForwardProxy(host, port)
    user, password = (urllib.parse.unquote(each or "") for each in (parts.username, parts.password))
    return ForwardProxy(host, port, basic(f"{user}:{password}"))


def check_proxy(text: str) -> None:
    """Refuse a text that names no proxy of a setting."""
    if text != DIRECT:
        parse_proxy(text)


def basic(user_and_password: str) -> str:
    """The credentials of `USER:PASSWORD` (RFC 7617)."""
    return "Basic " + base64.b64encode(user_and_password.encode()).decode()


def variable_in(environ: Mapping[str, str]) -> str:
    """The variable that names a proxy for https servers; "" if none does."""
    return next((name for name in _VARIABLES if environ.get(name)), "")


def of_environment(environ: Mapping[str, str], host: str, port: int) -> ForwardProxy | None:
    """The proxy to an https server, if the environment names one. Raises Refused for a proxy that can't be used."""
    variable = variable_in(environ)
    exceptions = next((environ[name] for name in _EXCEPTIONS if environ.get(name)), "")
    if not variable or _is_of_this_machine(host) or is_excepted(host, port, exceptions):
        return None
    return parse_proxy(environ[variable].strip(), with_user=True)


def is_excepted(host: str, port: int, exceptions: str) -> bool:
    """Whether NO_PROXY names the server: `*`, a name and all below it, an address or a network, perhaps with a port."""
    return any(_names(entry.strip().lower(), host.lower(), port) for entry in exceptions.split(",") if entry.strip())


def _names(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    network = _network(entry)
    if network is not None:
        address = _address(host)
        return address is not None and address in network
    name, colon, digits = entry.rpartition(":")
    if colon and digits.isascii() and digits.isdigit():
        if int(digits) != port:
            return False
        return _names(name.strip("[]"), host, port)
    name = entry.removeprefix("*").lstrip(".")
    return name != "" and (host == name or host.endswith(f".{name}"))


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text.strip("[]"), strict=False)
    except ValueError:
        return None


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _is_of_this_machine(host: str) -> bool:
    address = _address(host)
    return (address is not None and address.is_loopback) or host == "localhost" or host.endswith(".localhost")
