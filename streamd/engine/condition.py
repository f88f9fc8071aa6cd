"""Condition: tells in the log how a server of the engine is, and names its faults.

    STARTING  since the process began; an engine that isn't up by then is told after TELL_AFTER_S
    UP        commands are carried out, and every copy is as its owner wants it
    SLOW      a reply is late: nothing is written meanwhile
    DOWN      no connection, or none that is of use; told once, and again when the reason changes
    HEALING   the link is up again, and copies are looked at and written anew

A server that can be reached is asked for two things that no other command shows: whether it evicts copies when it is
full (maxmemory-policy), and whether streamd's user may do all that streamd does. Each is tried once with a key of its
own after each connection. streamd runs with a wrong engine all the same: an ERROR says how to change it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from streamd.choice import Choice
from streamd.engine.connection import EngineError, EngineFault, EngineLost, Reply, packed
from streamd.engine.link import LinkState
from streamd.engine.members import Say
from streamd.engine.servers import EngineShard

# A start beside the engine's own start, or its failover, is no news.
TELL_AFTER_S: Final = 5.0

# Policies under which a full engine refuses writes, or gives up finished copies before live ones: a live copy's time
# to live is renewed. All other policies evicted most of the live copies in a trial.
POLICIES: Final = ("noeviction", "volatile-ttl")

_WRONG: Final = (EngineFault.RIGHTS, EngineFault.VERSION)


class ConditionState(Choice):
    """What the log has told last; the module's docstring explains each."""

    STARTING = "starting"
    UP = "up"
    SLOW = "slow"
    DOWN = "down"
    HEALING = "healing"


class Condition:
    """The condition of a server."""

    def __init__(
        self, shard: EngineShard, *, probe_key: bytes, members_key: bytes, time: Callable[[], float], say: Say
    ) -> None:
        self._shard = shard
        self._probe_key = probe_key
        self._members_key = members_key
        self._time = time
        self._say = say
        self._began_at = self._since = time()
        self.state = ConditionState.STARTING
        self._told = ""  # the fault that was told last
        self._missing: list[str] = []  # commands that the user may not use, found by the probe under way
        self._told_missing: tuple[str, ...] = ()
        self._told_policy = ""

    def _go(self, state: ConditionState, level: str, name: str, **fields: object) -> None:
        self.state, self._since = state, self._time()
        self._say(level, name, engine=self._shard.url.name, **fields)

    # -- the clock

    def tick(self, now: float) -> None:
        """Tell of changes; the sweep calls it four times a second."""
        link = self._shard.link
        if link.state is LinkState.UP:
            self._tick_up(now)
        elif link.state is LinkState.SLOW:
            if self.state is not ConditionState.SLOW:
                self._go(ConditionState.SLOW, "warning", "engine slow: nothing is written until it answers")
        elif self.state is not ConditionState.STARTING or now - self._began_at > TELL_AFTER_S or link.fault in _WRONG:
            self._tick_down()

    def _tick_up(self, now: float) -> None:
        channels = self._shard.channels.link
        if channels.fault in _WRONG and not channels.is_up:
            self._tell_fault(f"{channels.fault.value} {channels.fault_text}", "pushes can't be received")
        if self.state in (ConditionState.STARTING, ConditionState.DOWN, ConditionState.SLOW):
            was_down = self.state is ConditionState.DOWN
            after_s = round(now - self._since, 1)
            to_heal = len(self._shard.server.copies)
            state = ConditionState.HEALING if was_down and to_heal else ConditionState.UP
            self._told = ""
            self._go(state, "info", "engine up", version=self._shard.link.version, after_s=after_s, copies=to_heal)
        elif self.state is ConditionState.HEALING and not self._shard.server.unsettled:
            took_s = round(now - self._since, 1)
            self._go(ConditionState.UP, "info", "engine healed", took_s=took_s, copies=len(self._shard.server.copies))

    def _tick_down(self) -> None:
        link = self._shard.link
        fault = f"{link.fault.value} {link.fault_text}".strip()
        if self.state is not ConditionState.DOWN:
            level = "error" if link.fault in _WRONG or self.state is ConditionState.STARTING else "warning"
            self._told = fault
            self._go(
                ConditionState.DOWN,
                level,
                "engine down: streams stay readable at their own nodes alone",
                reason=link.fault,
                error=link.fault_text or None,
            )
        elif link.fault in _WRONG:
            self._tell_fault(fault, "engine can't be used")

    def _tell_fault(self, fault: str, name: str) -> None:
        if fault != self._told:
            self._told = fault
            self._say("error", name, engine=self._shard.url.name, error=fault)

    # -- faults that no other command shows

    def check(self) -> None:
        """The link is up: try all commands that streamd uses, and ask for the policy."""
        self._missing = []
        key, members = self._probe_key, self._members_key
        commands = (
            ("XADD", key, "1-0", "w", "probe"),
            ("XRANGE", key, "-", "+"),
            ("XREVRANGE", key, "+", "-", "COUNT", 1),
            ("XTRIM", key, "MINID", "1-0"),
            ("XDEL", key, "1-0"),
            ("PEXPIRE", key, 1000),
            ("PUBLISH", key, "probe"),
            ("PUBSUB", "NUMSUB", key),
            ("HSET", members, "probe", "probe"),
            ("HGET", members, "probe"),
            ("HMGET", members, "probe", "probe"),
            ("HGETALL", members),
            ("HDEL", members, "probe"),
            ("UNLINK", key),
        )
        for command in commands:
            self._shard.link.ask(packed(*command), lambda reply, name=command[0]: self._tried(str(name), reply))  # type: ignore[misc]
        self._shard.link.ask(packed("INFO", "memory"), self._memory)

    def _tried(self, name: str, reply: Reply) -> None:
        if isinstance(reply, EngineError) and reply.word == "NOPERM":
            self._missing.append(name)

    def _memory(self, reply: Reply) -> None:
        if isinstance(reply, EngineLost):
            return
        missing = tuple(self._missing)
        if missing and missing != self._told_missing:
            self._say(
                "error",
                "engine refuses commands to streamd's user: give it these rights, for all keys and channels that "
                "begin with engine_prefix",
                engine=self._shard.url.name,
                commands=missing,
            )
        self._told_missing = missing
        policy = policy_of(reply)
        if policy and policy not in POLICIES and policy != self._told_policy:
            self._say(
                "error",
                "engine evicts copies of running streams when it is full: set maxmemory-policy to noeviction or "
                "volatile-ttl",
                engine=self._shard.url.name,
                policy=policy,
            )
        self._told_policy = policy


def policy_of(reply: Reply) -> str:
    """The eviction policy in the reply to INFO memory; empty if it doesn't say."""
    text = reply if isinstance(reply, bytes) else b""
    for line in text.splitlines():
        name, _, value = line.partition(b":")
        if name == b"maxmemory_policy":
            return value.decode("ascii", "replace")
    return ""
