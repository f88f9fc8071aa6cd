"""The client's address behind proxies: X-Forwarded-For and Forwarded (RFC 7239), believed from trusted proxies only.

The rule: each proxy appends the address that it saw. The chain is read from the right: addresses of trusted proxies are
skipped, and the first other address is the client's, as a trusted proxy saw it by itself. A client can write the part
to the left of it as it likes. An entry that is no address (`unknown`, an obfuscated name, garbage) ends the walk at the
hop before it.

Only the header chosen by the settings is believed: a proxy that writes either of the two passes the other through as
the client sent it.

Addresses are texts as `ipaddress` writes them; an IPv4-mapped IPv6 address is its IPv4 address, a zone is left out. A
peer on a Unix socket is None; `unix` among the trusted makes such peers trusted. Admission decides how addresses are
counted (IPv6: by /64).
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from streamd.wire.possessive import compiled

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

X_FORWARDED_FOR: Final = b"x-forwarded-for"
FORWARDED: Final = b"forwarded"
UNIX: Final = "unix"
# Most hops read, from the right. Real chains have 1 to 4; a longer chain is an attempt to deceive.
HOPS_MAX: Final = 16
# Longest element: a node, a host name of 253 characters, a protocol. Bounds the search for an element's begin.
ELEMENT_CHARS_MAX: Final = 512

_PORT = r"(?::(?:[0-9]{1,5}|_[A-Za-z0-9._-]+))?"  # RFC 7239 6; Azure's gateways add a port to X-Forwarded-For too
_NODE = compiled(rf"(?:([0-9.]+)|\[([0-9A-Fa-f:.]+)\]){_PORT}")
# RFC 7239 4: pairs separated by `;`, values tokens or quoted strings. Possessive, so that nothing is tried twice.
_PAIR = r"""[ \t]*+([!#$%&'*+.^_`|~0-9A-Za-z-]++)=("(?:[^"\\]|\\.)*+"|[!#$%&'*+.^_`|~0-9A-Za-z-]++)[ \t]*+"""
_FORWARDED_PAIR = compiled(_PAIR)
_FORWARDED_ELEMENT = compiled(rf"{_PAIR}(?:;{_PAIR})*+")


# A request's address is asked about up to three times, and the next request often comes from the same place. A text of
# up to ELEMENT_CHARS_MAX and an address take 1 KB.
@functools.lru_cache(maxsize=256)
def parse_address(text: str) -> IPAddress | None:
    """The address that a text without a port is, or None; mapped IPv4 as IPv4, the zone left out."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def is_loopback(text: str) -> bool:
    """Whether the text is an address of this machine alone."""
    address = parse_address(text)
    return address is not None and address.is_loopback


@dataclass(frozen=True, slots=True)
class TrustedProxies:
    """The proxies that are believed about clients' addresses, and the header that they write."""

    networks: tuple[Network, ...] = ()
    unix: bool = False
    header: bytes = X_FORWARDED_FOR

    @classmethod
    def of(cls, texts: Iterable[str], *, header: bytes = X_FORWARDED_FOR) -> TrustedProxies:
        """From the settings: addresses, networks (10.0.0.0/8), `unix`. ValueError names the allowed forms."""
        assert header in (X_FORWARDED_FOR, FORWARDED)
        texts = tuple(texts)
        return cls(tuple(_network(text) for text in texts if text != UNIX), UNIX in texts, header)

    def trusts(self, peer: str | None) -> bool:
        """Whether a peer (None: on a Unix socket) is a trusted proxy."""
        if peer is None:
            return self.unix
        address = parse_address(peer)
        return address is not None and self._has(address)

    def client_address(self, peer: str | None, value: bytes | None) -> str | None:
        """The client's address: `peer`, or the address from the believed header's `value` if the peer is trusted.

        None: the peer is on a Unix socket, and no header names a client.
        """
        return self._walk(peer, value)[0]

    def knows_client(self, peer: str | None, value: bytes | None) -> bool:
        """Whether client_address() is the client's own: no proxy has sent a header that hides the client.

        A trusted peer without the header is the client itself.
        """
        return value is None or not self.trusts(peer) or self._walk(peer, value)[1]

    def _walk(self, peer: str | None, value: bytes | None) -> tuple[str | None, bool]:
        """The client's address, and whether the walk has reached the client: else it ended at a proxy."""
        client = peer if peer is None else _text(peer)
        if not value or not self.trusts(peer):
            return client, False
        nodes = _nodes(self.header, value.decode("latin-1"))
        for node in nodes:
            address = _node_address(node)
            if address is None:
                return client, False
            client = str(address)
            if not self._has(address):
                return client, True
        return client, len(nodes) < HOPS_MAX

    def gated(self, peer: str | None) -> str | None:
        """The address that gates count a connection by; None, not counted: loopback, Unix sockets, trusted proxies."""
        if peer is None or self.trusts(peer):
            return None
        address = parse_address(peer)
        return None if address is None or address.is_loopback else str(address)

    def _has(self, address: IPAddress) -> bool:
        return any(address in network for network in self.networks)


def _network(text: str) -> Network:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(
            f"{text!r} is no address or network; give 10.0.0.7, 10.0.0.0/8, fd00::/8 or {UNIX!r}"
        ) from None
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.ip_network((mapped, network.prefixlen - 96))
    return network


def _text(peer: str) -> str:
    address = parse_address(peer)
    return peer if address is None else str(address)


def _nodes(header: bytes, value: str) -> list[str]:
    """The hops from right to left, at most HOPS_MAX; the walk ends at a hop that is no address."""
    if header == FORWARDED:
        return _forwarded_nodes(value)
    return [node.strip() for node in value.rsplit(",", HOPS_MAX)[: -HOPS_MAX - 1 : -1]]


def _forwarded_nodes(value: str) -> list[str]:
    """The `for` of each element, read from the right: a client's elements can't spoil those that proxies append."""
    nodes: list[str] = []
    end = len(value)
    while end >= 0 and len(nodes) < HOPS_MAX:
        end, node = _last_element(value, end)
        nodes.append(node)
    return nodes


def _last_element(value: str, end: int) -> tuple[int, str]:
    """The place of the comma in front of the element that ends at `end` (-1: none), and its `for` or "".

    A quoted string may hold commas: the search goes left from comma to comma until a whole element is behind the comma.
    """
    comma = end
    while comma >= 0 and end - comma <= ELEMENT_CHARS_MAX:
        comma = value.rfind(",", 0, comma)
        if _FORWARDED_ELEMENT.fullmatch(value, comma + 1, end):
            return comma, _for(value[comma + 1 : end])
    return -1, ""


def _for(element: str) -> str:
    """The `for` of an element; "" if it comes twice: RFC 7239 4 allows each parameter once."""
    found = [quoted for name, quoted in _FORWARDED_PAIR.findall(element) if name.lower() == "for"]
    return re.sub(r"\\(.)", r"\1", found[0].strip('"')) if len(found) == 1 else ""


def _node_address(node: str) -> IPAddress | None:
    """The address of a hop: 192.0.2.1, 192.0.2.1:80, [2001:db8::1], [2001:db8::1]:80, 2001:db8::1."""
    shape = _NODE.fullmatch(node)
    return parse_address(node if shape is None else shape[1] or shape[2])
