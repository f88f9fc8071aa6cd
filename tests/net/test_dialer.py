"""Dialer: names with several addresses, dead addresses, changes, and a resolver that is slow or fails."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import FakeLoop, post, rig, whole_answer
from hypothesis import given, settings
from hypothesis import strategies as st

from streamd.config import UpstreamSettings
from streamd.net import dialer as dialer_module
from streamd.net.dialer import FRESH_S, HEADSTART_S, LOOKUP_S, PASSED_OVER_S, Dialer, is_own_shortage

WHOLE = {"model": "m", "messages": []}


class Made:
    """A connection."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.closed = False

    def close(self) -> None:
        self.closed = True


class Net:
    """Hosts that take connections, refuse them, or never answer, and a resolver."""

    def __init__(self, *addresses: str, host: str = "up.test") -> None:
        self.loop = FakeLoop()
        self.loop.set_exception_handler(lambda loop, context: self.unseen.append(context))
        self.loop.getaddrinfo = self._getaddrinfo  # type: ignore[method-assign]
        self.unseen: list[Any] = []
        self.addresses: tuple[str, ...] | OSError = addresses
        self.lookup_s = 0.0
        self.lookups = 0
        self.acts: dict[str, str | float | OSError] = {}  # "mute", seconds until it is established, or the error
        self.tried: list[str] = []
        self.made: list[Made] = []
        self.dialer = Dialer(self.loop, host, tls=False)

    async def _getaddrinfo(self, host: Any, port: Any, **options: Any) -> Any:
        self.lookups += 1
        await asyncio.sleep(self.lookup_s)
        if isinstance(self.addresses, OSError):
            raise self.addresses
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, 0)) for each in self.addresses]

    async def _connect_to(self, address: str) -> Made:
        self.tried.append(address)
        act = self.acts.get(address, 0.0)
        made = Made(address)
        self.made.append(made)
        try:
            if act == "mute":
                await self.loop.create_future()
            elif isinstance(act, OSError):
                raise act
            else:
                await asyncio.sleep(float(act))
        except BaseException:
            made.close()
            raise
        return made

    def connect(self, within_s: float | None = None) -> tuple[str, float]:
        """The address that was connected, and the time that it took. Raises OSError, TimeoutError for `within_s`."""
        began_at = self.loop.time()

        async def bounded() -> Made:
            async with asyncio.timeout(within_s):
                return await self.dialer.connect(self._connect_to)

        made = self.loop.run_until_complete(bounded())
        took_s = self.loop.time() - began_at
        self.settle()
        assert [each for each in self.made if not each.closed] == [made]
        made.close()
        return made.address, round(took_s, 3)

    def settle(self) -> None:
        for _ in range(5):
            self.loop.run_until_complete(asyncio.sleep(0))

    def pass_time(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))

    def end(self) -> None:
        self.settle()
        assert all(each.closed for each in self.made) and self.unseen == []
        self.loop.close()


@contextlib.contextmanager
def net(*addresses: str, **options: Any) -> Iterator[Net]:
    made = Net(*addresses, **options)
    yield made
    made.end()


REFUSED = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
NO_V6 = OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
NO_NAME = socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.mark.parametrize(
    ("first", "address", "took_s"),
    [
        (0.0, "10.0.0.1", 0.0),
        (0.2, "10.0.0.1", 0.2),
        (REFUSED, "10.0.0.2", 0.0),
        (NO_V6, "10.0.0.2", 0.0),
        ("mute", "10.0.0.2", HEADSTART_S),
        (HEADSTART_S + 5, "10.0.0.2", HEADSTART_S),
    ],
)
def test_a_dead_address_is_passed_over_and_comes_last_from_then_on(first: Any, address: str, took_s: float) -> None:
    with net("10.0.0.1", "10.0.0.2") as n:
        n.acts["10.0.0.1"] = first
        assert n.connect() == (address, took_s)
        n.tried.clear()
        assert n.connect() == (address, min(took_s, 0.2) if address == "10.0.0.1" else 0.0)
        assert n.tried == [address]
        n.acts.clear()
        n.pass_time(PASSED_OVER_S + 1)
        assert n.connect()[0] == "10.0.0.1", "it has another chance"


def test_of_two_connections_at_the_same_moment_one_is_closed() -> None:
    with net("10.0.0.1", "10.0.0.2") as n:
        n.acts = {"10.0.0.1": HEADSTART_S + 0.5, "10.0.0.2": 0.5}
        n.connect()
        assert len(n.made) == 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.1, 1.0, "mute", "refused"]), min_size=2, max_size=6))
def test_whatever_the_addresses_do_one_that_takes_connections_is_found(acts: list[Any]) -> None:
    addresses = [f"10.0.0.{n}" for n in range(len(acts))]
    with net(*addresses) as n:
        n.acts = {each: REFUSED if act == "refused" else act for each, act in zip(addresses, acts, strict=True)}
        working = [act for act in acts if isinstance(act, float)]
        if working:
            assert n.connect()[1] <= HEADSTART_S * len(acts) + min(working)
        else:
            with pytest.raises((OSError, TimeoutError)):
                n.connect(within_s=5.0)


@pytest.mark.parametrize("order", list(itertools.permutations([REFUSED, NO_V6, OSError(errno.ENETUNREACH, "")])))
def test_the_error_of_several_addresses_is_the_most_telling(order: tuple[OSError, ...]) -> None:
    with net("10.0.0.1", "10.0.0.2", "10.0.0.3") as n:
        n.acts = dict(zip(("10.0.0.1", "10.0.0.2", "10.0.0.3"), order, strict=True))
        with pytest.raises(ConnectionRefusedError):
            n.connect()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_a_shortage_of_our_own_ends_the_search(code: int) -> None:
    with net("10.0.0.1", "10.0.0.2") as n:
        n.acts["10.0.0.1"] = OSError(code, "none left")
        with pytest.raises(OSError) as raised:
            n.connect()
        assert is_own_shortage(raised.value) and n.tried == ["10.0.0.1"]


def test_a_name_that_can_not_be_looked_up_for_want_of_descriptors_is_a_shortage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def exhausted() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with net() as n:
        n.addresses = NO_NAME
        with pytest.raises(socket.gaierror):
            n.connect()
        monkeypatch.setattr(dialer_module, "_check_descriptors", exhausted)
        with pytest.raises(OSError) as raised:
            n.connect()
        assert is_own_shortage(raised.value)


@pytest.mark.parametrize("host", ["localhost", "gpu.localhost"])
@pytest.mark.parametrize("only", ["::1", "127.0.0.1"])
def test_localhost_is_both_loopback_addresses_and_is_never_looked_up(host: str, only: str) -> None:
    with net(host=host) as n:
        n.acts = {each: REFUSED for each in ("::1", "127.0.0.1") if each != only}
        assert n.connect() == (only, 0.0) and n.lookups == 0


@pytest.mark.parametrize("host", ["10.1.2.3", "::1", "2001:db8::5"])
def test_an_address_is_not_looked_up(host: str) -> None:
    with net(host=host) as n:
        assert n.connect() == (host, 0.0) and n.lookups == 0


def test_changes_of_a_name_are_noticed() -> None:
    with net("10.0.0.1") as n:
        assert n.connect()[0] == "10.0.0.1"
        n.addresses = ("10.0.0.7",)
        n.pass_time(FRESH_S / 2)
        assert n.connect()[0] == "10.0.0.1" and n.lookups == 1
        n.pass_time(FRESH_S)
        assert n.connect()[0] == "10.0.0.7" and n.lookups == 2


def test_a_failing_or_slow_look_up_holds_up_no_connection_to_a_known_address() -> None:
    with net("10.0.0.1") as n:
        n.connect()
        n.addresses = NO_NAME
        n.pass_time(FRESH_S + 1)
        assert n.connect() == ("10.0.0.1", 0.0)
        n.addresses = ("10.0.0.7",)
        n.pass_time(FRESH_S + 1)
        n.lookup_s = 20.0
        assert n.connect() == ("10.0.0.1", LOOKUP_S)
        for _ in range(10):
            assert n.connect() == ("10.0.0.1", 0.0)
        assert n.lookups == 3, "one at a time"
        n.pass_time(20.0)
        assert n.connect()[0] == "10.0.0.7"


def test_connections_to_an_unknown_name_share_a_look_up() -> None:
    with net("10.0.0.1") as n:
        n.lookup_s = 3.0

        async def many() -> None:
            made = await asyncio.gather(*(n.dialer.connect(n._connect_to) for _ in range(20)))
            for each in made:
                each.close()

        n.loop.run_until_complete(many())
        assert n.lookups == 1 and len(n.made) == 20


@pytest.mark.parametrize("lookup_s", [0.0, 60.0])
def test_a_search_that_is_cut_leaves_no_connection(lookup_s: float) -> None:
    with net("10.0.0.1", "10.0.0.2") as n:
        n.lookup_s = lookup_s
        n.acts = dict.fromkeys(("10.0.0.1", "10.0.0.2"), "mute")
        with pytest.raises(TimeoutError):
            n.connect(within_s=5.0)
        n.pass_time(100.0)


def test_a_request_is_served_by_the_living_address_of_its_upstream() -> None:
    up = UpstreamSettings(name="up", url="http://up.test:1")
    with rig(upstreams=(up,)) as r:
        r.loop.names["up.test"] = ("10.0.0.1", "10.0.0.2")
        dial, hosts = r.loop.dial, []

        def dead_and_alive(host: str, port: int, protocol: Any) -> Any:
            hosts.append(host)
            r.mute = {1} if host == "10.0.0.1" else set()
            return dial(host, port, protocol)

        r.loop.dial = dead_and_alive
        client = r.client(post(WHOLE))
        r.pass_time(HEADSTART_S)
        r.reply(whole_answer(b"ok", "200 OK", "connection: close"))
        assert client.answer.body == b"ok" and hosts == ["10.0.0.1", "10.0.0.2"]
        client = r.client(post(WHOLE))
        r.reply(whole_answer(b"ok"))
        assert client.answer.body == b"ok" and hosts[2:] == ["10.0.0.2"]
