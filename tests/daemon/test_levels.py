"""Levels: the sink's level follows, and each change and end has a line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from streamd.daemon import logs
from streamd.daemon.levels import Levels
from streamd.log_levels import LevelChange

Lines = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    kept: Lines = []

    def note(level: int, name: str, /, **fields: Any) -> None:
        assert level == logs.INFO
        kept.append((name, {key: value for key, value in fields.items() if value is not None}))

    before = logs._sink.level
    monkeypatch.setattr(logs, "event", note)
    yield kept
    logs._sink.level = before


def test_a_level_for_a_time_ends_with_a_line(lines: Lines) -> None:
    levels = Levels("warning")
    levels.change(LevelChange("debug", 60.0), 10.0)
    assert logs._sink.level == logs.DEBUG and not levels.tick(69.0)
    assert levels.tick(70.0) and not levels.tick(71.0)
    assert logs._sink.level == logs.WARNING
    changed = "log level changed"
    assert lines == [(changed, {"level": "debug", "for_s": 60.0}), (changed, {"level": "warning"})]


def test_watches_have_lines_and_leave_the_level(lines: Lines) -> None:
    levels = Levels("warning")
    logs.set_level("warning")
    levels.change(LevelChange("debug", 60.0, key="k1"), 0.0)
    levels.change(LevelChange("debug", 90.0, stream="s_1"), 0.0)
    levels.change(LevelChange("debug", 0.0, key="k1"), 1.0)
    assert not levels.tick(60.0) and levels.tick(90.0)
    assert logs._sink.level == logs.WARNING
    assert lines == [
        ("watched step by step", {"key": "k1", "for_s": 60.0}),
        ("watched step by step", {"stream": "s_1", "for_s": 90.0}),
        ("watch ends", {"key": "k1"}),
        ("watch ends", {"stream": "s_1"}),
    ]


def test_a_reload_has_the_settings_level(lines: Lines) -> None:
    levels = Levels("info")
    levels.change(LevelChange("debug", 60.0), 0.0)
    levels.change(LevelChange("debug", 60.0, key="k1"), 0.0)
    levels.reload("error")
    assert logs._sink.level == logs.ERROR and levels.now.level == "error" and len(levels.now.watches) == 1
    lines.clear()
    assert levels.tick(60.0) and lines == [("watch ends", {"key": "k1"})]
