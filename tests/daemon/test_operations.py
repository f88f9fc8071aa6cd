"""The metrics, log lines, reasons, gates and settings that docs/OPERATIONS.md names exist under these names."""

from __future__ import annotations

import re
from pathlib import Path

from fakes import get, rig

from streamd.config import ROWS, UPSTREAM_ROWS
from streamd.core.admission import Gate
from streamd.reasons import CloseReason

PROJECT = Path(__file__).parents[2]
TEXT = (PROJECT / "docs" / "OPERATIONS.md").read_text(encoding="utf-8")
SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in (PROJECT / "streamd" / "daemon").glob("*.py"))


def rows_after(head: str) -> list[str]:
    """The first column of the table under this head line."""
    table = TEXT.partition(head)[2].partition("\n\n")[0]
    return [line.split("|")[1] for line in table.splitlines() if line.startswith("|") and "---" not in line]


def test_every_metric_is_explained() -> None:
    with rig(ops_public=True) as r:
        shown = r.client(get("/metrics")).answer.body.decode()
    named = set(re.findall(r"`(streamd_[a-z_]+)", TEXT))
    there = set(re.findall(r"^# TYPE (streamd_[a-z_]+)", shown, re.M))
    assert len(named) > 15
    assert {name for name in named if name not in there and f"{name}_total" not in there} == set()


def test_the_explained_reasons_are_exactly_those_of_the_code() -> None:
    named = re.findall(r"`([a-z_]+)`", "".join(rows_after("| reason | caused by | action |")))
    assert sorted(named) == sorted(reason.word for reason in CloseReason)


def test_every_part_of_saturation_is_explained() -> None:
    named = re.findall(r"`([a-z_]+)`", "".join(rows_after("| part | at its bound | to raise it |")))
    assert sorted(named) == sorted(gate.value for gate in Gate if gate is not Gate.ADDRESS)


def test_every_explained_log_line_is_written_by_the_code() -> None:
    tables = TEXT.split("| line | meaning |")[1:]
    firsts = [line.split("|")[1] for table in tables for line in table.partition("\n\n")[0].splitlines()[2:]]
    lines = [line for first in firsts for line in re.findall(r"`([^`]+)`", first)]
    assert len(lines) > 10
    for line in lines:
        words = re.split(r" \S+=| …", line)[0]
        assert f'"{words}"' in SOURCE, line


def test_every_named_setting_exists() -> None:
    endings = ("_max", "_timeout", "_delay", "_grace", "_stuck", "_limit", "_file")
    words = {reason.word for reason in CloseReason}
    named = {word for word in re.findall(r"`([a-z]+(?:_[a-z]+)+)`", TEXT) if word.endswith(endings)} - words
    assert len(named) > 8
    assert named - {row.key for row in (*ROWS, *UPSTREAM_ROWS)} == set()
