"""Dialer: establishes connections to a host, whatever becomes of some of its addresses.

A name is looked up in a thread of the loop's, never in the loop itself, and by one look-up at a time. Its addresses are
kept and looked up again once they are FRESH_S old. A look-up that takes longer than LOOKUP_S, or fails, holds up no
connection as long as addresses are known.

The addresses are tried in the resolver's order, those that failed within PASSED_OVER_S last. An address has HEADSTART_S
before the next is tried beside it (RFC 8305, 5); the first connection wins, and the others are given up. `localhost`
is ::1 and 127.0.0.1, whatever the machine's files say (RFC 6761, 6.3): servers listen on either alone.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, Protocol, TypeVar

# A server that moves is noticed with the first connection after this: the least time to live that DNS servers of
# clusters give, 5 s.
FRESH_S: Final = 5.0

# A look-up takes a few milliseconds, over the ocean a quarter of a second.
LOOKUP_S: Final = 0.25

# RFC 8305 5 recommends 250 ms. TLS takes two round trips more; both are below the second that a reader notices.
HEADSTART_S: Final = 0.25
HEADSTART_TLS_S: Final = 0.75

# Time for which an address that failed comes last: as long as a failing server is left out at most.
PASSED_OVER_S: Final = 30.0

# Addresses of a name that are tried. A large service answers with 8; more would only lengthen a failure.
ADDRESSES_MAX: Final = 8

_LOCAL: Final = ("::1", "127.0.0.1")

# This process, or this machine, has no descriptor or memory left: no address would do better.
_NONE_LEFT: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))

# The same, or, where a machine has no IPv6, an address that leads nowhere.
_NO_PORT: Final = errno.EADDRNOTAVAIL

# Errors that tell less than the error of another address: there is no way to this one from here.
_NO_WAY: Final = frozenset((_NO_PORT, errno.EAFNOSUPPORT, errno.ENETUNREACH, errno.EHOSTUNREACH))


def is_own_shortage(error: BaseException) -> bool:
    """Whether a connection failed for want of something here: the server isn't to blame, another would fail too."""
    return isinstance(error, OSError) and (error.errno in _NONE_LEFT or error.errno == _NO_PORT)


class Unused(Protocol):
    """A connection that isn't used yet."""

    def close(self) -> None:
        """Close it at once."""


C = TypeVar("C", bound=Unused)


class Dialer:
    """The way to a host."""

    __slots__ = ("_addresses", "_failed_at", "_headstart_s", "_host", "_known_at", "_lookup", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, host: str, *, tls: bool) -> None:
        self._loop = loop
        self._host = host
        self._headstart_s = HEADSTART_TLS_S if tls else HEADSTART_S
        self._addresses = _fixed(host)
        self._known_at = float("inf") if self._addresses else float("-inf")
        self._lookup: asyncio.Task[None] | None = None  # the look-up under way
        self._failed_at: dict[str, float] = {}  # by address, of those known

    async def connect(self, connect_to: Callable[[str], Awaitable[C]]) -> C:
        """A connection to the first address that takes it. Raises OSError; then, or when cancelled, none is left.

        `connect_to` establishes a connection to an address, or raises and leaves none.
        """
        addresses = await self._known()
        if len(addresses) == 1:
            return await connect_to(addresses[0])
        now = self._loop.time()
        return await self._race(sorted(addresses, key=lambda each: self._passed_over(each, now)), connect_to)

    def _passed_over(self, address: str, now: float) -> float:
        failed_at = self._failed_at.get(address, 0.0)
        return failed_at if now - failed_at < PASSED_OVER_S else 0.0

    # -- addresses

    async def _known(self) -> tuple[str, ...]:
        """The addresses, looked up if they aren't known or no longer fresh."""
        if self._loop.time() - self._known_at > FRESH_S:
            if self._lookup is None:
                self._lookup = self._loop.create_task(self._look_up())
                if self._addresses:  # the first connection waits a little, all others go on with what is known
                    await asyncio.wait((self._lookup,), timeout=LOOKUP_S)
            if not self._addresses:
                await asyncio.shield(self._lookup)
        return self._addresses

    async def _look_up(self) -> None:
        """Raises OSError if no address is known then."""
        try:
            found = await self._loop.getaddrinfo(self._host, None, type=socket.SOCK_STREAM)
            addresses = tuple(dict.fromkeys(str(each[4][0]) for each in found))[:ADDRESSES_MAX]
        except (OSError, UnicodeError) as error:
            if not self._addresses:
                _check_descriptors()  # without a descriptor a resolver says that there is no such name
                raise error if isinstance(error, OSError) else OSError(errno.EINVAL, f"no name: {error}") from None
            addresses = self._addresses
        finally:
            self._lookup = None
        self._addresses = addresses
        self._known_at = self._loop.time()
        self._failed_at = {each: at for each, at in self._failed_at.items() if each in addresses}

    # -- several addresses

    async def _race(self, addresses: list[str], connect_to: Callable[[str], Awaitable[C]]) -> C:
        tries: dict[asyncio.Task[C], str] = {}  # under way
        errors: list[OSError] = []
        left = list(addresses)
        try:
            while left or tries:
                if left:
                    address = left.pop(0)
                    tries[self._loop.create_task(_connected(connect_to, address))] = address
                done, _ = await asyncio.wait(
                    tries, timeout=self._headstart_s if left else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    error = task.exception()
                    if error is None:
                        self._won(tries.pop(task), tries.values())
                        return task.result()
                    self._failed_at[tries.pop(task)] = self._loop.time()
                    if not isinstance(error, OSError) or error.errno in _NONE_LEFT:
                        raise error
                    errors.append(error)
        finally:
            for task in tries:
                task.add_done_callback(_give_up)
                task.cancel()
        raise next((error for error in errors if error.errno not in _NO_WAY), errors[0])

    def _won(self, address: str, slower: Iterable[str]) -> None:
        """This address takes connections; those that had a head start and didn't come last."""
        self._failed_at.pop(address, None)
        now = self._loop.time()
        for each in slower:
            self._failed_at[each] = now


async def _connected(connect_to: Callable[[str], Awaitable[C]], address: str) -> C:
    return await connect_to(address)


def _give_up(task: asyncio.Task[C]) -> None:
    """A try that lost has ended, by its cancellation or before it."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()


def _check_descriptors() -> None:
    """Raises OSError if the process can open nothing."""
    socket.socket().close()


def _fixed(host: str) -> tuple[str, ...]:
    """The addresses of a host that needs no look-up; () for other names."""
    if host == "localhost" or host.endswith(".localhost"):
        return _LOCAL
    try:
        return (str(ipaddress.ip_address(host)),)
    except ValueError:
        return ()
