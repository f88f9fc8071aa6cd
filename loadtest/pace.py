"""The cost of a token at the pace of real models: 10 to 25 tokens a second of each of hundreds of streams.

    pace.py [--rounds 5] [--results FOLDER]       pace.py --help lists the flags; the defaults are the official values

Contenders run one after the other in each round, in alternating order: a relay in C that only copies, nginx, HAProxy,
and streamd with a write interval of 0, 50 ms, 100 ms and adaptive. `--also envoy,caddy` adds others for a single round.
The contender has the last core to itself, source and sink share the first. A token's time is that at which it was
*due*, so a contender that holds its source back doesn't hide how late its tokens are.

Then the capacity of each on half a core (a quota of 5 ms in 10 ms, by cgroup; or a core shared with a busy loop): the
most tokens a second at a p99 age of at most 250 ms. Run no other program meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import contenders
import rig
from cost import Publisher
from plot import lines
from tls_price import make_certificate

AGE_MS_MAX = 250.0
RAMP_PER_S = 500.0
TLS_RAMP_PER_S = 200.0
WARM_S = 3.0
QUOTA_PERIOD_US = 10_000
CPU_GROUPS = Path("/sys/fs/cgroup/cpu")
STREAMD_INTERVALS = {"streamd 0": "0", "streamd": "adaptive", "streamd 50 ms": "50ms", "streamd 100 ms": "100ms"}
USUAL = ("C", "nginx", "haproxy", *STREAMD_INTERVALS)
FAST_ONLY = ("streamd 50 ms", "streamd 100 ms")  # no pause is made where events come further apart than that
OVER_TLS = ("nginx", "streamd 0")
IN_CAPACITY = ("C", "nginx", "haproxy", "streamd 0", "streamd")

# A load counts as carried if so much of it arrives: a contender that is full accepts connections late, or not at all.
CARRIED_SHARE = 0.97

# A search for the capacity: the first step up or down, and the step at which it ends.
STEP, STEP_LEAST = 1.4, 1.05


@dataclass(frozen=True)
class Cell:
    """A load: so many streams of so many tokens a second."""

    streams: int
    per_s: float

    def __str__(self) -> str:
        return f"{self.streams:,} x {self.per_s:g}/s"


CELLS = (Cell(2000, 10), Cell(400, 25), Cell(1000, 25))


@dataclass(frozen=True)
class Sample:
    """A contender under a load."""

    user_us: float  # CPU for each token
    system_us: float
    tokens_per_s: float
    p50_ms: float  # ages, from when a token was due
    p99_ms: float
    p999_ms: float
    events_per_read: float  # of the readers
    connection_kb: float  # user space, for each stream
    busy: float  # share of the window that the contender ran
    harness_busy: float  # the same for source and sink, on their core
    faults: int  # lost, doubled, refused or broken off

    @property
    def all_us(self) -> float:
        """User and system time for each token."""
        return self.user_us + self.system_us


@dataclass
class Placement:
    """The cores of contender and harness, and the contender's share of its core."""

    harness: int = min(os.sched_getaffinity(0))
    contender: int = max(os.sched_getaffinity(0))
    half: bool = False
    group: Path | None = field(default=None)

    def pinned(self, argv: Sequence[str]) -> list[str]:
        """The command line of a contender on its core, within its share."""
        pinned = ["taskset", "-c", str(self.contender), *argv]
        if self.group is None:
            return pinned
        return ["sh", "-c", f'echo $$ > {self.group}/cgroup.procs; exec "$@"', "sh", *pinned]


@contextlib.contextmanager
def half_a_core() -> Iterator[Placement]:
    """A placement in which the contender has half of its core: by a quota, else beside a loop that takes the rest."""
    group = CPU_GROUPS / f"streamd-pace-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text(str(QUOTA_PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(QUOTA_PERIOD_US // 2))
    except OSError:
        with contextlib.suppress(OSError):
            group.rmdir()
        placement = Placement(half=True)
        loop = ["taskset", "-c", str(placement.contender), sys.executable, "-c", "while True: pass"]
        spinning = subprocess.Popen(loop)
        try:
            yield placement
        finally:
            spinning.kill()
            spinning.wait()
        return
    try:
        yield Placement(half=True, group=group)
    finally:
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def command_of(name: str, folder: Path, port: int, upstream: int) -> list[str]:
    """The command line of a contender."""
    if name == "C":
        return [rig.build("relay_floor"), str(port), str(upstream)]
    if name in STREAMD_INTERVALS:
        return [*contenders.streamd(folder, port, upstream), "--write-interval", STREAMD_INTERVALS[name]]
    return contenders.CONTENDERS[name](folder, port, upstream)


def harness_s(running: rig.Rig) -> float:
    """CPU seconds of source and sink."""
    return sum(sum(rig.cpu_s(process.pid)) for process in running.processes if _is_harness(process))


def _is_harness(process: subprocess.Popen[bytes]) -> bool:
    argv = process.args if isinstance(process.args, list) else []
    return any(Path(str(part)).name.startswith(("source-", "sink-")) for part in argv)


def relayed(name: str, cell: Cell, seconds: float, placement: Placement) -> Sample:
    """Measure a contender with `cell.streams` readers, each with a stream of its own."""
    with rig.rig() as running:
        os.sched_setaffinity(0, {placement.harness})
        upstream = running.source(cell.per_s, due=True)
        port = rig.free_port()
        argv = placement.pinned(command_of(name, running.folder, port, upstream))
        pid = running.start(name.replace(" ", "-"), argv, port, contenders.environment())
        idle_bytes = rig.pss_bytes(pid)
        sink = running.sink(port=port, readers=cell.streams, ramp=RAMP_PER_S, warm=WARM_S, seconds=seconds)
        time.sleep(cell.streams / RAMP_PER_S + WARM_S)
        return _window(running, pid, sink, seconds, cell.streams, idle_bytes)


def secured(name: str, cell: Cell, seconds: float, placement: Placement) -> Sample:
    """As relayed(), over TLS. The readers' side of TLS runs on the harness's core."""
    with rig.rig() as running:
        os.sched_setaffinity(0, {placement.harness})
        upstream = running.source(cell.per_s, due=True)
        port, plain = rig.free_port(), rig.free_port()
        pair = make_certificate(running.folder)
        if name == "nginx":
            argv = contenders.nginx(running.folder, port, upstream, pair)
        else:
            files = ["--tls-cert", str(pair[0]), "--tls-key", str(pair[1])]
            argv = [*command_of(name, running.folder, port, upstream), *files]
        pid = running.start(name.replace(" ", "-"), placement.pinned(argv), port, contenders.environment())
        running.start("tls", contenders.tls_client(running.folder, plain, port), plain)
        idle_bytes = rig.pss_bytes(pid)
        sink = running.sink(port=plain, readers=cell.streams, ramp=TLS_RAMP_PER_S, warm=WARM_S, seconds=seconds)
        time.sleep(cell.streams / TLS_RAMP_PER_S + WARM_S)
        return _window(running, pid, sink, seconds, cell.streams, idle_bytes)


def fanned_out(name: str, cell: Cell, seconds: float, placement: Placement) -> Sample:
    """Measure a stream of `cell.per_s` events a second with `cell.streams` readers."""
    with rig.rig() as running:
        os.sched_setaffinity(0, {placement.harness})
        port = rig.free_port()
        if name == "C":
            argv = [rig.build("fanout_floor"), str(port), f"{1000 / cell.per_s:.0f}", str(cell.streams)]
        else:
            argv = command_of(name, running.folder, port, rig.free_port())
        pid = running.start("fanout", placement.pinned(argv), port, contenders.environment())
        idle_bytes = rig.pss_bytes(pid)
        publisher = None if name == "C" else Publisher(port, cell.per_s)
        sink = running.sink(
            port=port, readers=cell.streams, ramp=RAMP_PER_S, warm=2 + WARM_S, seconds=seconds,
            method="GET", path=f"/v1/streams/{Publisher.NAME}", body="",
        )  # fmt: skip
        time.sleep(cell.streams / RAMP_PER_S + 1)
        if publisher is not None:
            publisher.start()
        time.sleep(1 + WARM_S)
        try:
            return _window(running, pid, sink, seconds, cell.streams, idle_bytes)
        finally:
            if publisher is not None:
                publisher.stop()


def _window(
    running: rig.Rig, pid: int, sink: subprocess.Popen[bytes], seconds: float, streams: int, idle_bytes: int
) -> Sample:
    """Measure over nine tenths of the sink's window."""
    before, harness_before_s = rig.look(pid), harness_s(running)
    time.sleep(seconds * 0.9)
    after, harness_after_s = rig.look(pid), harness_s(running)
    seen = rig.result(sink, seconds + 60)
    window_s = after.at_s - before.at_s
    tokens = max(1.0, seen["tokens_per_s"] * window_s)
    user_s, system_s = after.user_s - before.user_s, after.system_s - before.system_s
    ages = seen["age_ms"]
    return Sample(
        user_us=user_s / tokens * 1e6,
        system_us=system_s / tokens * 1e6,
        tokens_per_s=seen["tokens_per_s"],
        p50_ms=ages["p50"],
        p99_ms=ages["p99"],
        p999_ms=ages["p999"],
        events_per_read=seen["window_tokens"] / max(1, seen["window_reads"]),
        connection_kb=(after.pss_bytes - idle_bytes) / streams / 1024,
        busy=(user_s + system_s) / window_s,
        harness_busy=(harness_after_s - harness_before_s) / window_s,
        faults=seen["lost"] + seen["doubled"] + seen["not_200"] + seen["failed"] + seen["closed"],
    )


Runs = dict[str, list[Sample]]
Measure = Callable[[str, Cell, float, Placement], Sample]


def in_rounds(names: Sequence[str], cell: Cell, rounds: int, seconds: float, measure: Measure = relayed) -> Runs:
    """Each contender once in a round, in alternating order."""
    runs: Runs = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            sample = measure(name, cell, seconds, Placement())
            runs[name].append(sample)
            print(f"{cell}  round {number + 1}  {name:15} {told(sample)}", flush=True)
    return runs


def told(sample: Sample) -> str:
    """A sample as a line."""
    return (
        f"{sample.all_us:5.1f} us ({sample.user_us:.1f} user)  {sample.tokens_per_s:,.0f}/s  "
        f"p50 {sample.p50_ms:.0f} p99 {sample.p99_ms:.0f} p999 {sample.p999_ms:.0f} ms  "
        f"{sample.events_per_read:.1f} a read  {sample.connection_kb:.1f} KB  "
        f"busy {sample.busy:.2f}, harness {sample.harness_busy:.2f}  faults {sample.faults}"
    )


def middle(samples: Sequence[Sample], figure: str) -> float:
    """The median of a figure."""
    return float(statistics.median(getattr(sample, figure) for sample in samples))


def ratio(runs: Runs, ours: str, other: str) -> float:
    """The median of the rounds' ratios in CPU for a token."""
    pairs = zip(runs[ours], runs[other], strict=True)
    return float(statistics.median(a.all_us / b.all_us for a, b in pairs))


def capacity(name: str, per_s: float, seconds: float, placement: Placement) -> tuple[Sample, list[Sample]]:
    """The largest load that is carried with a p99 age within AGE_MS_MAX, and all samples on the way."""
    streams, step, best, seen = 300.0, STEP, None, []
    is_up = True
    while step >= STEP_LEAST:
        sample = relayed(name, Cell(round(streams), per_s), seconds, placement)
        seen.append(sample)
        print(f"capacity  {name:15} {round(streams):5} streams  {told(sample)}", flush=True)
        carried = sample.tokens_per_s >= CARRIED_SHARE * round(streams) * per_s
        fits = carried and sample.p99_ms <= AGE_MS_MAX and not sample.faults
        if fits and (best is None or sample.tokens_per_s > best.tokens_per_s):
            best = sample
        if fits is not is_up:
            step, is_up = step**0.5, fits
        streams *= step if fits else 1 / step
    return best or seen[-1], seen


# The page


def page(
    runs: dict[Cell, Runs], over_tls: dict[Cell, Runs], fans: dict[Cell, Runs], most: dict[str, Sample], rounds: int
) -> str:
    """All figures as Markdown."""
    machine = rig.machine()
    parts = [
        "# The cost of a token at the pace of models\n",
        f"`make bench-pace`, {time.strftime('%Y-%m-%d')}: {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, Linux {machine['kernel']}, Python {machine['python']}; {rounds} interleaved "
        "rounds, medians. The contender has a core to itself, source and sink share another. Ages count from when a "
        "token was due. Loads are streams x tokens a second of each.\n",
    ]
    for cell, found in runs.items():
        parts += [f"## {cell}\n", _table(found)]
    for cell, found in over_tls.items():
        parts += [f"## Over TLS, {cell}\n", _table(found)]
    for cell, found in fans.items():
        parts += [f"## Fan-out, {cell}\n", _table(found)]
    if most:
        parts += [
            f"## Capacity of half a core\n\nThe most tokens a second, 25 of each stream, of which at least "
            f"{CARRIED_SHARE:.0%} arrive, at a p99 age of at most {AGE_MS_MAX:g} ms.\n",
            _table({name: [sample] for name, sample in most.items()}),
            "![cost against load](pace.svg)\n",
        ]
    return "\n".join(parts)


def _table(found: Runs) -> str:
    head = (
        "| | us a token | user | system | tokens/s | p50 ms | p99 ms | p999 ms | events a read | KB a stream | busy | "
        "harness | to C | to nginx |"
    )
    rows = [head, "|" + " --- |" * 14]
    for name, samples in found.items():
        figures = [
            *(f"{middle(samples, key):.1f}" for key in ("all_us", "user_us", "system_us")),
            f"{middle(samples, 'tokens_per_s'):,.0f}",
            *(f"{middle(samples, key):.0f}" for key in ("p50_ms", "p99_ms", "p999_ms")),
            *(f"{middle(samples, key):.1f}" for key in ("events_per_read", "connection_kb")),
            *(f"{middle(samples, key):.2f}" for key in ("busy", "harness_busy")),
            *(
                f"{ratio(found, name, other):.2f}" if len(found.get(other, ())) == len(samples) else ""
                for other in ("C", "nginx")
            ),
        ]
        rows.append(f"| {name} | " + " | ".join(figures) + " |")
    faults = {name: sum(sample.faults for sample in samples) for name, samples in found.items()}
    lost = ", ".join(f"{name} {count}" for name, count in faults.items() if count)
    return "\n".join(rows) + "\n" + (f"\nLost, doubled, refused or broken off: {lost}.\n" if lost else "")


def options_of(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8, help="measured in each run")
    parser.add_argument("--contenders", default=",".join(USUAL), help="default: %(default)s")
    parser.add_argument("--also", default="", help="contenders for a single round: envoy, caddy, aiohttp, fastapi")
    parser.add_argument("--cells", default=" ".join(f"{c.streams}x{c.per_s:g}" for c in CELLS), help="STREAMSxPER_S …")
    parser.add_argument("--tls", default="400x25", help="the same over TLS, for nginx and streamd")
    parser.add_argument("--fans", default="8000x5 2500x25", help="the same for readers of one stream")
    parser.add_argument("--capacity", default=",".join(IN_CAPACITY), help="contenders whose capacity is searched")
    parser.add_argument("--results", type=Path, help="folder for pace.md and pace.svg")
    return parser.parse_args(argv)


def cells_of(text: str) -> list[Cell]:
    """`400x25 1000x25`."""
    pairs = (part.split("x") for part in text.split())
    return [Cell(int(streams), float(per_s)) for streams, per_s in pairs]


def names_of(text: str) -> list[str]:
    """The contenders of a flag that are installed; the others are named and left out."""
    found = []
    for name in filter(None, text.split(",")):
        try:
            command_of(name, Path("/tmp"), 1, 2)
        except rig.Missing as missing:
            print(f"left out: {name} ({missing})")
        else:
            found.append(name)
    return found


def main(argv: Sequence[str]) -> int:
    """Measure all, print it, and write it down."""
    options = options_of(argv)
    own = os.sched_getaffinity(0)
    runs: dict[Cell, Runs] = {}
    try:
        for cell in cells_of(options.cells):
            names = [name for name in names_of(options.contenders) if cell.per_s > 10 or name not in FAST_ONLY]
            runs[cell] = in_rounds(names, cell, options.rounds, options.seconds)
            runs[cell] |= in_rounds(names_of(options.also), cell, 1, options.seconds)
        over_tls = {
            cell: in_rounds(names_of(",".join(OVER_TLS)), cell, options.rounds, options.seconds, secured)
            for cell in cells_of(options.tls)
        }
        fans = {}
        for cell in cells_of(options.fans):
            names = ["C", "streamd 0" if cell.per_s <= 10 else "streamd 50 ms"]
            fans[cell] = in_rounds(names, cell, options.rounds, options.seconds, fanned_out)
        most: dict[str, Sample] = {}
        curves: dict[str, list[tuple[float, float]]] = {}
        with half_a_core() as placement:
            for name in names_of(options.capacity):
                most[name], seen = capacity(name, 25, options.seconds, placement)
                curves[name] = sorted((sample.tokens_per_s, sample.all_us) for sample in seen)
    finally:
        os.sched_setaffinity(0, own)
    text = page(runs, over_tls, fans, most, options.rounds)
    print(text)
    if options.results:
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "pace.md").write_text(text)
        if curves:
            title, note = "CPU for a token (us) against load", "tokens a second on half a core; less is better"
            drawn = lines(title, note, curves, x_step=5000, y_step=10)
            (options.results / "pace.svg").write_text(drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
