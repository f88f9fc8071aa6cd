"""Memory of one stalled reader over the tokens it missed, for each server that can stand in front of a model.

A reader asks for a fast stream and never reads. Twenty of them do so at once, so that the memory of one stands out from
the process's own; the figure is user space (anonymous pages) and kernel queues (`ss -m`, both sides of the proxy),
divided by their number. The tokens missed are the rate of the stream times the time since it began: where a server
holds up the generation of a reader that does not read, the model makes fewer.

    one_stalled.py                              streamd, nginx, HAProxy, aiohttp, FastAPI: about ten minutes
    one_stalled.py --contenders nginx           one of them; its figures replace the earlier ones
    one_stalled.py --draw                       the chart anew, from the figures that are there

Needs cc and ss. Writes loadtest/results/one_stalled.json and one_stalled.svg, the chart of the README.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import time
from pathlib import Path
from typing import Any

import bench
import contenders
import plot
import rig

FIGURES, CHART = rig.HERE / "results" / "one_stalled.json", rig.HERE / "results" / "one_stalled.svg"
POINTS = (250, 500, 1000, 2000, 4000, 6000, 8000, 10_000, 12_000, 14_000, 16_000)  # tokens missed
NAMES = {"haproxy": "HAProxy", "fastapi": "FastAPI"}


def watch(name: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """What is held for one stalled reader, in KB, at each of POINTS."""
    asked = {"interval_ms": round(1000 / options.per_second), "tokens": 0, "words": 1}
    body = json.dumps({"model": "synthetic", "stream": True, "messages": [], **asked})
    with rig.rig() as running:
        pid, port, upstream = bench.begin(running, name, options.per_second)
        assert pid is not None
        answered(port)
        # Two readers first, for the modules and caches that are filled once. Their memory is used again: a tenth of 20.
        rig.result(running.sink(port=port, readers=2, ramp=500, warm=0, seconds=1), 60)
        idle = rig.anonymous_bytes(pid)
        running.sink(
            port=port, readers=1, stalled=options.readers, ramp=1000, warm=1, stalled_body=body,
            seconds=POINTS[-1] / options.per_second + 60,
        )  # fmt: skip
        begun, seen = time.monotonic(), []
        for missed in POINTS:
            time.sleep(max(0.0, begun + missed / options.per_second - time.monotonic()))
            held = {
                "user": rig.anonymous_bytes(pid) - idle,
                "queues_to_readers": sum(rig.queue_bytes(f"sport = :{port}")),
                "queues_from_upstream": sum(rig.queue_bytes(f"dport = :{upstream}")),
            }
            seen.append(
                {"tokens": missed, **{part: round(size / options.readers / 1000, 1) for part, size in held.items()}}
            )
            print(name, seen[-1], flush=True)
    return seen


def answered(port: int) -> None:
    """Wait for an answer, whatever its status: a server may listen before it serves."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/healthz")
    connection.getresponse().read()
    connection.close()


def whole(point: dict[str, float]) -> tuple[float, float]:
    """Tokens missed, and MB over all parts."""
    return point["tokens"], sum(size for part, size in point.items() if part != "tokens") / 1000


def chart_of(figures: dict[str, Any]) -> str:
    """The chart of figures as they stand in the file."""
    machine = figures["machine"]
    note = f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel'].partition('-')[0]}"
    return plot.lines(
        "Memory of one reader that stopped reading, MB",
        f"tokens it missed, some 240 B each; user space and kernel; {note}; loadtest/one_stalled.py",
        {NAMES.get(name, name): [whole(point) for point in seen] for name, seen in figures["kb"].items()},
    )


def options_of(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", default=",".join(contenders.CONTENDERS))
    parser.add_argument("--readers", type=int, default=20, help="that stop; the memory is divided by their number")
    parser.add_argument("--per-second", type=float, default=100, help="tokens of each stream")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--json", type=Path, default=FIGURES)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Measure each server that is installed, write the figures, draw the chart."""
    options = options_of(argv)
    figures = json.loads(options.json.read_text()) if options.json.exists() else {"versions": {}, "kb": {}}
    names = [] if options.draw else bench.present(options.contenders.split(","))[0]
    for name in names:
        figures["machine"] = rig.machine()
        figures["versions"][name] = contenders.version(name)
        figures["kb"][name] = watch(name, options)
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    CHART.write_text(chart_of(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
