"""AddressGates: how much of streamd one client's address may take, and whose word is taken for that address.

    conns_per_address_max            connections; behind a trusted proxy requests that are being answered, because there
                                     a connection is nobody's in particular
    conns_opening_per_address_max    of those, connections that have not sent a complete request yet

Off by default; never for loopback, Unix sockets or the proxies themselves (docs/PROTOCOL.md, section 7). What was
counted is kept by the one who was counted, so that limits may change while connections are open.
"""

from __future__ import annotations

from streamd.config import Settings
from streamd.core.admission import AddressGate, address_key
from streamd.net.problem import Problem
from streamd.reasons import CloseReason
from streamd.wire.forwarded import TrustedProxies


class AddressGates:
    """One per worker."""

    def __init__(self, settings: Settings) -> None:
        self._all = AddressGate(0)
        self._opening = AddressGate(0)
        self.reload(settings)

    def reload(self, settings: Settings) -> None:
        self._all.count_max = settings.conns_per_address_max
        self._opening.count_max = settings.conns_opening_per_address_max
        header = settings.forwarded_header.encode()
        self.proxies = TrustedProxies.of(settings.trusted_proxies, header=header)

    def enter(self, address: str | None) -> tuple[str, str]:
        """Count a connection from `address` (None: a Unix peer): the keys to give back, "" where none was counted.

        Raises Problem 429.
        """
        if not self._all.count_max and not self._opening.count_max:
            return "", ""
        key = self._key(address)
        if not key:
            return "", ""
        if not (self._all.has_room(key) and self._opening.has_room(key)):
            raise _refused()
        return _take(self._all, key), _take(self._opening, key)

    def enter_request(self, peer: str | None, client: str | None) -> str:
        """Count a request that a trusted proxy brings for a client: the key to give back. Raises Problem 429."""
        if not self._all.count_max or client is None or not self.proxies.trusts(peer):
            return ""
        key = self._key(client)
        if key and not self._all.has_room(key):
            raise _refused()
        return _take(self._all, key) if key else ""

    def leave(self, key: str) -> None:
        """Give a connection or a request back."""
        if key:
            self._all.give_back(key)

    def opened(self, key: str) -> None:
        """The connection has sent a complete request, or is gone."""
        if key:
            self._opening.give_back(key)

    def _key(self, address: str | None) -> str:
        gated = self.proxies.gated(address)
        return "" if gated is None else address_key(gated)

    def __len__(self) -> int:
        """How many addresses are counted at this moment."""
        return max(len(self._all), len(self._opening))


def _take(gate: AddressGate, key: str) -> str:
    if not gate.count_max:
        return ""
    gate.take(key)
    return key


def _refused() -> Problem:
    return Problem(
        429,
        "Too many connections from your address. Close some, or try again later.",
        code="too_many_connections",
        reason=CloseReason.RATE_LIMITED,
        retry_after_s=5,
        close=True,
    )
