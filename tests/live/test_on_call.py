"""On call: the scenes of a night before a daemon of two real workers, each ended with the commands of a person.

A dead server is in test_outages_live.py, a request's story in test_story_live.py, a drain that is taken back in
tests/daemon/test_parent.py, the same in a terminal in tests/top/test_top_live.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loaded import Loaded, loaded
from served import PROJECT, WAIT_S, holding

from streamd import cli
from streamd.daemon import admin_cli


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """Readers of three keys, in both workers."""
    with loaded(tmp_path_factory.mktemp("night"), "alice", "bob", "mallory") as d:
        in_both_workers(d, "alice")
        d.reader("bob")
        yield d


def in_both_workers(d: Loaded, name: str) -> None:
    """Begin generations of a key until each worker has one."""
    for count in range(1, 40):
        d.reader(name)
        d.until(lambda wanted=count: len(d.rows("readers", key=name)) == wanted, "reader")
        if {row["worker"] for row in d.rows("readers", key=name)} == {0, 1}:
            return
    raise AssertionError("all forty connections went to a single worker")


def ran(d: Loaded, capsys: pytest.CaptureFixture[str], command: str, *words: str) -> str:
    """The output of a command that succeeds."""
    capsys.readouterr()
    assert cli.main([command, "--admin", d.address, *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def first_row(table: str) -> dict[str, str]:
    head, line, *_ = table.splitlines()
    return dict(zip(re.split(r"  +", head), re.split(r"  +", line), strict=True))


def test_the_slow_reader_is_named_with_key_and_address_and_ended(
    busy: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    address = busy.reader("mallory", stalls=True, interval_ms=1)
    busy.until(lambda: [row for row in busy.rows("readers", key="mallory") if row["lag_events"] > 100], "lag")
    assert [busy.rows("readers", sort=sort)[0]["peer"] for sort in ("lag", "paused")] == [address] * 2
    row = first_row(ran(busy, capsys, "readers"))
    assert (row["KEY"], row["PEER"]) == ("mallory", address) and row["STATE"] in ("paused", "behind")
    assert "ended 0 streams, 1 readers" in ran(busy, capsys, "kill", row["ID"])
    busy.until(lambda: not busy.rows("readers", key="mallory"), "end of the reader")
    assert "ended 1 streams" in ran(busy, capsys, "kill", row["STREAM"]), "nor does its generation go on"


def test_the_key_that_takes_everything_is_on_top_and_ended_in_both_workers(
    busy: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    others = {row["id"] for row in busy.rows("readers")}
    in_both_workers(busy, "mallory")
    for _ in range(6):
        busy.reader("mallory", interval_ms=2)
    busy.until(lambda: busy.rows("keys")[0]["key_name"] == "mallory", "the key on top")
    row = first_row(ran(busy, capsys, "usage"))
    assert row["NAME"] == "mallory" and int(row["STREAMS"]) >= 8 and float(row["TOKENS/S"]) > 0
    counts = json.loads(ran(busy, capsys, "kill", "--as", "key", "mallory", "--json"))["mallory"]
    assert counts["streams"] == int(row["STREAMS"])
    busy.until(lambda: not busy.rows("readers", key="mallory"), "end of its readers")
    assert {row["id"] for row in busy.rows("readers")} == others
    assert first_row(ran(busy, capsys, "usage"))["NAME"] != "mallory"


def test_a_first_token_that_does_not_come_is_in_the_metrics_within_five_seconds(busy: Loaded) -> None:
    """The measure is the daemon's own: how long the request had waited when a scrape saw it first."""
    (server,) = busy.client.ask("GET", "/status")["upstreams"]
    name = re.escape(f'streamd_upstream_first_token_wait_seconds{{upstream="{server}"}}')
    assert waits_s(busy, name) == 0.0
    busy.reader("bob", ttft_ms=600_000)
    seen_s = busy.until(lambda: waits_s(busy, name), "wait")
    assert seen_s < 5.0
    assert busy.until(lambda: (s := waits_s(busy, name)) > seen_s and s, "growth")
    (row,) = busy.until(lambda: [row for row in busy.rows("streams", key="bob") if row["first_s"] is None], "stream")
    busy.client.ask("DELETE", f"/streams/{row['id']}")
    busy.until(lambda: waits_s(busy, name) == 0.0, "end of the wait")


def waits_s(d: Loaded, name: str) -> float:
    """The metric, from the listener of the scraper."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{d.d.port}/metrics", timeout=WAIT_S).read().decode()
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert found is not None, text[:2000]
    return float(found[1])


def test_a_drain_is_watched_to_its_end(tmp_path: Path) -> None:
    with holding() as held, loaded(tmp_path, "alice", of_upstreams=("--upstream", held.url)) as d:
        in_both_workers(d, "alice")
        count = len(d.rows("readers"))
        command = [sys.executable, "-m", "streamd", "drain", "--wait", "--json", "--admin", d.address]
        with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as watch:
            assert watch.stdout is not None
            assert json.loads(watch.stdout.readline()) == {"state": "draining"}
            seen: list[dict[str, Any]] = []
            while not seen or seen[-1]["left"] < count:  # a worker's numbers are up to a second old in the others
                seen.append(json.loads(watch.stdout.readline()))
            assert seen[-1]["by"] == "admin" and seen[-1]["finished"] == 0
            held.go_on()
            seen += map(json.loads, watch.stdout)
            assert watch.wait(WAIT_S) == admin_cli.EXIT_DONE
        assert d.d.ended() == 0 and f"stopped finished={count} sent_away=0 cut=0" in d.d.lines[-1]
        assert seen[-1]["left"] + seen[-1]["finished"] <= count
