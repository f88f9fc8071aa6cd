"""Scenarios about 10,000 readers at once: connected together, and disconnected and back together."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import rig
import target
from figures import Report, Scenario
from probe import Probes

CONNECTION_KIB_MAX = 13.0
RAMP_PER_S_MIN = 1000.0
SPREAD_MAX = 1.15
BACK_S_MAX = 15.0
HEALTH_MS_MAX = 250.0

SETTLE_S = 3.0  # time from the last connection to the measurement


# Connected together


def together_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ten-thousand."""
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--stalled", type=int, default=1000, help="streams with readers that never read")
    parser.add_argument(
        "--stalled-per-second", type=float, default=4, help="tokens of a stalled stream: enough to fill the ring"
    )
    parser.add_argument("--tokens", type=int, default=60, help="of each other stream, one a second")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ramp", type=float, default=1250, help="connections opened a second")
    parser.add_argument("--mock", action="store_true", help="with the mock upstream and the lean holder: figures only")


def ten_thousand(options: argparse.Namespace, report: Report) -> None:
    """Hold all readers at once; check that those that read are complete, and report CPU and memory."""
    if options.mock:
        _with_mock(options, report)
        return
    fast = {"model": "synthetic", "stream": True, "messages": [], "tokens": 0}
    stalled_body = json.dumps({**fast, "interval_ms": round(1000 / options.stalled_per_second)})
    with rig.rig() as running:
        daemon = target.start(running, running.source(1, options.tokens), workers=options.workers)
        idle = daemon.idle_bytes(running)
        sink = running.sink(
            port=daemon.port, readers=options.streams - options.stalled, stalled=options.stalled, ramp=options.ramp,
            tokens=options.tokens, stalled_body=stalled_body, warm=2, seconds=max(1, options.tokens - 10), linger=40,
        )  # fmt: skip
        time.sleep(options.streams / options.ramp + SETTLE_S)
        status = daemon.status()
        time.sleep(max(0.0, options.tokens - options.streams / options.ramp - SETTLE_S - 3))
        pss, kernel = rig.pss_bytes(daemon.pid), daemon.kernel_bytes()
        paused = daemon.metric("streamd_subscribers_paused")
        seen = rig.result(sink, options.tokens + 120)
        refused = daemon.refused()
    _judge_together(options, report, status, seen, refused)
    report.tell("stalled_and_paused", paused)
    report.tell("kernel_kib_per_connection", kernel / options.streams / 1024)
    report.tell("user_kib_with_the_processes_themselves", pss / options.streams / 1024)
    report.at_most("user_kib_per_connection", (pss - idle) / options.streams / 1024, CONNECTION_KIB_MAX)


def _judge_together(
    options: argparse.Namespace,
    report: Report,
    status: dict[str, Any],
    seen: dict[str, Any],
    refused: dict[str, int],
) -> None:
    report.at_least("streams_at_once", status["streams"]["live"], options.streams)
    report.exactly("refused", sum(refused.values()) + seen["not_200"] + seen["failed"], 0)
    report.exactly("complete", seen["complete"]["watched"], options.streams - options.stalled)
    for fault in ("lost", "doubled", "gap_events"):
        report.exactly(fault, seen[fault], 0)
    ready_s = seen["ramp_s"] + seen["ttft_ms"]["p99"] / 1000
    report.at_least("connections_per_s", options.streams / ready_s, RAMP_PER_S_MIN)
    report.at_most("spread_fullest_to_emptiest", spread(status), SPREAD_MAX)
    for name in ("ttft_ms", "age_ms", "gap_ms"):
        report.tell(name, seen[name])


def spread(status: dict[str, Any]) -> float:
    """Connections of the fullest worker divided by those of the emptiest."""
    counts = [each["connections"] for each in status.get("workers", [status])]
    return float(max(counts) / max(1, min(counts)))


def _with_mock(options: argparse.Namespace, report: Report) -> None:
    with rig.rig() as running:
        upstream = target.mock(running, per_s=1, tokens=options.tokens)
        quick = target.mock(running, per_s=1000, tokens=options.tokens)  # for the text that each stream must have
        daemon = target.start(running, upstream, workers=options.workers)
        idle = rig.pss_bytes(daemon.pid)
        argv = ["--readers", options.streams, "--stalled", options.stalled / options.streams, "--ramp", options.ramp]
        argv += ["--reference", f"http://127.0.0.1:{quick}/v1/chat/completions", "--seconds", options.tokens + 60]
        holding = Holding(running, daemon.port, argv)
        time.sleep(options.streams / options.ramp + SETTLE_S)
        status = daemon.status()
        time.sleep(max(0.0, options.tokens - options.streams / options.ramp - SETTLE_S - 3))
        pss = rig.pss_bytes(daemon.pid)
        seen = holding.report(options.tokens + 120)
    report.tell("streams_at_once", status["streams"]["live"])
    report.tell("spread_fullest_to_emptiest", spread(status))
    report.tell("user_kib_with_the_processes_themselves", pss / options.streams / 1024)
    report.tell("user_kib_per_connection", (pss - idle) / options.streams / 1024)
    for name in ("answers", "ends", "groups", "opened_in_s", "ttft_ms", "gap_ms"):
        report.tell(name, seen[name])


class Holding:
    """A running holder.py."""

    def __init__(self, running: rig.Rig, port: int, argv: list[Any]) -> None:
        self._running = running
        self._file = running.folder / "holder.json"
        program = [sys.executable, rig.HERE / "holder.py", "--port", port, "--json", self._file]
        self._process = running.run("holder", [*program, *argv])

    def over(self, limit_s: float) -> bool:
        """Whether the holder ended within `limit_s`."""
        return self._running.wait(self._process, limit_s)

    def report(self, limit_s: float) -> dict[str, Any]:
        """Wait for the holder's report. Raises RuntimeError if there is none."""
        if not self.over(limit_s) or not self._file.exists():
            raise RuntimeError("the holder came to no report")
        fields: dict[str, Any] = json.loads(self._file.read_text())
        return fields


# Disconnected and back together


def herd_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of thundering."""
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=60, help="of each stream, one a second")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ramp", type=float, default=1000)
    parser.add_argument("--wave", type=float, default=5, help="seconds from the last connection to the resets")


def thundering(options: argparse.Namespace, report: Report) -> None:
    """Reset all connections within a second; the readers come back after `retry:`, with health checks meanwhile."""
    with rig.rig() as running:
        admin = str(running.folder / "admin.sock")
        daemon = target.start(
            running, running.source(1, options.tokens),
            "--admin", f"unix:{admin}", "--detached-max", str(options.streams * 6 // 5), "--detach-grace", "30s",
            workers=options.workers,
        )  # fmt: skip
        argv = ["--readers", options.streams, "--tokens", options.tokens, "--ramp", options.ramp]
        argv += ["--wave", options.wave, "--seconds", options.tokens + options.streams / options.ramp + 60]
        with Probes(daemon.port, admin) as probes:
            seen = Holding(running, daemon.port, argv).report(options.tokens + options.streams / options.ramp + 120)
        refused, resumes = daemon.refused(), daemon.metric("streamd_resumes_total")
    report.exactly("complete", seen["ends"].get("live: complete", 0), options.streams)
    for fault in ("lost", "doubled", "wrong"):
        report.exactly(fault, sum(tally[fault] for tally in seen["groups"].values()), 0)
    report.exactly("missing_after_the_wave", seen["wave_missing"], 0)
    report.at_most("all_back_s", seen["wave_back_s"], BACK_S_MAX)
    at_s = seen["wave_at_s"] or 0.0
    health = probes.figures(at_s, at_s + (seen["wave_back_s"] or BACK_S_MAX))
    for name in ("health_kept_p99_ms", "health_admin_p99_ms"):
        report.at_most(name, health.pop(name, None), HEALTH_MS_MAX)
    for name, figure in health.items():
        report.tell(name, figure)
    report.tell("resumes", resumes)
    report.tell("refused_by_gate", refused)
    for name in ("answers", "ends", "back_ms"):
        report.tell(name, seen[name])


SCENARIOS = (
    Scenario(
        "ten-thousand",
        "10,000 relayed streams at once through two workers, 1,000 of them stalled: none refused, none lost",
        together_flags,
        ten_thousand,
    ),
    Scenario(
        "thundering",
        f"10,000 are reset within a second: all are back within {BACK_S_MAX:g} s, no token lost, health answers",
        herd_flags,
        thundering,
    ),
)
