"""Engines that can't be used as they are: `check-config` asks none of them, `serve` starts, and an ERROR says why."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from nodes import NodeReader, start_engine
from real_engine import RealEngine, engines
from served import served, upstream

pytestmark = pytest.mark.cluster


def needs_a_password(engine: RealEngine, folder: Path) -> tuple[str, ...]:
    engine.ask("CONFIG", "SET", "requirepass", "secret")
    return ()


def has_another_password(engine: RealEngine, folder: Path) -> tuple[str, ...]:
    password = folder / "password"
    password.touch(mode=0o600)
    password.write_text("wrong-one\n")
    engine.ask("CONFIG", "SET", "requirepass", "secret")
    return ("--engine-password-file", str(password))


def is_a_replica(engine: RealEngine, folder: Path) -> tuple[str, ...]:
    engine.ask("REPLICAOF", "127.0.0.1", "1")
    return ()


def is_gone(engine: RealEngine, folder: Path) -> tuple[str, ...]:
    engine.kill()
    return ()


def is_a_cluster(engine: RealEngine, folder: Path) -> tuple[str, ...]:
    engine.kill()
    engine.options = ("--cluster-enabled", "yes")
    start_engine(engine)
    return ()


WRONG: dict[str, tuple[Callable[[RealEngine, Path], tuple[str, ...]], str]] = {
    "it wants a password": (needs_a_password, "NOAUTH"),
    "it has another password": (has_another_password, "WRONGPASS"),
    "it is a replica": (is_a_replica, "streamd needs a master"),
    "it isn't there": (is_gone, "reason=refused"),
    "it is a Redis Cluster": (is_a_cluster, "a Redis Cluster; streamd needs single servers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_engine_is_an_error_that_says_why_and_the_daemon_serves(name: str, tmp_path: Path) -> None:
    make_wrong, why = WRONG[name]
    engine = RealEngine()
    with engines(engine), upstream() as mock:
        start_engine(engine)
        flags = make_wrong(engine, tmp_path)
        file = tmp_path / "streamd.toml"
        file.write_text(f'engine = ["{engine.url}"]\n[[upstream]]\nurl = "{mock}"\n')
        command = [sys.executable, "-m", "streamd", "check-config", str(file)]
        checked = subprocess.run(command, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked
        with served("--config", str(file), *flags) as d:
            d.notify.until("READY=1")
            assert why in d.line(r" ERROR engine down.*")[0]
            assert "wrong-one" not in "\n".join(d.lines)
            assert d.request("GET", "/readyz").status == 200
            assert NodeReader(d.generation(tokens=5, interval_ms=0)).to_the_end().events[-1].data == "[DONE]"
