"""A link to a server of the engine: greeted and judged, lost and made anew, and never waited for."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from fake_engine import Asked, Command, FakeEngine, Script, bulk, fake_engine, hello, in_loop, push, until
from loopback import run
from tlspeer import make_certificate

from streamd.core.guard import Guard
from streamd.engine import link
from streamd.engine.connection import EngineError, EngineFault, EngineLost, packed
from streamd.engine.link import Link, LinkOwner, LinkState, LinkTerms
from streamd.engine_url import ServerAddress


class Draws(random.Random):
    """Random numbers that are their least, so that retries come at once; the bounds asked for are kept."""

    def __init__(self) -> None:
        super().__init__(1)
        self.most: list[float] = []

    def uniform(self, a: float, b: float) -> float:
        self.most.append(b)
        return a


class Linked:
    """A link to a fake engine, and all that its owner heard."""

    def __init__(self, port: int, terms: LinkTerms, role: str = "master") -> None:
        self.heard: list[EngineFault | str] = []
        self.pushes: list[Any] = []
        self.bugs: list[Any] = []
        self.rng = Draws()
        self.address: ServerAddress | None = ServerAddress("127.0.0.1", port)
        self.loop = asyncio.get_running_loop()
        self.link = Link(
            self.loop,
            lambda: self.address,
            terms,
            LinkOwner(lambda: self.heard.append("up"), self.heard.append, self.pushes.append),
            Guard(lambda where, error: self.bugs.append((where, error))),
            self.rng,
            role=role,
        )

    def tick(self, later_s: float = 0.0) -> None:
        """The sweep's call, `later_s` from now."""
        self.link.tick(self.loop.time() + later_s)

    async def is_in(self, state: LinkState) -> None:
        await until(lambda: self.link.state is state)


@contextlib.asynccontextmanager
async def linked(
    script: Script | None = None, *, tls: ssl.SSLContext | None = None, **terms: Any
) -> AsyncIterator[tuple[FakeEngine, Linked]]:
    async with fake_engine(script, tls=tls) as engine:
        own = Linked(engine.port, LinkTerms("streamd-test", **terms))
        own.link.start()
        try:
            yield engine, own
        finally:
            own.link.stop()
            await asyncio.sleep(0)
            assert own.bugs == []


@in_loop
async def test_a_link_greets_with_its_user_and_its_name() -> None:
    async with linked(user="sd", password="pass word") as (engine, own):
        await own.is_in(LinkState.UP)
        assert engine.commands == [(b"HELLO", b"3", b"AUTH", b"sd", b"pass word", b"SETNAME", b"streamd-test")]
        assert own.heard == ["up"] and own.link.version == "9.1.2" and own.link.has_room
        asked = Asked()
        own.link.ask(packed("SET", "a", 1), asked)
        await until(lambda: asked.replies)
        assert asked.replies == [b"OK"] and engine.commands[-1] == (b"SET", b"a", b"1")


@in_loop
async def test_without_a_password_there_is_no_auth() -> None:
    async with linked() as (engine, own):
        await own.is_in(LinkState.UP)
        assert engine.commands == [(b"HELLO", b"3", b"SETNAME", b"streamd-test")]


@in_loop
async def test_an_old_servers_error_which_repeats_the_password_is_not_repeated() -> None:
    said = b"-ERR unknown command `HELLO`, with args beginning with: `3`, `AUTH`, `sd`, `secret`, \r\n"
    async with linked(lambda command: said if command[0] == b"HELLO" else None, user="sd", password="secret") as made:
        _, own = made
        await until(lambda: own.link.fault is EngineFault.VERSION)
        assert "secret" not in own.link.fault_text and "7.0" in own.link.fault_text


UNFIT = {
    "a wrong password": (b"-WRONGPASS invalid username-password pair\r\n", EngineFault.RIGHTS),
    "no password": (b"-NOAUTH HELLO must be called with the client already authenticated\r\n", EngineFault.RIGHTS),
    "no right": (b"-NOPERM no permissions to run the 'hello' command\r\n", EngineFault.RIGHTS),
    "an old server without HELLO": (b"-ERR unknown command 'HELLO'\r\n", EngineFault.VERSION),
    "an old server": (hello(version="6.2.14"), EngineFault.VERSION),
    "a server without a version": (hello(version="unknown"), EngineFault.VERSION),
    "a cluster": (hello(mode="cluster"), EngineFault.VERSION),
    "a replica": (hello(role="replica"), EngineFault.READ_ONLY),
    "a server that loads its data": (b"-LOADING Valkey is loading the dataset in memory\r\n", EngineFault.LOADING),
    "a text": (b"+OK\r\n", EngineFault.PROTOCOL),
    "another protocol": (b"HTTP/1.1 400 Bad Request\r\n\r\n", EngineFault.PROTOCOL),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_server_that_cannot_be_used_is_not_up_and_is_tried_again(name: str) -> None:
    said, fault = UNFIT[name]

    async def main() -> None:
        async with linked(lambda command: said if command[0] == b"HELLO" else None) as (engine, own):
            await until(lambda: len(engine.names) >= 3)
            assert own.heard == [] and own.link.fault is fault and not own.link.has_room
            engine.script = None
            await own.is_in(LinkState.UP)
            assert own.heard == ["up"]

    run(main)


@in_loop
async def test_nobody_listens_and_tries_come_at_random_times_up_to_two_seconds() -> None:
    async with fake_engine() as engine:
        port = engine.port
    own = Linked(port, LinkTerms("streamd-test"))
    own.link.start()
    await until(lambda: len(own.rng.most) >= 8)
    own.link.stop()
    assert own.link.fault is EngineFault.STOPPED and own.heard == []
    assert own.rng.most[:8] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]


@in_loop
async def test_a_silent_server_is_given_up_by_the_clock() -> None:
    async with linked(lambda command: b"") as (engine, own):
        await until(lambda: engine.names)
        own.tick(4.9)
        assert own.link.state is LinkState.GREETING
        own.tick(5.1)
        assert own.link.fault is EngineFault.TIMEOUT
        engine.script = None
        await own.is_in(LinkState.UP)


def held(command: Command) -> bytes | None:
    """The engine stalls: nothing but greetings is answered."""
    return None if command[0] == b"HELLO" else b""


@in_loop
async def test_a_stall_is_slow_and_then_up_again() -> None:
    async with linked(held) as (engine, own):
        await own.is_in(LinkState.UP)
        asked = Asked()
        own.link.ask(packed("SET", "a", 1), asked)
        own.tick()
        await until(lambda: b"SET" in engine.names and b"PING" in engine.names)
        own.tick(1.2)
        assert own.link.state is LinkState.SLOW and not own.link.has_room and own.link.is_up
        own.tick(1.5)
        ping = engine.commands[-1]
        assert engine.names.count(b"PING") == 1
        engine.say(b"+OK\r\n" + bulk(ping[1]))
        await until(lambda: asked.replies)
        own.tick(1.7)
        assert own.link.state is LinkState.UP and own.link.has_room and own.heard == ["up"]


@in_loop
async def test_a_stall_beyond_the_timeout_loses_the_link_and_its_commands() -> None:
    async with linked(held) as (_, own):
        await own.is_in(LinkState.UP)
        asked = Asked()
        own.link.ask(packed("SET", "a", 1), asked)
        for later_s in (0.0, 1.2, 3.0, 5.0):
            own.tick(later_s)
        assert own.link.state is LinkState.SLOW
        own.tick(5.1)
        assert own.heard == ["up", EngineFault.TIMEOUT]
        await until(lambda: asked.replies)
        assert isinstance(asked.replies[0], EngineLost)
        await own.is_in(LinkState.UP)
        assert own.heard == ["up", EngineFault.TIMEOUT, "up"] and (own.link.times_up, own.link.times_lost) == (2, 1)


@in_loop
async def test_a_busy_engine_that_answers_is_never_slow() -> None:
    async with linked(held) as (engine, own):
        await own.is_in(LinkState.UP)
        connection = own.link._connection
        assert connection is not None
        for turn in range(20):
            own.link.ask(packed("SET", "a", 1), Asked())
            await until(lambda: len(engine.commands) == connection.asked)
            waiting = engine.commands[connection.answered : -1]  # all but the newest are answered
            engine.say(b"".join(bulk(each[1]) if each[0] == b"PING" else b"+OK\r\n" for each in waiting))
            await until(lambda: connection.pending == 1)
            own.tick(0.9 * turn)
            assert own.link.state is LinkState.UP
        assert engine.names.count(b"PING") >= 9
    assert own.heard == ["up", EngineFault.STOPPED]


@in_loop
async def test_a_cut_connection_is_made_anew() -> None:
    async with linked() as (engine, own):
        for times in (1, 2, 3):
            await until(lambda times=times: own.link.times_up == times)
            engine.cut()
        await until(lambda: own.link.times_up == 4)
        assert own.heard == ["up", EngineFault.CLOSED] * 3 + ["up"]


@in_loop
async def test_replies_out_of_step_end_the_connection() -> None:
    async with linked(lambda command: bulk("other") if command[0] == b"PING" else None) as (_, own):
        await own.is_in(LinkState.UP)
        own.tick()
        await until(lambda: len(own.heard) > 1)
        assert own.heard[:2] == ["up", EngineFault.PROTOCOL]


@in_loop
async def test_a_primary_that_became_a_replica_is_left() -> None:
    readonly = b"-READONLY You can't write against a read only replica.\r\n"
    async with linked(lambda command: readonly if command[0] == b"XADD" else None) as (_, own):
        await own.is_in(LinkState.UP)
        asked = Asked()
        own.link.ask(packed("XADD", "a", "1-1", "d", ""), asked)
        await until(lambda: len(own.heard) > 1)
        assert own.heard[1] is EngineFault.READ_ONLY and [type(each) for each in asked.replies] == [EngineError]


@in_loop
async def test_the_commands_in_flight_are_bounded() -> None:
    async with linked(held) as (engine, own):
        await own.is_in(LinkState.UP)
        for _ in range(link.COMMANDS_MAX):
            assert own.link.has_room
            own.link.ask(packed("SET", "a", 1), Asked())
        assert not own.link.has_room and own.link.pending == link.COMMANDS_MAX
        await until(lambda: len(engine.commands) == link.COMMANDS_MAX + 1)
        engine.say(b"+OK\r\n")
        await until(lambda: own.link.has_room)


@in_loop
async def test_the_bytes_in_flight_are_bounded() -> None:
    async with linked(held) as (_, own):
        await own.is_in(LinkState.UP)
        own.link.ask(packed("SET", "a", b"x" * (link.COMMAND_BYTES_MAX - 100)), Asked())
        assert own.link._connection is not None
        await until(lambda: own.link._connection.takes_more)  # type: ignore[union-attr]
        assert own.link.has_room
        own.link.ask(packed("SET", "a", b"x" * 100), Asked())
        assert not own.link.has_room


@in_loop
async def test_pushes_reach_the_owner() -> None:
    async with linked() as (engine, own):
        await own.is_in(LinkState.UP)
        engine.say(push(b"message", b"c", b"x"))
        await until(lambda: own.pushes)
        assert own.pushes == [[b"message", b"c", b"x"]]


@in_loop
async def test_a_link_moves_to_another_server_when_it_is_told() -> None:
    async with linked() as (engine, own), fake_engine() as other:
        await own.is_in(LinkState.UP)
        own.link.moved()
        assert own.link.state is LinkState.UP, "the address is the same"
        own.address = ServerAddress("127.0.0.1", other.port)
        own.link.moved()
        assert own.heard == ["up", EngineFault.MOVED]
        await own.is_in(LinkState.UP)
        assert len(other.commands) == len(engine.commands) == 1


@in_loop
async def test_without_an_address_a_link_waits_for_it() -> None:
    async with fake_engine() as engine:
        own = Linked(engine.port, LinkTerms("streamd-test"))
        address, own.address = own.address, None
        own.link.start()
        assert own.link.state is LinkState.DOWN
        own.address = address
        own.link.moved()
        await own.is_in(LinkState.UP)
        own.link.stop()


@in_loop
async def test_a_stopped_link_stays_stopped() -> None:
    async with linked() as (engine, own):
        await own.is_in(LinkState.UP)
        own.link.stop()
        own.link.stop()
        own.link.start()
        own.link.moved()
        own.tick(100)
        await until(lambda: not own.link.pending)
        assert own.link.state is LinkState.STOPPED and own.heard == ["up", EngineFault.STOPPED]
        assert engine.names == [b"HELLO"]


@in_loop
async def test_a_link_that_is_stopped_while_it_connects_leaves_nothing() -> None:
    async with fake_engine() as engine:
        own = Linked(engine.port, LinkTerms("streamd-test"))
        own.link.start()
        own.link.stop()
        await until(lambda: len(asyncio.all_tasks()) == 1 or not engine.connections)
        assert own.link.state is LinkState.STOPPED and own.heard == []


def contexts(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of a server with a certificate for 127.0.0.1, and of a client that trusts it."""
    cert, key = make_certificate(folder)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(cert, key)
    return server, ssl.create_default_context(cafile=str(cert))


def test_tls_hides_the_password_and_checks_the_name(tmp_path: Path) -> None:
    server, client = contexts(tmp_path)

    async def main() -> None:
        async with linked(tls=server, password="secret") as (engine, own):
            assert own.link.state is LinkState.CONNECTING
            own.link.stop()
            trusting = Linked(engine.port, LinkTerms("streamd-test", password="secret", tls=client))
            trusting.link.start()
            await trusting.is_in(LinkState.UP)
            assert engine.commands == [(b"HELLO", b"3", b"AUTH", b"default", b"secret", b"SETNAME", b"streamd-test")]
            trusting.link.stop()
            stranger = Linked(engine.port, LinkTerms("streamd-test", tls=ssl.create_default_context()))
            stranger.link.start()
            await until(lambda: stranger.link.fault is EngineFault.REFUSED)
            assert "CERTIFICATE_VERIFY_FAILED" in stranger.link.fault_text and len(engine.commands) == 1
            stranger.link.stop()

    run(main)


# New terms while the link lives


@contextlib.asynccontextmanager
async def logged_in(answer: bytes) -> AsyncIterator[tuple[FakeEngine, Linked, list[str]]]:
    """A link that is up with an old password, and is given a new one that the engine answers so."""
    refusals: list[str] = []
    async with linked(
        lambda command: answer if command[0] == b"AUTH" else None, user="sd", password="old", timeout_s=5.0
    ) as (engine, own):
        await own.is_in(LinkState.UP)
        own.link.use(LinkTerms("streamd-test", user="sd", password="new", timeout_s=7.0), refusals.append)
        await until(lambda: (b"AUTH", b"sd", b"new") in engine.commands)
        asked = Asked()
        own.link.ask(packed("PING", "after"), asked)
        await until(lambda: asked.replies)
        yield engine, own, refusals


async def greeting_anew(engine: FakeEngine, own: Linked) -> Command:
    """The next connection's greeting."""
    engine.cut()
    await until(lambda: own.link.times_up == 2)
    return [command for command in engine.commands if command[0] == b"HELLO"][-1]


@in_loop
async def test_a_new_password_is_used_on_the_connection_that_stands_and_on_the_next() -> None:
    async with logged_in(b"+OK\r\n") as (engine, own, refusals):
        assert own.heard == ["up"] and refusals == []
        assert b"new" in await greeting_anew(engine, own)


@in_loop
async def test_a_new_password_that_the_engine_refuses_is_told_and_the_old_one_stays_in_use() -> None:
    async with logged_in(b"-WRONGPASS invalid username-password pair\r\n") as (engine, own, refusals):
        assert own.heard == ["up"] and refusals == ["WRONGPASS invalid username-password pair"]
        greeting = await greeting_anew(engine, own)
        assert b"old" in greeting and b"new" not in greeting


@in_loop
async def test_a_link_that_is_down_tries_a_new_password_at_once() -> None:
    def script(command: Command) -> bytes | None:
        is_wrong = command[0] == b"HELLO" and b"new" not in command
        return b"-WRONGPASS invalid username-password pair\r\n" if is_wrong else None

    async with linked(script, password="old") as (_, own):
        own.rng.uniform = lambda a, b: 3600.0  # type: ignore[method-assign]
        await until(lambda: own.link.state is LinkState.DOWN and own.link.fault is EngineFault.RIGHTS)
        own.link.use(LinkTerms("streamd-test", password="new"), lambda words: None)
        await own.is_in(LinkState.UP)


@in_loop
async def test_other_settings_than_the_password_ask_the_engine_nothing() -> None:
    async with linked(password="same") as (engine, own):
        await own.is_in(LinkState.UP)
        own.link.use(LinkTerms("streamd-test", password="same", timeout_s=1.0, slow_s=0.5), own.heard.append)
        engine.script = lambda command: b""
        own.link.ask(packed("GET", "a"), Asked())
        own.tick()
        own.tick(1.2)
        assert own.link.state is LinkState.DOWN and own.link.fault is EngineFault.TIMEOUT
        assert b"AUTH" not in engine.names
