"""Where a stream is kept: the same on all nodes, whatever the order of the servers, and stable when servers change."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from streamd.engine.shards import PARTITIONS, CopyKeys, owners_of, partition_of

SERVERS = st.lists(st.text("abcdef.:/0123456789", min_size=1, max_size=20), min_size=1, max_size=4, unique=True)


def test_partitions_are_those_of_the_cluster_specification() -> None:
    assert partition_of("123456789") == 0x31C3 % PARTITIONS


@settings(max_examples=20)
@given(SERVERS)
def test_the_order_of_the_servers_does_not_matter(servers: list[str]) -> None:
    backwards = servers[::-1]
    assert [servers[k] for k in owners_of(servers)] == [backwards[k] for k in owners_of(backwards)]


@settings(max_examples=20)
@given(SERVERS)
def test_another_server_takes_only_its_own_share(servers: list[str]) -> None:
    before = [servers[k] for k in owners_of(servers)]
    more = [*servers, "new"]
    after = [more[k] for k in owners_of(more)]
    assert all(now in (was, "new") for was, now in zip(before, after, strict=True))


def test_each_server_has_about_its_share() -> None:
    counts = Counter(owners_of([f"redis://engine-{number}:6379" for number in range(4)]))
    assert all(200 < counts[k] < 320 for k in range(4))


def test_the_keys_of_a_stream_have_its_partition_as_their_tag() -> None:
    stream_id = "s_AAAAA0123456789012345678901"
    tag = b"{%d}" % partition_of(stream_id)
    keys = CopyKeys("x:")
    assert keys.log(stream_id) == b"x:" + tag + b":l:" + stream_id.encode()
    assert keys.channel(stream_id) == b"x:" + tag + b":c:" + stream_id.encode()
