"""A reload that goes wrong: it is refused with a line, and systemd is told READY again."""

from __future__ import annotations

from typing import Any

import pytest

from streamd.config import ConfigError, Settings
from streamd.daemon import logs
from streamd.daemon.control import ToWorker
from streamd.daemon.reload import Reloads
from streamd.daemon.slot import Slot
from streamd.sources import ConfigProblem


class Told:
    """systemd."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def reloading(self, now_monotonic_usec: int) -> bool:
        self.words.append("RELOADING")
        return True

    def ready(self, status: str = "") -> bool:
        self.words.append("READY")
        return True


class Place(Slot):
    """A worker that is told, and dies at it if `error` is set."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(0)
        self.error_at_tell = error
        self.told: list[ToWorker] = []

    def tell(self, kind: ToWorker, facts: object = None) -> bool:
        if self.error_at_tell is not None:
            raise self.error_at_tell
        self.told.append(kind)
        return True


@pytest.mark.parametrize(
    "error",
    [
        ConfigError([ConfigProblem("file", "key", "", "wrong")]),
        OSError("no file"),
        RecursionError("nested"),
        ValueError("5000 digits"),
        MemoryError(),
        ZeroDivisionError(),
    ],
)
@pytest.mark.parametrize("where", ["load", "tell"])
def test_ready_follows_reloading_whatever_is_raised(
    error: Exception, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(logs, "event", lambda level, name, /, **fields: lines.append(name))
    systemd: Any = Told()
    settings, place = Settings(), Place(error if where == "tell" else None)

    def load() -> Settings:
        if where == "load":
            raise error
        return Settings(head_timeout_s=1.0)

    reloads = Reloads(settings, load, systemd, [place])
    reloads.ask()
    reloads.begin_if_asked()
    assert systemd.words == ["RELOADING", "READY"]
    assert reloads.settings is settings and any("refused" in line for line in lines)
    place.error_at_tell = None
    reloads._load = lambda: Settings(head_timeout_s=2.0)
    reloads.ask()
    reloads.begin_if_asked()
    assert place.told == [ToWorker.PREPARE]
    reloads.prepared(place, reloads._number, "")
    reloads.answered(place, reloads._number)
    assert systemd.words == ["RELOADING", "READY"] * 2 and reloads.settings.head_timeout_s == 2.0
