"""The slow-reader benchmark: the same upstream and the same readers, with each server in turn between them.

Three situations, each in interleaved rounds, so that a drift of the machine's speed affects all servers alike:

- healthy: every reader reads. CPU per token, user-space and kernel memory per connection, and the server's part in a
  token's age, in the time to the first token and in the gaps between tokens (`direct` is source to sink without a
  server).
- 10 % and 50 % stalled: these shares of the readers ask for a fast stream and never read. Memory per connection, and
  the tokens that the other readers lose.

Ratios are taken within a round, then their median. For a server that isn't installed, the command that installs it is
printed. The table, the figures and a plot go to loadtest/results/. Needs cc and ss.

    bench.py                                          streamd, nginx, HAProxy, aiohttp, FastAPI: about ten minutes
    bench.py --contenders streamd,nginx --rounds 1    a quick look
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import contenders
import plot
import rig

Figures = dict[str, float]
STALLED_SHARES = (0.1, 0.5)
EVENT_BYTES = 250  # size of the source's events with chunk framing, for the text under the table

COLUMNS = (
    ("us_per_token", "CPU µs/token", 1),
    ("cpu_ratio", "CPU, x streamd", 2),
    ("age_p50_ms", "age p50 ms", 2),
    ("age_p99_ms", "age p99 ms", 2),
    ("ttft_p50_added_ms", "TTFT +p50 ms", 1),
    ("ttft_p99_added_ms", "TTFT +p99 ms", 1),
    ("gap_p99_added_ms", "gap +p99 ms", 1),
    ("user_kb", "user KB/conn", 1),
    ("kernel_kb", "kernel KB/conn", 1),
    ("stalled_10_kb", "10 % stalled KB/conn", 0),
    ("stalled_50_kb", "50 % stalled KB/conn", 0),
    ("lost", "tokens lost", 0),
)


def begin(running: rig.Rig, name: str, per_second: float) -> tuple[int | None, int, int]:
    """Start the source and a contender before it; return pid (None for `direct`), port, and the source's port."""
    upstream = running.source(per_second)
    if name == "direct":
        return None, upstream, upstream
    port = rig.free_port()
    argv = contenders.CONTENDERS[name](running.folder, port, upstream)
    return running.start(name, argv, port, contenders.environment()), port, upstream


def idle_bytes(running: rig.Rig, pid: int, port: int) -> int:
    """User space before the readers connect, after a few earlier readers have filled caches and arenas."""
    rig.result(running.sink(port=port, readers=50, ramp=500, warm=0, seconds=1), 60)
    time.sleep(0.5)
    return rig.pss_bytes(pid)


def kernel_bytes(port: int, upstream: int) -> int:
    """The queues of all of a proxy's connections, on both of its sides."""
    return sum(rig.queue_bytes(f"sport = :{port} or dport = :{upstream}"))


def healthy(name: str, options: argparse.Namespace) -> Figures:
    """All readers read: the cost of a token and of a connection, and the age of tokens."""
    with rig.rig() as running:
        pid, port, upstream = begin(running, name, options.per_second)
        idle = idle_bytes(running, pid, port) if pid else 0
        sink = running.sink(port=port, readers=options.streams, ramp=options.ramp, warm=2, seconds=options.seconds)
        time.sleep(options.streams / options.ramp + 2)
        before = rig.look(pid) if pid else None
        time.sleep(options.seconds * 0.9)
        figures: Figures = {}
        if pid and before:
            after = rig.look(pid)
            tokens = (after.at_s - before.at_s) * options.per_second * options.streams
            figures["user_us"] = (after.user_s - before.user_s) / tokens * 1e6
            figures["system_us"] = (after.system_s - before.system_s) / tokens * 1e6
            figures["us_per_token"] = figures["user_us"] + figures["system_us"]
            figures["user_kb"] = (after.pss_bytes - idle) / options.streams / 1024
            figures["kernel_kb"] = kernel_bytes(port, upstream) / options.streams / 1024
        seen = rig.result(sink, 60)
    for key in ("age", "ttft", "gap"):
        for quantile in ("p50", "p99"):
            figures[f"{key}_{quantile}_ms"] = seen[f"{key}_ms"][quantile]
    figures["lost"] = seen["lost"] + seen["doubled"]
    figures["bad"] = seen["failed"] + seen["closed"] + seen["not_200"]
    return figures


def stalled(name: str, share: float, options: argparse.Namespace) -> Figures:
    """A share of the readers never reads: memory per connection, once they have missed many tokens."""
    count = round(options.stalled_streams * share)
    fast = {
        "model": "synthetic",
        "stream": True,
        "messages": [],
        "interval_ms": round(1000 / options.stalled_per_second),
    }
    with rig.rig() as running:
        pid, port, upstream = begin(running, name, options.per_second)
        assert pid is not None
        idle = idle_bytes(running, pid, port)
        sink = running.sink(
            port=port, readers=options.stalled_streams - count, stalled=count, ramp=options.ramp, warm=1,
            seconds=options.stalled_seconds, stalled_body=json.dumps(fast),
        )  # fmt: skip
        time.sleep(options.stalled_streams / options.ramp + options.stalled_seconds)
        user, kernel = rig.pss_bytes(pid) - idle, kernel_bytes(port, upstream)
        seen = rig.result(sink, 60)
    key = f"stalled_{round(share * 100)}"
    connections = options.stalled_streams * 1024
    return {
        f"{key}_kb": (user + kernel) / connections,
        f"{key}_user_kb": user / connections,
        f"{key}_kernel_kb": kernel / connections,
        f"{key}_lost": seen["lost"] + seen["doubled"] + seen["closed"],
    }


def take_rounds(names: list[str], options: argparse.Namespace) -> dict[str, list[Figures]]:
    """Run every contender once in each round; report a contender that fails, and leave it out from then on."""
    rounds: dict[str, list[Figures]] = {name: [] for name in ["direct", *names]}
    for number in range(1, options.rounds + 1):
        for name in list(rounds):
            try:
                figures = healthy(name, options)
                if name != "direct" and number <= options.stalled_rounds:
                    for share in STALLED_SHARES:
                        figures |= stalled(name, share, options)
            except RuntimeError as failure:
                print(f"{name}: left out: {failure}")
                del rounds[name]
                continue
            rounds[name].append(figures)
            shown = "  ".join(
                f"{key} {figures[key]:.2f}" for key in ("us_per_token", "age_p50_ms", "age_p99_ms") if key in figures
            )
            print(f"round {number} {name:8} {shown}  lost {figures['lost']:.0f}", flush=True)
    return rounds


def medians(rounds: dict[str, list[Figures]]) -> dict[str, Figures]:
    """The median of each figure, its increase over `direct`, and the ratio of CPU to streamd's, both round by round."""
    direct, ours = rounds["direct"], rounds.get("streamd", [])
    table: dict[str, Figures] = {}
    for name, runs in rounds.items():
        if name == "direct":
            continue
        row = {key: statistics.median(run[key] for run in runs if key in run) for key in runs[0]}
        for key in ("ttft_p50", "ttft_p99", "gap_p50", "gap_p99"):
            pairs = zip(runs, direct, strict=True)
            row[f"{key}_added_ms"] = statistics.median(run[f"{key}_ms"] - base[f"{key}_ms"] for run, base in pairs)
        if ours:
            pairs = zip(runs, ours, strict=True)
            row["cpu_ratio"] = statistics.median(run["us_per_token"] / base["us_per_token"] for run, base in pairs)
        row["lost"] = sum(value for run in runs for key, value in run.items() if key.endswith("lost"))
        table[name] = row
    return table


def markdown(
    table: dict[str, Figures], versions: dict[str, str], missing: dict[str, str], options: argparse.Namespace
) -> str:
    """The table, the machine, and the command to repeat it."""
    here = rig.machine()
    missed = round(options.stalled_per_second * options.stalled_seconds)
    taken = (
        f"{options.streams} streams at {options.per_second:g} tokens/s, {options.rounds} interleaved rounds, medians."
        f" {here['cpu']}, {here['cores']} cores, Linux {here['kernel']}, Python {here['python']};"
        " source, server and readers share the machine."
    )
    stalled_means = (
        f"Stalled: of {options.stalled_streams} connections this share never reads and has missed {missed} tokens"
        f" ({missed * EVENT_BYTES / 1e6:.1f} MB) each when memory is taken: user space and kernel queues, over all."
    )
    beyond = (
        "Age: from the source's write to the reader's read. TTFT and gap: the excess over asking the source itself."
    )
    lines = [f"# Slow-reader benchmark, {datetime.date.today().isoformat()}", "", taken, stalled_means, ""]
    lines += [
        "| | " + " | ".join(title for _, title, _ in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, row in table.items():
        cells = (f"{row[key]:.{digits}f}" if key in row else "-" for key, _, digits in COLUMNS)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "![CPU and memory](bench.svg)", ""]
    lines += [f"- {name}: {said}" for name, said in versions.items()]
    lines += [f"- {name} was not measured. To get it: `{how}`" for name, how in missing.items()]
    lines += ["", beyond, "Repeat with `make bench`.", ""]
    return "\n".join(lines)


def charts(table: dict[str, Figures]) -> list[plot.Chart]:
    """The charts of the plot."""
    wanted = (
        ("CPU per relayed token, µs", "us_per_token"),
        ("Age of a token on arrival, p99, ms", "age_p99_ms"),
        ("Memory per connection, all reading, KB (user)", "user_kb"),
        ("Memory per connection, 50 % stalled, KB (user + kernel)", "stalled_50_kb"),
    )
    return [plot.Chart(title, {name: row[key] for name, row in table.items() if key in row}) for title, key in wanted]


def present(names: list[str]) -> tuple[list[str], dict[str, str]]:
    """The contenders that can run here, and the commands that install the others."""
    here, missing = [], {}
    with rig.rig() as probe:
        for name in names:
            try:
                contenders.CONTENDERS[name](probe.folder, 1, 1)
                here.append(name)
            except rig.Missing as lack:
                missing[name] = str(lack)
                print(f"{name}: not installed. {lack}")
    return here, missing


def options_of(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", default=",".join(contenders.CONTENDERS))
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--per-second", type=float, default=2, help="tokens of a stream; all contenders must keep up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6, help="measured in each healthy run")
    parser.add_argument("--ramp", type=float, default=500, help="connections opened a second")
    parser.add_argument("--stalled-streams", type=int, default=100)
    parser.add_argument(
        "--stalled-per-second", type=float, default=50, help="tokens that a stalled reader misses a second"
    )
    parser.add_argument("--stalled-seconds", type=float, default=30)
    parser.add_argument("--stalled-rounds", type=int, default=1)
    parser.add_argument("--results", type=Path, default=rig.HERE / "results")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Measure, write the results, print the table."""
    options = options_of(argv)
    try:
        rig.build("source"), rig.build("sink"), rig.queue_bytes("sport = :1")
    except rig.Missing as missing_tool:
        print(f"skipped: {missing_tool}")
        return 0
    names, missing = present([name for name in options.contenders.split(",") if name])
    rounds = take_rounds(names, options)
    table = medians(rounds)
    versions = {name: contenders.version(name) for name in table}
    text = markdown(table, versions, missing, options)
    report: dict[str, Any] = {"machine": rig.machine(), "versions": versions, "medians": table, "rounds": rounds}
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "bench.md").write_text(text)
    (options.results / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.results / "bench.svg").write_text(plot.svg(charts(table)))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
