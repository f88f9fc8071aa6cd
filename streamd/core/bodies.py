"""Shares of the bytes of request bodies: nobody holds so much that others find no room.

A holder is a principal or a client address; a body counts for both. A holder may have as many bytes as are left free:
alone it gets half of `bodies_bytes_max`, beside another as greedy a third, beside n others a part of n + 2; and
whatever they do, as much is free for the client that comes next (Choudhury and Hahne's dynamic thresholds for shared
buffers, with a factor of 1). A single body of the largest size fits wherever the budget has room for it, or it could
never be sent where `bodies_bytes_max` is less than twice `body_bytes_max`.

Counts are a worker's own, the free bytes those of all workers: a holder in each of n workers gets n parts of n+1, and
the last part still stays free.

Rejected: a fixed share (a quarter is too little for one client alone, and four of them leave nothing), and taking bytes
back from who has many (an admitted body is never evicted).
"""

from __future__ import annotations

from collections.abc import Iterable

Holders = tuple[str, ...]
"""The keys under which a body counts: its principal's and its address's, as far as it has them."""


class BodyShares:
    """The bytes of each holder; a holder without bytes takes no room."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: dict[str, int] = {}  # at most two entries for each body

    def has_room(self, holders: Iterable[str], size_bytes: int, free_bytes: int, body_bytes_max: int) -> bool:
        """Whether each holder may have `size_bytes` more, which leave `free_bytes` to all."""
        most = max(free_bytes, body_bytes_max) - size_bytes
        return not [holder for holder in holders if self._held.get(holder, 0) > most]

    def take(self, holders: Iterable[str], size_bytes: int) -> None:
        """Count `size_bytes` more for each holder."""
        for holder in holders:
            self._held[holder] = self._held.get(holder, 0) + size_bytes

    def give_back(self, holders: Iterable[str], size_bytes: int) -> None:
        """Count `size_bytes` less for each holder."""
        for holder in holders:
            left = self._held[holder] - size_bytes
            if left:
                self._held[holder] = left
            else:
                del self._held[holder]

    def __len__(self) -> int:
        return len(self._held)
