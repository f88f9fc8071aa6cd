"""AddressGates: limits on the connections of a client address, and the proxies that are trusted to name that address.

    conns_per_address_max            connections; behind a trusted proxy requests that are being answered, because a
                                     proxy's connection belongs to no particular client
    conns_opening_per_address_max    of those, connections that have not sent a complete request yet

Off by default; never for loopback, Unix sockets or the proxies themselves (docs/PROTOCOL.md, section 7). A counted
connection keeps the keys of its count, so that limits may change while connections are open.
"""

from __future__ import annotations

from streamd.config import Settings
from streamd.core.admission import AddressGate, Admission, address_key
from streamd.core.refusal import Refusal
from streamd.wire.forwarded import TrustedProxies

Keys = tuple[str, str]
"""The keys under which a connection is counted: among all, and among those that are opening. "": not counted."""

NOT_COUNTED: Keys = ("", "")


class AddressGates:
    """One per worker."""

    def __init__(self, admission: Admission, settings: Settings) -> None:
        self._admission = admission
        self._all = admission.addresses
        self._opening = AddressGate(0)
        self.reload(settings)

    def reload(self, settings: Settings) -> None:
        """Apply new limits and proxies. Raises ValueError for a proxy that the settings' own check let pass."""
        self._all.count_max = settings.conns_per_address_max
        self._opening.count_max = settings.conns_opening_per_address_max
        self.proxies = TrustedProxies.of(settings.trusted_proxies, header=settings.forwarded_header.encode())
        self.behind_proxies = bool(settings.trusted_proxies)

    def enter(self, address: str | None) -> Keys | Refusal:
        """Count a connection from `address` (None: a Unix peer). Returns its keys."""
        if not self._all.count_max and not self._opening.count_max:
            return NOT_COUNTED
        key = self._key(address)
        if not key:
            return NOT_COUNTED
        if not (self._all.has_room(key) and self._opening.has_room(key)):
            return self._admission.refuse_address()
        return _take(self._all, key), _take(self._opening, key)

    def adopt(self, address: str | None) -> Keys:
        """Count a connection that another process has let in."""
        key = self._key(address) if self._all.count_max or self._opening.count_max else ""
        return (_take(self._all, key), _take(self._opening, key)) if key else NOT_COUNTED

    def adopt_request(self, client: str | None) -> str:
        """Count a request that another process has let in."""
        key = self._key(client) if self._all.count_max else ""
        return _take(self._all, key) if key else ""

    def enter_request(self, client: str | None) -> str | Refusal:
        """Count a request that a trusted proxy brings for `client`. Returns its key."""
        key = self._key(client) if self._all.count_max else ""
        if key and not self._all.has_room(key):
            return self._admission.refuse_address()
        return _take(self._all, key) if key else ""

    def opened(self, keys: Keys) -> Keys:
        """The connection has sent a complete request: returns its keys from now on."""
        if not keys[1]:
            return keys
        self._opening.give_back(keys[1])
        return keys[0], ""

    def leave(self, keys: Keys) -> None:
        """A connection is gone; or a request is over, with the second key empty."""
        if keys[0]:
            self._all.give_back(keys[0])
        if keys[1]:
            self._opening.give_back(keys[1])

    def _key(self, address: str | None) -> str:
        gated = self.proxies.gated(address)
        return "" if gated is None else address_key(gated)


def _take(gate: AddressGate, key: str) -> str:
    if not gate.count_max:
        return ""
    gate.take(key)
    return key
