"""Do slow readers hurt the others? 500 stopped, 500 at 1 KB/s and 1,000 reading, against 2,000 reading.

Rounds alternate between the two, so a drift of the machine's speed affects both. Printed for each round and as medians:
the ages of tokens at the 1,000 (p50, p99) and their ratios to the control's, whether every token reached them,
user-space memory (PSS) beyond the control's, and the kernel's send-side memory of each stalled reader (`ss -m`).

    slow_readers.py                          five rounds, about five minutes
    slow_readers.py --minutes 10             is memory flat? a loaded run, with memory every ten seconds
    slow_readers.py --contender nginx        the same with another server
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import contenders
import rig

P50_RATIO_MAX, P99_RATIO_MAX = 1.2, 1.5
USER_BYTES_MAX, KERNEL_BYTES_MAX = 8 * 1024, 40 * 1024

# Time until the buffers are full: a stopped reader takes 20-25 KB in its small receive buffer and our send queue, then
# 64 frames in its ring; at 10 tokens of 290 B a second that is 15 s. Ages are measured afterwards.
WARM_S = 15


@dataclass
class Run:
    """The figures of a run."""

    age_p50_ms: float
    age_p99_ms: float
    complete: int  # of the watched readers
    lost: int
    doubled: int
    tokens_per_s: float
    us_per_token: float
    pss_bytes: int
    stalled_kernel_bytes: list[int]
    not_200: int


def measure(options: argparse.Namespace, loaded: bool) -> Run:
    """Measure a run with the slow readers, or with as many healthy readers in their place."""
    others = {"slow": options.slow, "stalled": options.stalled} if loaded else {"extra": options.slow + options.stalled}
    tokens = round((options.warm + options.seconds) * options.per_second)
    with rig.rig() as running:
        pid, port = begin(running, options, tokens)
        sink = running.sink(
            port=port, readers=options.readers, **others, ramp=options.ramp, tokens=tokens,
            warm=options.warm, seconds=options.seconds, linger=15,
        )  # fmt: skip
        every = options.readers + options.slow + options.stalled
        time.sleep(every / options.ramp + options.warm)
        before = rig.look(pid)
        time.sleep(options.seconds * 0.8)
        after = rig.look(pid)
        stalled = rig.queue_bytes(f"sport = :{port} and dst {rig.STALLED_ADDRESS}") if loaded else []
        seen = rig.result(sink, options.seconds + 60)
        busy_s = after.user_s + after.system_s - before.user_s - before.system_s
        return Run(
            age_p50_ms=seen["age_ms"]["p50"],
            age_p99_ms=seen["age_ms"]["p99"],
            complete=seen["complete"]["watched"],
            lost=seen["lost"],
            doubled=seen["doubled"],
            tokens_per_s=seen["tokens_per_s"],
            us_per_token=busy_s / (after.at_s - before.at_s) / (options.per_second * every) * 1e6,
            pss_bytes=after.pss_bytes,
            stalled_kernel_bytes=stalled,
            not_200=seen["not_200"],
        )


def begin(running: rig.Rig, options: argparse.Namespace, tokens: int) -> tuple[int, int]:
    """Start source and contender; return the contender's pid and port."""
    upstream, port = running.source(options.per_second, tokens), rig.free_port()
    argv = contenders.CONTENDERS[options.contender](running.folder, port, upstream)
    return running.start(options.contender, argv, port, contenders.environment()), port


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Interleaved rounds, their ratios, and the verdict."""
    rounds = []
    for number in range(1, options.rounds + 1):
        order = (False, True) if number % 2 else (True, False)
        runs = {loaded: measure(options, loaded) for loaded in order}
        rounds.append((runs[False], runs[True]))
        show(number, *rounds[-1])
    slow = options.slow + options.stalled
    kernel = [size for _, loaded in rounds for size in loaded.stalled_kernel_bytes]
    summary = {
        "age_p50_ratio": statistics.median(loaded.age_p50_ms / control.age_p50_ms for control, loaded in rounds),
        "age_p99_ratio": statistics.median(loaded.age_p99_ms / control.age_p99_ms for control, loaded in rounds),
        "complete": min(loaded.complete for _, loaded in rounds),
        "lost": sum(run.lost for pair in rounds for run in pair),
        "doubled": sum(run.doubled for pair in rounds for run in pair),
        "user_bytes_per_slow_reader": statistics.median((b.pss_bytes - a.pss_bytes) / slow for a, b in rounds),
        "kernel_bytes_per_stalled_reader": {"mean": statistics.mean(kernel), "max": max(kernel)} if kernel else None,
    }
    verdict = {
        "p50": summary["age_p50_ratio"] <= P50_RATIO_MAX,
        "p99": summary["age_p99_ratio"] <= P99_RATIO_MAX,
        "complete": summary["complete"] == options.readers and not summary["lost"] and not summary["doubled"],
        "user": summary["user_bytes_per_slow_reader"] <= USER_BYTES_MAX,
        "kernel": bool(kernel) and max(kernel) <= KERNEL_BYTES_MAX,
    }
    return {"summary": summary, "holds": verdict, "rounds": [[shorten(a), shorten(b)] for a, b in rounds]}


def shorten(run: Run) -> dict[str, Any]:
    """A run for the report, with only mean and maximum of the stalled readers' memory."""
    sizes = run.stalled_kernel_bytes
    kernel = {"count": len(sizes), "mean": statistics.mean(sizes), "max": max(sizes)} if sizes else None
    return {**asdict(run), "stalled_kernel_bytes": kernel}


HEADINGS = " " * 17 + "  age p50   p99 ms  us/token   PSS MB  kernel KB/stalled  complete  lost"


def show(number: int, control: Run, loaded: Run) -> None:
    """Print a round as two lines of the table."""
    if number == 1:
        print(HEADINGS)
    for name, run in (("control", control), ("loaded", loaded)):
        sizes = run.stalled_kernel_bytes
        kernel = f"{statistics.mean(sizes) / 1024:.1f} (max {max(sizes) / 1024:.1f})" if sizes else ""
        print(
            f"round {number} {name:9}{run.age_p50_ms:9.2f}{run.age_p99_ms:9.2f}{run.us_per_token:10.1f}"
            f"{run.pss_bytes / 1e6:9.1f}{kernel:>19}{run.complete:10}{run.lost:6}",
            flush=True,
        )


def flatness(options: argparse.Namespace) -> dict[str, Any]:
    """A loaded run of `--minutes`: memory every ten seconds, and its growth after the first minute.

    The logs of the other streams would grow as long as these run, so only the streams of stalled readers are endless;
    the others end with the warm-up, and their logs are dropped after their retention."""
    seconds = round(options.minutes * 60)
    samples = []
    with rig.rig() as running:
        pid, port = begin(running, options, round(options.warm * options.per_second))
        endless = json.dumps({"model": "synthetic", "stream": True, "tokens": 0, "messages": []})
        running.sink(
            port=port, readers=options.readers, stalled=options.stalled, ramp=options.ramp, warm=options.warm,
            seconds=seconds + 60, stalled_body=endless,
        )  # fmt: skip
        begun = time.monotonic()
        while (at_s := time.monotonic() - begun) < seconds:
            time.sleep(10)
            stalled = rig.queue_bytes(f"sport = :{port} and dst {rig.STALLED_ADDRESS}")
            mean = statistics.mean(stalled) if stalled else 0.0
            samples.append(
                {
                    "at_s": round(at_s + 10),
                    "pss_bytes": rig.pss_bytes(pid),
                    "stalled": len(stalled),
                    "kernel_bytes": mean,
                }
            )
            line = f"{samples[-1]['at_s']:5} s  PSS {samples[-1]['pss_bytes'] / 1e6:7.1f} MB"
            print(f"{line}  {len(stalled)} stalled, {mean / 1024:.1f} KB each", flush=True)
    settled = [sample for sample in samples if sample["at_s"] > min(90, seconds / 2)]
    growth = {key: settled[-1][key] - settled[0][key] for key in ("pss_bytes", "kernel_bytes")}
    return {"growth": growth, "samples": samples}


def options_of(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=int, default=1000, help="readers that read normally and are measured")
    parser.add_argument("--slow", type=int, default=500, help="readers at 1 KB/s")
    parser.add_argument("--stalled", type=int, default=500, help="readers that stop reading")
    parser.add_argument("--per-second", type=float, default=10, help="tokens of each stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8, help="measured in each run")
    parser.add_argument("--warm", type=float, default=WARM_S, help="seconds before the measurement")
    parser.add_argument("--ramp", type=float, default=1000, help="connections opened a second")
    parser.add_argument("--minutes", type=float, default=0, help="flatness mode: minutes of watching memory")
    parser.add_argument("--contender", choices=sorted(contenders.CONTENDERS), default="streamd")
    parser.add_argument("--json", type=Path, help="write the report there too")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Run, print, and return whether the promise holds as the exit status (for a rival there is no promise)."""
    options = options_of(argv)
    try:
        report = flatness(options) if options.minutes else compare(options)
    except rig.Missing as missing:
        print(f"skipped: {missing}")
        return 0
    except subprocess.CalledProcessError as failed:
        print(f"failed: {failed}")
        return 1
    report = {
        "contender": options.contender,
        "version": contenders.version(options.contender),
        "machine": rig.machine(),
        **report,
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: report[key] for key in ("summary", "holds", "growth") if key in report}))
    return int(options.contender == "streamd" and not all(report.get("holds", {"": True}).values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
