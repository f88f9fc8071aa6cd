"""Settings of the engine and its password change while streams run, against a real Valkey."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from nodes import Nodes, nodes, start_engine
from real_engine import RealEngine, engines
from served import PROJECT

pytestmark = pytest.mark.cluster


def access_list(*passwords: str) -> list[str]:
    """ACL SETUSER's arguments for the user of the documents."""
    line = re.search(r"^user (streamd .*)$", Path(PROJECT, "docs/CLUSTER.md").read_text(), re.MULTILINE)
    assert line is not None
    name, *rules = line[1].replace(">PASSWORD", "").split()
    return [name, "reset", *(f">{password}" for password in passwords), *rules]


def reload(n: Nodes, node: str, outcome: str) -> None:
    """SIGHUP, and the line of its outcome."""
    before = sum(outcome in line for line in n[node].lines)
    n[node].signal(signal.SIGHUP)
    n.until(lambda: sum(outcome in line for line in n[node].lines) > before, outcome)


def test_the_password_changes_by_reload_and_no_stream_notices(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.touch(mode=0o600)
    password.write_text("first\n")
    engine = RealEngine()
    with engines(engine):
        start_engine(engine)
        engine.ask("ACL", "SETUSER", *access_list("first"))
        flags = ("--engine-user", "streamd", "--engine-password-file", str(password))
        with nodes(*flags, engine=engine) as n:
            at_a = n.start("a", tokens=400, interval_ms=20).read(10)
            at_b = n.read("b", at_a.stream_id).read(5)

            password.write_text("wrong\n")
            reload(n, "a", "ERROR engine refuses the new user or password")
            password.chmod(0o644)
            reload(n, "a", "ERROR reload refused; the old settings hold")
            assert not lost(n)

            engine.ask("ACL", "SETUSER", *access_list("first", "second"))
            password.write_text("second\n")
            password.chmod(0o600)
            for name in "ab":
                reload(n, name, " reloaded")
            engine.ask("ACL", "SETUSER", *access_list("second"))
            at_a.read(20)
            at_b.read(5)
            assert not lost(n)
            engine.ask("CLIENT", "KILL", "TYPE", "normal")
            engine.ask("CLIENT", "KILL", "TYPE", "pubsub")
            n.until(lambda: bytes(engine.ask("CLIENT", "LIST")).count(b" name=streamd-") == 4, "new connections")
            at_a.to_the_end()
            at_b.to_the_end()
            assert at_a.events[-1].data == "[DONE]" and at_b.text == at_a.text


def lost(n: Nodes) -> list[str]:
    return [line for daemon in n.daemons.values() for line in daemon.lines if "engine down" in line]
