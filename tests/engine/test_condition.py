"""The condition of the engine in the log: told once, with its reason, and as an error where an operator has to act."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from streamd.engine.condition import Condition, policy_of
from streamd.engine.connection import EngineError, EngineFault
from streamd.engine.link import LinkState


class Rig:
    def __init__(self) -> None:
        self.now = 100.0
        self.said: list[tuple[str, str]] = []
        self.fields: list[dict[str, Any]] = []
        self.replies: dict[str, Any] = {}
        self.policy = b"# Memory\r\nmaxmemory_policy:noeviction\r\n"
        self.link = SimpleNamespace(
            state=LinkState.DOWN, fault=EngineFault.NONE, fault_text="", version="9.1.2", is_up=False, ask=self.ask
        )
        channels = SimpleNamespace(link=SimpleNamespace(fault=EngineFault.NONE, fault_text="", is_up=True))
        self.channels = channels.link
        self.server = SimpleNamespace(copies={}, unsettled={})
        shard = SimpleNamespace(
            link=self.link, channels=channels, server=self.server, url=SimpleNamespace(name="e:6379")
        )
        self.condition = Condition(
            shard,  # type: ignore[arg-type]
            probe_key=b"p",
            members_key=b"m",
            time=lambda: self.now,
            say=self.say,
        )

    def say(self, level: str, name: str, **fields: Any) -> None:
        self.said.append((level, name.partition(":")[0]))
        self.fields.append(fields)

    def ask(self, command: bytes, on_reply: Any) -> None:
        name = command.split(b"\r\n")[2].decode()
        on_reply(self.policy if name == "INFO" else self.replies.get(name, 1))

    def tick(self, state: LinkState, seconds: float = 0.25) -> None:
        self.link.state, self.link.is_up = state, state in (LinkState.UP, LinkState.SLOW)
        self.now += seconds
        self.condition.tick(self.now)


def test_a_start_a_stall_a_loss_and_its_healing_are_told_once_each() -> None:
    rig = Rig()
    for state in (LinkState.CONNECTING, LinkState.UP, LinkState.UP, LinkState.SLOW, LinkState.SLOW, LinkState.UP):
        rig.tick(state)
    rig.server.copies["s"] = rig.server.unsettled["s"] = object()
    rig.link.fault, rig.link.fault_text = EngineFault.CLOSED, ""
    for state in (LinkState.DOWN, LinkState.CONNECTING, LinkState.DOWN, LinkState.UP, LinkState.UP):
        rig.tick(state)
    rig.server.unsettled.clear()
    rig.tick(LinkState.UP)
    assert rig.said == [
        ("info", "engine up"),
        ("warning", "engine slow"),
        ("info", "engine up"),
        ("warning", "engine down"),
        ("info", "engine up"),
        ("info", "engine healed"),
    ]


def test_an_engine_that_isnt_there_at_the_start_is_an_error_after_a_moment() -> None:
    rig = Rig()
    rig.link.fault, rig.link.fault_text = EngineFault.REFUSED, "connection refused"
    rig.tick(LinkState.DOWN, 1.0)
    assert rig.said == []
    rig.tick(LinkState.DOWN, 5.0)
    rig.tick(LinkState.DOWN, 60.0)
    assert rig.said == [("error", "engine down")]


@pytest.mark.parametrize("fault", [EngineFault.VERSION, EngineFault.RIGHTS])
def test_a_wrong_engine_is_an_error_at_once_and_anew_when_the_reason_changes(fault: EngineFault) -> None:
    rig = Rig()
    rig.link.fault, rig.link.fault_text = fault, "version 6.2"
    for _ in range(8):
        rig.tick(LinkState.DOWN)
    rig.link.fault_text = "another reason"
    for _ in range(8):
        rig.tick(LinkState.DOWN)
    assert rig.said == [("error", "engine down"), ("error", "engine can't be used")]


def test_pushes_that_the_user_may_not_receive_are_an_error() -> None:
    rig = Rig()
    rig.tick(LinkState.UP)
    rig.channels.fault, rig.channels.fault_text, rig.channels.is_up = EngineFault.RIGHTS, "NOPERM", False
    rig.tick(LinkState.UP)
    rig.tick(LinkState.UP)
    assert rig.said == [("info", "engine up"), ("error", "pushes can't be received")]


def test_missing_rights_are_named_once() -> None:
    rig = Rig()
    rig.replies = dict.fromkeys(("XTRIM", "PUBSUB", "HSET"), EngineError("NOPERM x")) | {"XADD": EngineError("OOM x")}
    rig.condition.check()
    rig.condition.check()
    assert [level for level, _ in rig.said] == ["error"] and rig.fields[0]["commands"] == ("XTRIM", "PUBSUB", "HSET")


@pytest.mark.parametrize("policy", ["noeviction", "volatile-ttl", "allkeys-lru", "volatile-lru"])
def test_a_policy_that_evicts_running_streams_is_an_error(policy: str) -> None:
    rig = Rig()
    rig.policy = f"maxmemory:0\r\nmaxmemory_policy:{policy}\r\n".encode()
    rig.condition.check()
    assert bool(rig.said) == (policy not in ("noeviction", "volatile-ttl"))


def test_a_reply_that_tells_no_policy_is_no_error() -> None:
    assert policy_of(EngineError("NOPERM x")) == policy_of(b"maxmemory:0\r\n") == policy_of(None) == ""
