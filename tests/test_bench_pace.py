"""The benchmark of the pace: its search for a capacity, its ratios and its page, without running a server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "loadtest"))

import contenders
import pace
import rig


def sample(cost_us: float = 20.0, tokens_per_s: float = 10_000.0, p99_ms: float = 10.0, faults: int = 0) -> pace.Sample:
    return pace.Sample(
        user_us=cost_us / 4,
        system_us=cost_us * 3 / 4,
        tokens_per_s=tokens_per_s,
        p50_ms=1.0,
        p99_ms=p99_ms,
        p999_ms=p99_ms,
        events_per_read=1.0,
        connection_kb=10.0,
        busy=0.5,
        harness_busy=0.5,
        faults=faults,
    )


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rig, "machine", lambda: dict.fromkeys(("cpu", "cores", "memory_gib", "kernel", "python"), "?"))
    yield


@pytest.mark.parametrize("true_streams", [40, 250, 301, 900, 5000])
@pytest.mark.parametrize("loses", [False, True])
def test_the_search_ends_within_a_tenth_of_the_capacity(
    true_streams: int, loses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def relayed(name: str, cell: pace.Cell, seconds: float, placement: pace.Placement) -> pace.Sample:
        tries.append(cell.streams)
        fits = cell.streams <= true_streams
        late_ms = 10.0 if fits or loses else 900.0
        return sample(tokens_per_s=25.0 * cell.streams, p99_ms=late_ms, faults=not fits and loses)

    monkeypatch.setattr(pace, "relayed", relayed)
    best, seen = pace.capacity("streamd", 25, 1.0, pace.Placement())
    assert 0.9 * 25 * true_streams <= best.tokens_per_s <= 25 * true_streams
    assert len(seen) == len(tries) <= 20


def test_ratios_are_taken_within_a_round() -> None:
    runs = {
        "C": [sample(10), sample(20), sample(30)],
        "nginx": [sample(15), sample(30), sample(45)],
        "streamd": [sample(12), sample(26), sample(30)],
    }
    assert pace.ratio(runs, "streamd", "C") == pytest.approx(1.2)
    assert pace.ratio(runs, "streamd", "nginx") == pytest.approx(0.8)


def test_the_page_has_a_row_for_each_contender_and_names_faults(no_programs: None) -> None:
    runs = {"C": [sample(10)], "nginx": [sample(20)], "streamd": [sample(5, faults=3)], "envoy": []}
    cell, secured = pace.Cell(400, 25), {"nginx": [sample(20)], "streamd 0": [sample(22)]}
    text = pace.page({cell: {k: v for k, v in runs.items() if v}}, {cell: secured}, {}, {"streamd": sample()}, 1)
    (row,) = [line for line in text.splitlines() if line.startswith("| streamd | 5.0 |")]
    assert row.endswith("| 0.50 | 0.25 |")
    assert "Lost, doubled, refused or broken off: streamd 3." in text
    assert "## 400 x 25/s" in text and "## Over TLS, 400 x 25/s" in text and "## Capacity" in text


def test_loads_are_read_as_they_are_written() -> None:
    assert pace.cells_of("400x25 2000x10") == [pace.Cell(400, 25.0), pace.Cell(2000, 10.0)]


def test_a_contender_that_is_not_installed_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(folder: Path, port: int, upstream: int) -> Any:
        raise rig.Missing("apt-get install haproxy")

    monkeypatch.setitem(contenders.CONTENDERS, "haproxy", missing)
    assert pace.names_of("streamd 0,haproxy,streamd") == ["streamd 0", "streamd"]
    assert capsys.readouterr().out == "left out: haproxy (apt-get install haproxy)\n"


def test_a_contender_runs_on_its_core_and_within_its_share() -> None:
    assert pace.Placement(contender=3).pinned(["x", "y"]) == ["taskset", "-c", "3", "x", "y"]
    limited = pace.Placement(contender=3, group=Path("/group")).pinned(["x", "y"])
    assert limited[0] == "sh" and "/group/cgroup.procs" in limited[2] and limited[-2:] == ["x", "y"]
