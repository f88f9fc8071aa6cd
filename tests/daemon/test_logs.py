"""The log: an event is a single line with any content, and no event raises."""

from __future__ import annotations

import enum
import json
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamd.daemon import logs
from streamd.reasons import CloseReason

STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Callable[[], str]]]:
    """A function that sets the log up on a file, and returns a function that reads and empties the file."""
    path = tmp_path / "log"
    fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND)
    monkeypatch.setattr(logs, "_sink", logs._sink)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    before = root.level

    def written() -> str:
        text = path.read_bytes().decode()
        os.truncate(path, 0)
        return text

    def start(level: str = "info", format: str = "text", journal: bool = False) -> Callable[[], str]:
        stat = os.fstat(fd)
        logs.setup(level, format, fd=fd, journal_stream=f"{stat.st_dev}:{stat.st_ino}" if journal else None)
        return written

    yield start
    root.setLevel(before)
    os.close(fd)


def test_text_fields_stand_in_the_given_order(log: Any) -> None:
    written = log()
    logs.event(logs.INFO, "request", id="r1", status=200, first_s=0.25, reason=CloseReason.COMPLETE, key=None, ok=True)
    stamp, rest = written().split(" ", 1)
    assert STAMP.fullmatch(stamp)
    assert rest == "INFO request id=r1 status=200 first_s=0.25 reason=complete ok=true\n"


def test_json_fields_stand_in_the_given_order(log: Any) -> None:
    written = log(format="json")
    logs.event(logs.WARNING, "request", id="a b", status=200, first_s=1 / 3, key=None, ok=True, models=("a", "b"))
    row = json.loads(written())
    assert list(row) == ["time", "level", "event", "id", "status", "first_s", "ok", "models"]
    assert STAMP.fullmatch(row.pop("time"))
    assert row == {
        "level": "warning",
        "event": "request",
        "id": "a b",
        "status": 200,
        "first_s": 0.333333,
        "ok": True,
        "models": ["a", "b"],
    }


@pytest.mark.parametrize("format", ["text", "json"])
def test_the_journal_gets_priorities(log: Any, format: str) -> None:
    written = log("debug", format, journal=True)
    for level in (logs.DEBUG, logs.INFO, logs.WARNING, logs.ERROR, logging.CRITICAL):
        logs.event(level, "x")
    lines = written().splitlines()
    assert [line[:3] for line in lines] == ["<7>", "<6>", "<4>", "<3>", "<3>"]
    if format == "text":
        assert lines[0] == "<7>x", "journald has the time"


def test_a_stream_other_than_the_journals_gets_no_priorities(log: Any) -> None:
    written = log()
    logs.setup("info", "text", fd=logs._sink._fd, journal_stream="1:2")
    logs.event(logs.INFO, "x")
    assert STAMP.match(written())


def test_below_the_level_nothing_is_written(log: Any) -> None:
    written = log("warning")
    logs.event(logs.INFO, "x")
    assert written() == ""
    logs.set_level("debug")
    logs.event(logs.DEBUG, "x")
    assert written().endswith("DEBUG x\n")
    with pytest.raises(KeyError):
        logs.set_level("loud")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain/value:1[2]", "plain/value:1[2]"),
        ("", '""'),
        ("a b", '"a b"'),
        ("a=b", '"a=b"'),
        ('say "x"', r'"say \"x\""'),
        ("back\\slash", r'"back\\slash"'),
        ("x\n<3>fake level=error", r'"x\n<3>fake level=error"'),
        ("\r\0\x1b[31m", r'"\r\u0000\u001b[31m"'),
        ("\x7f\x85\u2028\u202e", r'"\u007f\u0085\u2028\u202e"'),
        ("\ud83d", r'"\ud83d"'),
        (b"\xff\n", r'"\\xff\n"'),
        (("a", "b"), "a,b"),
        (0, "0"),
        (1234567.125, "1234567.125"),
        (False, "false"),
        (float("nan"), "nan"),
    ],
)
def test_values_in_text_are_quoted_where_needed(log: Any, value: logs.Value, text: str) -> None:
    written = log(journal=True)
    logs.event(logs.INFO, "x", value=value)
    assert written() == f"<6>x value={text}\n"


@pytest.mark.parametrize(
    "value", ["\x7f", "\x85", "\x9b31m", "\u2028", "\u2029", "\u202e", "\u200f", "\xa0", "\U000e0001", "\ud83d"]
)
@pytest.mark.parametrize("format", ["text", "json"])
def test_no_odd_character_is_in_a_line(log: Any, format: str, value: str) -> None:
    written = log(format=format)
    logs.event(logs.INFO, "x", value=f"a{value}é漢", names=(value,))
    line = written()
    assert all(unicodedata.category(char)[0] not in "CZ" or char in " \n" for char in line)
    if format == "json":
        assert json.loads(line)["value"] == f"a{value}é漢"
        assert value == "\ud83d" or "é漢" in line  # letters stay


VALUES = st.one_of(
    st.text(st.characters()), st.binary(), st.integers(), st.floats(), st.booleans(), st.none(), st.tuples(st.text())
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(["a", "level", "time", "event", "name"]), VALUES), st.sampled_from(["text", "json"])
)
def test_one_event_is_one_line(log: Any, fields: dict[str, Any], format: str) -> None:
    written = log(format=format)
    logs.event(logs.INFO, "request", **fields)
    text = written()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text.replace("\x7f", "") if format == "json" else text)
    if format == "json":
        row = json.loads(text)
        assert (row["event"], row["level"]) == ("request", "info")


def test_a_long_value_is_cut(log: Any) -> None:
    written = log()
    logs.event(logs.INFO, "x", value="y" * 10_000)
    assert len(written()) < logs.VALUE_CHARS_MAX + 100


def test_a_line_that_cannot_be_written_stops_nothing(log: Any) -> None:
    log()
    fd = os.open(os.devnull, os.O_RDONLY)
    logs.setup("info", "text", fd=fd)
    logs.event(logs.INFO, "x")
    os.close(fd)
    logs.event(logs.INFO, "x")
    assert log()() == ""


def test_a_bug_comes_with_the_end_of_its_traceback(log: Any) -> None:
    written = log(format="json")
    try:
        raise AssertionError("two\nlines")
    except AssertionError as error:
        logs.bug("bug", error, stream="s_1", error="not this")
    row = json.loads(written())
    assert (row["level"], row["stream"], row["error"]) == ("error", "s_1", "AssertionError: two\nlines")
    assert "test_logs.py" in row["trace"]


class _Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_records_of_the_logging_module_become_events(log: Any) -> None:
    written = log(format="json")
    logging.getLogger("asyncio").error("took %.1f s\n", 1.5)
    row = json.loads(written())
    assert (row["level"], row["event"], row["logger"], row["text"]) == ("error", "log", "asyncio", "took 1.5 s\n")
    logging.getLogger("asyncio").info("chatter")
    assert written() == ""
    logging.getLogger("asyncio").error("%s", _Unprintable())
    assert "RuntimeError" in written()
    try:
        raise ValueError("inner")
    except ValueError:
        logging.getLogger("asyncio").exception("outer")
    assert "ValueError: inner" in json.loads(written())["trace"]


def test_an_enum_without_a_word_is_its_value(log: Any) -> None:
    written = log(journal=True)
    logs.event(logs.INFO, "x", state=enum.Enum("State", {"OPEN": "open"}).OPEN)  # type: ignore[attr-defined]
    assert written() == "<6>x state=open\n"
