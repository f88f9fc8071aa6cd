"""More than a worker can carry: what do readers, new clients and health checks notice?

    overload.py [--streams 2800] [--seconds 600] [--results FOLDER]

`--streams` is the worker's capacity on half a core at 25 tokens a second each (`make bench-pace` finds it). Two cases,
each with streams of half as much again, for `--seconds`:

    new      as many new clients as that: the surplus is refused before an upstream is asked
    faster   two thirds of the capacity, in streams that then speed up to one and a half times of it

A token's age counts from when it was due, so a source that is held back hides nothing. Run no other program meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import contenders
import rig
from figures import Report
from pace import Placement, command_of, half_a_core
from probe import Probes

PER_S = 25
SURPLUS = 1.5
RAMP_PER_S = 150.0
AGE_MS_MAX = 1500.0
HEALTH_MS_MAX = 250.0
# Tokens before a stream speeds up, and the time after that for the worker to settle.
SLOW_TOKENS = 500
SETTLE_S = 10.0


def new_streams(streams: int, seconds: float, placement: Placement) -> Report:
    """Half as many readers again as the worker can carry."""
    return _run("new", round(streams * SURPLUS), {}, SETTLE_S, seconds, placement)


def faster_streams(streams: int, seconds: float, placement: Placement) -> Report:
    """Streams that are open, and speed up."""
    slow_ms = 1000 / PER_S
    open_streams = round(streams * 2 / 3)
    fast_ms = round(slow_ms * open_streams / streams / SURPLUS)
    asked = {"then_after": SLOW_TOKENS, "then_ms": fast_ms}
    return _run("faster", open_streams, asked, SLOW_TOKENS * slow_ms / 1000 + SETTLE_S, seconds, placement)


def _run(name: str, readers: int, asked: dict[str, int], warm_s: float, seconds: float, placement: Placement) -> Report:
    report = Report(f"overload, {name}")
    body = json.dumps({"model": "synthetic", "stream": True, "messages": [], **asked})
    with rig.rig() as running:
        os.sched_setaffinity(0, {placement.harness})
        upstream, port = running.source(PER_S, due=True), rig.free_port()
        argv = placement.pinned(command_of("streamd", running.folder, port, upstream))
        pid = running.start("streamd", argv, port, contenders.environment())
        sink = running.sink(port=port, readers=readers, ramp=RAMP_PER_S, warm=warm_s, seconds=seconds, body=body)
        time.sleep(readers / RAMP_PER_S + warm_s)
        with Probes(port, fresh=False, every_s=0.1) as probes:
            from_s, before = time.monotonic(), rig.look(pid)
            time.sleep(seconds * 0.98)
            after = rig.look(pid)
            health = probes.figures(from_s, time.monotonic())
        seen = rig.result(sink, seconds + 60)
    report.tell("readers", readers)
    report.tell("refused", seen["not_200"])
    report.tell("tokens_per_s", seen["tokens_per_s"])
    cpu_s = after.user_s + after.system_s - before.user_s - before.system_s
    report.tell("busy", cpu_s / (after.at_s - before.at_s))
    report.tell("events_per_read", seen["window_tokens"] / max(1, seen["window_reads"]))
    report.tell("age_p50_ms", seen["age_ms"]["p50"])
    report.at_most("age_p99_ms", seen["age_ms"]["p99"], AGE_MS_MAX)
    report.exactly("lost", seen["lost"] + seen["doubled"], 0)
    report.exactly("broken_off", max(0, seen["closed"] + seen["failed"] - seen["not_200"]), 0)
    report.at_most("health_kept_p99_ms", health["health_kept_p99_ms"], HEALTH_MS_MAX)
    report.exactly("health_failures", health["health_kept_failures"], 0)
    return report


CASES = {"new": new_streams, "faster": faster_streams}


def main(argv: Sequence[str]) -> int:
    """Run both cases and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], default=[], help="new, faster [both]")
    parser.add_argument("--streams", type=int, default=2800, help="the worker's capacity on half a core")
    parser.add_argument("--seconds", type=float, default=600, help="of each case")
    parser.add_argument("--results", type=Path, help="folder for overload.md")
    options = parser.parse_args(argv)
    own = os.sched_getaffinity(0)
    reports = []
    try:
        with half_a_core() as placement:
            for name in options.cases or CASES:
                print(f"overload, {name}", flush=True)
                reports.append(CASES[name](options.streams, options.seconds, placement))
    finally:
        os.sched_setaffinity(0, own)
    if options.results:
        (options.results / "overload.md").write_text(page(reports, options.streams, options.seconds))
    return 0 if all(all(report.holds.values()) for report in reports) else 1


def page(reports: Sequence[Report], streams: int, seconds: float) -> str:
    """All figures as Markdown."""
    machine = rig.machine()
    parts = [
        "# More than a worker can carry\n",
        f"`make bench-overload`, {time.strftime('%Y-%m-%d')}: {machine['cpu']}, {machine['cores']} cores, Linux "
        f"{machine['kernel']}, Python {machine['python']}; a worker on half a core, whose capacity is {streams:,} "
        f"streams of {PER_S} tokens a second; {seconds:g} s each.\n",
    ]
    for report in reports:
        parts.append(f"## {report.scenario}\n\n| figure | found | must |\n| --- | --- | --- |")
        for name, figure in report.figures.items():
            shown = f"{figure:,.1f}" if isinstance(figure, float) else f"{figure:,}"
            missed = "" if report.holds.get(name, True) else " (missed)"
            parts.append(f"| {name} | {shown}{missed} | {report.targets.get(name, '')} |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
