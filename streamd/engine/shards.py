"""Shards: which of several engine servers has a stream, and the names of a stream's keys there.

A stream's id gives its *partition*, one of 1,024, by CRC-16 as in a Redis Cluster. The partition stands in every key as
the hash tag, so that the keys of a stream stay together on every topology, and never have to be renamed. Each partition
belongs to the server with the highest hash of server and partition (rendezvous hashing): all nodes compute the same
from the same list, whatever its order, and a server more or less moves only its own share.
"""

from __future__ import annotations

import binascii
import hashlib
from collections.abc import Sequence
from typing import Final

PARTITIONS: Final = 1024


def partition_of(stream_id: str) -> int:
    """The partition of a stream's id or chosen name."""
    return binascii.crc_hqx(stream_id.encode(), 0) % PARTITIONS


def owners_of(servers: Sequence[str]) -> list[int]:
    """For each partition, the index of its server. `servers` are distinct names: the settings' URLs."""
    assert servers and len(set(servers)) == len(servers)
    return [max(range(len(servers)), key=lambda k: _weight(servers[k], partition)) for partition in range(PARTITIONS)]


def _weight(server: str, partition: int) -> bytes:
    return hashlib.blake2b(f"{partition} {server}".encode(), digest_size=8).digest()


class CopyKeys:
    """The names of keys and channels, behind a prefix of one's own."""

    __slots__ = ("_prefix",)

    def __init__(self, prefix: str = "sd:") -> None:
        self._prefix = prefix

    def log(self, stream_id: str, epoch: str = "") -> bytes:
        """The stream that holds the copy of a log; of a chosen name, that of an epoch."""
        name = f"{stream_id}:{epoch}" if epoch else stream_id
        return f"{self._prefix}{{{partition_of(stream_id)}}}:l:{name}".encode()

    def members(self) -> bytes:
        """The hash of all members' signs of life."""
        return f"{self._prefix}m".encode()

    def inbox(self, member: str) -> bytes:
        """The stream that holds the notes for a member."""
        return f"{self._prefix}in:{member}".encode()

    def inbox_channel(self, member: str) -> bytes:
        """The channel that wakes a member for its notes."""
        return f"{self._prefix}c:in:{member}".encode()

    def spending(self, key_hash: str) -> bytes:
        """The hash of what nodes have spent of a key."""
        return f"{self._prefix}{{{partition_of(key_hash)}}}:k:{key_hash}".encode()

    def probe(self, member: str) -> bytes:
        """A stream that a member makes and removes to see its rights."""
        return f"{self._prefix}{{0}}:probe:{member}".encode()

    def channel(self, stream_id: str, epoch: str = "") -> bytes:
        """The channel of a stream's pushes."""
        name = f"{stream_id}:{epoch}" if epoch else stream_id
        return f"{self._prefix}{{{partition_of(stream_id)}}}:c:{name}".encode()
