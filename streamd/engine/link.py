"""Link: a lasting way to a server of the engine, over one connection after another.

    DOWN        no connection; the next try comes after a random time, 50 ms to 2 s
    CONNECTING  TCP and TLS
    GREETING    HELLO with user, password and name: version and role decide whether this server can be used
    UP          commands are carried out
    SLOW        a command has had no reply for `slow_s`: nothing new is sent
    STOPPED     by its owner, for good

A link is lost, and made anew, where its connection ends, where a reply takes `timeout_s`, and where an error reply
shows that another server is wanted (READONLY, LOADING). The link's user hears of it by `on_up` and `on_down`:
after each `on_up` nothing is known of the engine's content, which may be another server's, or empty.

The loop never waits for the engine. A caller asks `has_room` and does without if there is none: the link keeps no
command that it can't send. In flight are at most COMMANDS_MAX commands or about COMMAND_BYTES_MAX bytes.

Time is judged by tick(), which the sweep calls four times a second; only the next try has a timer. The age of the
oldest command is known to a tick, since a tick notes how many commands were asked, and not when each was.
"""

from __future__ import annotations

import asyncio
import functools
import random
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from streamd.choice import Choice
from streamd.core.guard import Guard
from streamd.engine.connection import (
    EngineConnection,
    EngineError,
    EngineFault,
    EngineLost,
    OnPush,
    OnReply,
    Reply,
    fault_of,
    packed,
)
from streamd.engine_url import ServerAddress
from streamd.net.dialer import Dialer

# A thousand commands are 5 ms of the engine's work; a MiB is 10 ms of a Gbit line.
COMMANDS_MAX: Final = 1_000
COMMAND_BYTES_MAX: Final = 1024 * 1024

# Full jitter up to a bound that doubles: a thousand workers don't come back in the same moment.
BACKOFF_MIN_S: Final = 0.05
BACKOFF_MAX_S: Final = 2.0

# An idle link is asked for a sign of life once a second: so long an unnoticed end can stay unnoticed, beside timeout_s.
PING_EVERY_S: Final = 1.0

# XADD with an explicit sequence (`<fence>-<seq>`) and NOMKSTREAM, HELLO 3: all of them are in 7.0.
VERSION_MIN: Final = (7, 0)


class LinkState(Choice):
    """States of a link; the module's docstring explains each."""

    DOWN = "down"
    CONNECTING = "connecting"
    GREETING = "greeting"
    UP = "up"
    SLOW = "slow"
    STOPPED = "stopped"


_NEXT: Final[dict[LinkState, tuple[LinkState, ...]]] = {
    LinkState.DOWN: (LinkState.CONNECTING, LinkState.STOPPED),
    LinkState.CONNECTING: (LinkState.GREETING, LinkState.DOWN, LinkState.STOPPED),
    LinkState.GREETING: (LinkState.UP, LinkState.DOWN, LinkState.STOPPED),
    LinkState.UP: (LinkState.SLOW, LinkState.DOWN, LinkState.STOPPED),
    LinkState.SLOW: (LinkState.UP, LinkState.DOWN, LinkState.STOPPED),
    LinkState.STOPPED: (),
}
_GREETED: Final = (LinkState.UP, LinkState.SLOW)
_OVER: Final = (LinkState.DOWN, LinkState.STOPPED)


class LinkTerms(NamedTuple):
    """What all links of a process share. Times in seconds."""

    client_name: str  # as the engine's CLIENT LIST shows it
    user: str = ""
    password: str = ""
    tls: ssl.SSLContext | None = None
    timeout_s: float = 5.0
    slow_s: float = 1.0


class LinkOwner(NamedTuple):
    """The callbacks of a link. None of them may raise."""

    on_up: Callable[[], None]
    on_down: Callable[[EngineFault], None]
    on_push: OnPush


class Link:
    """A lasting way to a server, or to the server that the sentinels name at the time of a try."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        address: Callable[[], ServerAddress | None],
        terms: LinkTerms,
        owner: LinkOwner,
        guard: Guard,
        rng: random.Random,
        *,
        role: str = "master",
    ) -> None:
        """`address` is asked before each try; None: no server is known yet. The server has to have this `role`."""
        # process
        self._loop = loop
        self._terms = terms
        self._owner = owner
        self._guard = guard
        self._rng = rng
        self._role = role
        self._address = address
        self._dialled: ServerAddress | None = None
        self._dialer: Dialer | None = None
        # state
        self.state = LinkState.DOWN
        self.fault = EngineFault.NONE  # of the last connection that ended
        self.fault_text = ""  # the engine's own words, where it had some
        self._since = loop.time()  # of the state
        self._backoff_s = BACKOFF_MIN_S
        self._retry: asyncio.TimerHandle | None = None
        # connection
        self._connection: EngineConnection | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._looks: deque[tuple[int, float]] = deque()  # commands asked until a tick, and its time
        self._ping_at = 0.0
        self.round_trip_s = 0.0  # of the last sign of life
        self.version = ""
        # counters
        self.times_up = 0
        self.times_lost = 0

    # -- life

    def start(self) -> None:
        """Begin to connect."""
        self._try()

    def stop(self) -> None:
        """Close the connection; the link is of no use any more."""
        self._lose(EngineFault.STOPPED, stop=True)

    def use(self, terms: LinkTerms, on_refused: Callable[[str], None]) -> None:
        """New terms, for every try from now on. The connection that stands stays as it is.

        It is asked whether the engine takes another user or password: if not, `on_refused` hears the engine's words,
        and the old ones stay in use.
        """
        connection, old = self._connection, self._terms
        if self.is_up and connection is not None and terms.password and _login(terms) != _login(old):
            self._terms = terms._replace(user=old.user, password=old.password)
            command = packed("AUTH", *_login(terms))
            connection.ask(command, functools.partial(self._authenticated, terms, on_refused))
            return
        self._terms = terms
        if self.state is LinkState.DOWN:
            self._backoff_s = BACKOFF_MIN_S
            self._try()

    def _authenticated(self, terms: LinkTerms, on_refused: Callable[[str], None], reply: Reply) -> None:
        if isinstance(reply, EngineError) and not isinstance(reply, EngineLost):
            on_refused(str(reply))
        else:  # a connection that was lost meanwhile tells nothing: the next is greeted with the new password
            self._terms = terms

    def moved(self) -> None:
        """The address may be another one now: go there. No effect if it is the same."""
        if self.state is LinkState.STOPPED or self._address() == self._dialled:
            return
        self._backoff_s = BACKOFF_MIN_S
        if self.state is LinkState.DOWN:
            self._try()
        else:
            self._lose(EngineFault.MOVED)

    def _go(self, state: LinkState) -> None:
        assert state in _NEXT[self.state], (self.state, state)
        was, self.state = self.state, state
        self._since = self._loop.time()
        if was in _GREETED and state in _OVER:
            self.times_lost += 1
            self._owner.on_down(self.fault)
        elif was is LinkState.GREETING and state is LinkState.UP:
            self.times_up += 1
            self._owner.on_up()

    def _lose(self, fault: EngineFault, *, stop: bool = False) -> None:
        """Give up the connection, or the try for it. Another try follows, unless `stop`."""
        if self.state is LinkState.STOPPED:
            return
        connection, self._connection = self._connection, None
        dialling, self._dialling = self._dialling, None
        if dialling is not None:
            dialling.cancel()
        if connection is not None:
            connection.close(fault)
        self.fault = fault
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if stop:
            self._go(LinkState.STOPPED)
            return
        if self.state in _GREETED and self._loop.time() - self._since > BACKOFF_MAX_S:
            self._backoff_s = BACKOFF_MIN_S
        if self.state is not LinkState.DOWN:
            self._go(LinkState.DOWN)
        if self.state is LinkState.DOWN:  # on_down may have stopped it
            self._plan()

    def _plan(self) -> None:
        """Try again after a random time."""
        self._retry = self._loop.call_later(self._rng.uniform(0, self._backoff_s), self._try)
        self._backoff_s = min(2 * self._backoff_s, BACKOFF_MAX_S)

    # -- connecting

    def _try(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        address = self._address()
        if address is None or self.state is not LinkState.DOWN:
            return
        if self._dialled is None or self._dialled.host != address.host:
            self._dialer = None
        self._dialled = address
        self._go(LinkState.CONNECTING)
        self._dialling = self._loop.create_task(self._dial(address))

    async def _dial(self, address: ServerAddress) -> None:
        tls = self._terms.tls
        if self._dialer is None:
            self._dialer = Dialer(self._loop, address.host, tls=tls is not None)

        def protocol() -> EngineConnection:
            return EngineConnection(self._loop, self._guard, on_push=self._owner.on_push, on_lost=self._connection_lost)

        async def connect_to(ip: str) -> _Standing:
            transport, made = await self._loop.create_connection(
                protocol, ip, address.port, ssl=tls, server_hostname=address.host if tls else None
            )
            return _Standing(transport, made)

        try:
            standing = await self._dialer.connect(connect_to)
        except (OSError, ssl.SSLError) as error:
            self._dialling = None
            self.fault_text = str(error)
            self._lose(EngineFault.REFUSED)
            return
        self._dialling = None
        self._greet(standing.connection)

    def _greet(self, connection: EngineConnection) -> None:
        self._connection = connection
        self._go(LinkState.GREETING)
        connection.set_user_timeout(self._terms.timeout_s)
        auth: tuple[str, ...] = ()
        if self._terms.password:
            auth = ("AUTH", *_login(self._terms))
        hello = packed("HELLO", 3, *auth, "SETNAME", self._terms.client_name)
        connection.ask(hello, functools.partial(self._greeted, connection))

    def _greeted(self, connection: EngineConnection, reply: Reply) -> None:
        if connection is not self._connection or self.state is not LinkState.GREETING:
            return
        fault, self.fault_text = self._judge(reply)
        if fault is not EngineFault.NONE:
            self._lose(fault)
            return
        self._looks.clear()
        self._ping_at = 0.0
        self._go(LinkState.UP)

    def _judge(self, reply: Reply) -> tuple[EngineFault, str]:
        """Whether the server that answered HELLO so can be used, and if not, why."""
        if isinstance(reply, EngineError):
            if reply.word in ("ERR", "NOPROTO"):
                # A server before 6.0 knows no HELLO. Its error repeats the arguments, the password among them.
                return EngineFault.VERSION, "the server doesn't know HELLO 3; streamd needs 7.0 or later"
            return fault_of(reply), str(reply)
        if not isinstance(reply, dict):
            return EngineFault.PROTOCOL, "the reply to HELLO is no map"
        server = {_text(name): _text(value) for name, value in reply.items()}
        self.version = server.get("version", "")
        if _numbers(self.version) < VERSION_MIN:
            return EngineFault.VERSION, f"version {self.version or 'unknown'}; streamd needs 7.0 or later"
        if server.get("mode") == "cluster":
            return EngineFault.VERSION, "a Redis Cluster; streamd needs single servers, or servers behind sentinels"
        if server.get("role", self._role) != self._role:
            return EngineFault.READ_ONLY, f"the role of this server is {server['role']}; streamd needs a {self._role}"
        return EngineFault.NONE, ""

    def _connection_lost(self, connection: EngineConnection, fault: EngineFault) -> None:
        if connection is self._connection:
            self._connection = None
            self._lose(fault)

    # -- commands

    @property
    def is_up(self) -> bool:
        """Whether commands are carried out, be it slowly."""
        return self.state in _GREETED

    @property
    def has_room(self) -> bool:
        """Whether a command may be sent now."""
        connection = self._connection
        return (
            self.state is LinkState.UP
            and connection is not None
            and connection.takes_more
            and connection.pending < COMMANDS_MAX
            and connection.pending_bytes < COMMAND_BYTES_MAX
        )

    @property
    def pending(self) -> int:
        """Commands without a reply."""
        return self._connection.pending if self._connection is not None else 0

    def ask(self, command: bytes, on_reply: OnReply) -> None:
        """Send a packed command; only while the link is up. `on_reply` gets its reply, or EngineLost."""
        assert self.is_up and self._connection is not None
        self._connection.ask(command, on_reply)

    def tell(self, command: bytes) -> None:
        """Send a packed command that has no reply; only while the link is up."""
        assert self.is_up and self._connection is not None
        self._connection.tell(command)

    # -- the clock

    def tick(self, now: float) -> None:
        """Judge by the clock; the sweep calls it four times a second."""
        if self.state in (LinkState.CONNECTING, LinkState.GREETING):
            if now - self._since > self._terms.timeout_s:
                self.fault_text = "no answer"
                self._lose(EngineFault.TIMEOUT)
        elif self.state in _GREETED:
            self._judge_age(now)

    def _judge_age(self, now: float) -> None:
        connection = self._connection
        assert connection is not None
        looks = self._looks
        while looks and looks[0][0] <= connection.answered:
            looks.popleft()
        age_s = now - looks[0][1] if looks else 0.0
        if connection.asked > connection.answered and (not looks or looks[-1][0] < connection.asked):
            looks.append((connection.asked, now))
        if age_s > self._terms.timeout_s:
            self.fault_text = "no reply"
            self._lose(EngineFault.TIMEOUT)
        elif age_s > self._terms.slow_s:
            if self.state is LinkState.UP:
                self._go(LinkState.SLOW)
        else:
            if self.state is LinkState.SLOW:
                self._go(LinkState.UP)
            if now >= self._ping_at:
                self._ping_at = now + PING_EVERY_S
                connection.ask(packed("PING", self._ping_text(now)), functools.partial(self._ponged, connection, now))

    @staticmethod
    def _ping_text(now: float) -> str:
        return f"{now:.6f}"

    def _ponged(self, connection: EngineConnection, asked_at: float, reply: Reply) -> None:
        if connection is not self._connection or isinstance(reply, EngineLost):
            return
        if isinstance(reply, EngineError):
            self.fault_text = str(reply)
            self._lose(fault_of(reply))
        elif reply != self._ping_text(asked_at).encode():
            self._lose(EngineFault.PROTOCOL)  # replies are out of step
        else:
            self.round_trip_s = self._loop.time() - asked_at


class _Standing:
    """A connection that stands, as the dialer gives up the slower of two."""

    def __init__(self, transport: asyncio.BaseTransport, connection: EngineConnection) -> None:
        self._transport = transport
        self.connection = connection

    def close(self) -> None:
        self.connection.close(EngineFault.STOPPED)


def _login(terms: LinkTerms) -> tuple[str, str]:
    """User and password."""
    return terms.user or "default", terms.password


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isascii() and part.isdigit())
