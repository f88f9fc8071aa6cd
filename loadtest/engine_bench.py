"""Everything that an engine costs, against its bounds: CPU, the readers' latency through faults, memory, resumes.

    engine_bench.py [cost] [faults] [memory] [resume] [--rounds 15] [--before COMMIT|DIR] [--results FOLDER] [--add]

Node a has a core to itself; the source, the readers, the engine and node b share another. All kinds of run take turns
in each round, in alternating order, and ratios are taken within a round. `--add` adds rounds to those that the
folder's engine.json has, so that many short runs make one long run. Run no other program meanwhile.

    cost     2,000 streams of 10 tokens a second at node a: CPU a token without an engine, at --before and here; with an
             engine; and with a tenth of the streams read at node b. How much later their tokens come there
    faults   1,000 such streams: the age of tokens at the readers of node a while the engine stalls for 5 s, is killed,
             comes back empty, and is emptied
    memory   bytes of a 500-token stream in the engine, and of a copy in its owner (loadtest/engine_cost.py)
    resume   2,000 readers of node a, of finished and of running streams, come to node b at once; and when a was killed
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import engine_cost
import rig
from engine_rig import HARNESS_CORE, NODE_CORE, PROJECT, EngineProcess, engine, node
from figures import Report

PER_S = 10
RAMP_PER_S = 500.0
WARM_S = 3.0

COST_STREAMS = 2000
FOLLOWED_SHARE = 10
FAULT_STREAMS = 1000
FAULT_WINDOW_S = 12.0
FAULT_AFTER_S = 1.5
STALL_S = 5.0
EMPTY_AFTER_S = 1.5
RESUMED_STREAMS = 2000

Sample = dict[str, float]
Round = dict[str, Sample]


def sources(before: str) -> Iterator[Path]:
    """The source of --before, unpacked for the length of a generator."""
    if Path(before, "streamd").is_dir():
        yield Path(before).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="streamd-before-") as folder:
        packed = subprocess.run(["git", "archive", before], cwd=PROJECT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=packed, check=True)
        yield Path(folder)


def readers(running: rig.Rig, what: str, **options: object) -> subprocess.Popen[bytes]:
    """Start engine_readers.py on the harness's core."""
    flags = [f"--{name}={value}" for name, value in options.items()]
    script = str(Path(__file__).with_name("engine_readers.py"))
    process = subprocess.Popen([sys.executable, script, what, *flags], stdout=subprocess.PIPE)
    running.processes.append(process)
    return process


def told(process: subprocess.Popen[bytes], word: str) -> None:
    """Wait for a line of engine_readers.py. Raises RuntimeError if it ends instead."""
    assert process.stdout is not None
    if process.stdout.readline().strip() != word.encode():
        raise RuntimeError(f"the readers didn't come to {word!r}")


# Cost


def cost_run(kind: str, before: Path | None, seconds: float, streams: int) -> Sample:
    """A window of streams: `before` and `off` without an engine, `on` with one, `followed` by a second node."""
    with rig.rig() as running, contextlib.ExitStack() as stack:
        os.sched_setaffinity(0, {HARNESS_CORE})
        upstream = running.source(PER_S, due=True)
        server = stack.enter_context(engine(running.folder)) if kind in ("on", "followed") else None
        shared = () if server is None else ("--engine", server.url)
        source = before if kind == "before" and before is not None else PROJECT
        own = () if server is None else ("--node", "a")
        pid, port = node(running, "a", upstream, *shared, *own, source=source, core=NODE_CORE)
        other_pid, other_port = 0, 0
        if kind == "followed":
            other_pid, other_port = node(running, "b", upstream, *shared, "--node", "b", core=HARNESS_CORE)
        followed = streams // FOLLOWED_SHARE
        idle_bytes = rig.pss_bytes(pid)
        settle_s = streams / RAMP_PER_S
        few = readers(running, "follow", a=port, b=other_port, streams=followed, settle=settle_s, seconds=seconds)
        told(few, "opened")
        sink = running.sink(port=port, readers=streams - followed, ramp=RAMP_PER_S, warm=WARM_S, seconds=seconds)
        told(few, "begin")
        before_look, engine_s = rig.look(pid), server.cpu_s() if server else 0.0
        other_s = sum(rig.cpu_s(other_pid)) if other_pid else 0.0
        time.sleep(seconds * 0.9)
        after_look, engine_s = rig.look(pid), (server.cpu_s() if server else 0.0) - engine_s
        other_s = (sum(rig.cpu_s(other_pid)) if other_pid else 0.0) - other_s
        few_seen, seen = rig.result(few, seconds + 60), rig.result(sink, seconds + 60)
        window_s = after_look.at_s - before_look.at_s
        tokens = (seen["tokens_per_s"] + few_seen["tokens_per_s"]) * window_s
        cpu_s = after_look.user_s + after_look.system_s - before_look.user_s - before_look.system_s
        keys = ("lost", "doubled", "not_200", "closed")
        return {
            "us_a_token": cpu_s / tokens * 1e6,
            "tokens_per_s": tokens / window_s,
            "p50_ms": seen["age_ms"]["p50"],
            "p99_ms": seen["age_ms"]["p99"],
            "kb_a_stream": (after_look.pss_bytes - idle_bytes) / streams / 1024,
            "engine_us_a_token": engine_s / tokens * 1e6,
            "follower_us_a_token": other_s / max(1.0, few_seen["followed_per_s"] * window_s) * 1e6,
            "followed_per_s": few_seen["followed_per_s"],
            "added_p50_ms": few_seen["added_ms"]["p50"],
            "added_p99_ms": few_seen["added_ms"]["p99"],
            "faults": sum(seen[key] + few_seen[key] for key in keys),
        }


# Faults


def stall(server: EngineProcess) -> None:
    server.signal(signal.SIGSTOP)
    time.sleep(STALL_S)
    server.signal(signal.SIGCONT)


def come_back_empty(server: EngineProcess) -> None:
    server.kill()
    time.sleep(EMPTY_AFTER_S)
    server.start()


FAULTS: dict[str, Callable[[EngineProcess], object]] = {
    "healthy": lambda server: None,
    "stalled 5 s": stall,
    "killed": EngineProcess.kill,
    "back empty": come_back_empty,
    "emptied": lambda server: server.ask("FLUSHALL"),
}


def fault_run(kind: str) -> Sample:
    """The age of tokens at node a's own readers while the engine has a fault; `off`: without an engine."""
    with rig.rig() as running, contextlib.ExitStack() as stack:
        os.sched_setaffinity(0, {HARNESS_CORE})
        upstream = running.source(PER_S, due=True)
        server = stack.enter_context(engine(running.folder)) if kind != "off" else None
        flags = () if server is None else ("--engine", server.url, "--node", "a")
        _, port = node(running, "a", upstream, *flags, core=NODE_CORE)
        sink = running.sink(port=port, readers=FAULT_STREAMS, ramp=RAMP_PER_S, warm=WARM_S, seconds=FAULT_WINDOW_S)
        time.sleep(FAULT_STREAMS / RAMP_PER_S + WARM_S + FAULT_AFTER_S)
        if server is not None:
            thread = threading.Thread(target=FAULTS[kind], args=(server,))
            thread.start()
            thread.join()
        seen = rig.result(sink, FAULT_WINDOW_S + 60)
        ages = seen["age_ms"]
        wrong = sum(seen[key] for key in ("lost", "doubled", "not_200", "failed", "closed"))
        return {**{f"{name}_ms": ages[name] for name in ("p50", "p99", "p999", "max")}, "faults": wrong}


# Memory, and resumes


def memory_run(kind: str) -> Sample:
    """loadtest/engine_cost.py, in a process of its own."""
    script = str(Path(engine_cost.__file__))
    said = subprocess.run([sys.executable, script, "--json"], check=True, capture_output=True, cwd=PROJECT).stdout
    found: Sample = json.loads(said.splitlines()[-1])
    return found


def resume_run(kind: str) -> Sample:
    """2,000 readers of node a come to node b, which has a core to itself."""
    with rig.rig() as running, engine(running.folder) as server:
        os.sched_setaffinity(0, {HARNESS_CORE})
        upstream = running.source(PER_S)
        flags = (
            "--engine",
            server.url,
            "--resume-grace",
            "60s",
            "--detach-grace",
            "60s",
            "--detached-max",
            str(RESUMED_STREAMS),
        )
        pid, port = node(running, "a", upstream, *flags, "--node", "a", core=HARNESS_CORE)
        _, other_port = node(running, "b", upstream, *flags, "--node", "b", core=NODE_CORE)
        kill = ",".join(map(str, rig.tree(pid))) if kind == "of a killed node" else ""
        crowd = readers(running, "resume", a=port, b=other_port, streams=RESUMED_STREAMS, kill=kill)
        seen = rig.result(crowd, 180)
        if seen["refusals"]:
            print(f"node b refused: {seen['refusals']}", flush=True)
        wrong = sum(seen[key] for key in ("missing", "lost", "doubled", "not_200"))
        kinds = {
            f"{group}_{name}_ms": seen[group][name] for group in ("finished", "running") for name in ("p50", "max")
        }
        all_ms = max(seen["finished"]["max"], seen["running"]["max"])
        return {"all_s": all_ms / 1000, **kinds, "faults": wrong}


# The report

PARTS: dict[str, tuple[tuple[str, ...], Callable[..., Sample]]] = {
    "cost": (("before", "off", "on", "followed"), cost_run),
    "faults": (("off", *FAULTS), fault_run),
    "memory": (("memory",), memory_run),
    "resume": (("of a living node", "of a killed node"), resume_run),
}

Spread = tuple[float, float, float]


def spread(values: Sequence[float]) -> Spread:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def within(rounds: list[Round], kind: str, other: str, key: str, of: Callable[[float, float], float]) -> list[float]:
    """A comparison of two kinds in each round that has both."""
    return [of(each[kind][key], each[other][key]) for each in rounds if kind in each and other in each]


def ratio(one: float, other: float) -> float:
    return one / other if other else float("nan")


class Page:
    """The rows of engine.md, each judged against its bound."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.lines: list[str] = []

    def head(self, title: str) -> None:
        """A section with its table."""
        self.lines += [f"\n## {title}\n", "| | bound | median | quartiles | |", "| --- | --- | --- | --- | --- |"]

    def row(self, name: str, values: Sequence[float], bound: float | None = None, *, digits: int = 2) -> None:
        """A figure of all rounds; with a bound its median is judged."""
        if not values:
            return
        low, middle, high = spread(values)
        if bound is None:
            self._report.tell(name, round(middle, digits))
        else:
            self._report.at_most(name, round(middle, digits + 1), bound)
        held = "" if bound is None else "met" if self._report.holds[name] else "**missed**"
        limit = "" if bound is None else f"≤ {bound:,g}"
        self.lines.append(
            f"| {name} | {limit} | {middle:,.{digits}f} | {low:,.{digits}f} to {high:,.{digits}f} | {held} |"
        )

    def faults(self, part: str, rounds: list[Round]) -> None:
        """Tokens lost or doubled, and readers refused or broken off, over all runs."""
        self._report.exactly(f"{part}: lost, doubled, refused or broken off", _wrong(rounds), 0)
        self.lines.append(f"\nLost, doubled, refused or broken off in all runs: {_wrong(rounds):g}.")


def _wrong(rounds: list[Round]) -> float:
    return sum(sample.get("faults", 0) for each in rounds for sample in each.values())


def cost_page(page: Page, rounds: list[Round]) -> None:
    """Rows of the part `cost`."""
    page.head(f"CPU of a token at its node, {COST_STREAMS:,} streams of {PER_S} tokens a second ({len(rounds)} rounds)")
    named = {
        "before": "before",
        "off": "no engine",
        "on": "an engine, nothing followed",
        "followed": "a tenth followed",
    }
    for kind, name in named.items():
        page.row(f"{name}, us a token", [each[kind]["us_a_token"] for each in rounds if kind in each])
    key = "us_a_token"
    page.row("no engine / before", within(rounds, "off", "before", key, ratio), 1.01, digits=3)
    page.row("nothing followed / no engine", within(rounds, "on", "off", key, ratio), 1.04, digits=3)
    page.row("a tenth followed / no engine", within(rounds, "followed", "off", key, ratio), 1.10, digits=3)
    followed = [each["followed"] for each in rounds if "followed" in each]
    page.row("added at the other node, p50, ms", [each["added_p50_ms"] for each in followed], 20)
    page.row("added at the other node, p99, ms", [each["added_p99_ms"] for each in followed], 40)
    page.row("follower's CPU, us a followed token", [each["follower_us_a_token"] for each in followed])
    for kind in ("on", "followed"):
        page.row(
            f"engine's CPU, us a token, {named[kind]}",
            [each[kind]["engine_us_a_token"] for each in rounds if kind in each],
        )
    page.faults("cost", rounds)


def faults_page(page: Page, rounds: list[Round]) -> None:
    """Rows of the part `faults`."""
    page.head(f"Age of a token at its node's readers, {FAULT_STREAMS:,} streams, through faults ({len(rounds)} rounds)")
    for key in ("p50_ms", "p99_ms", "p999_ms"):
        page.row(f"no engine, {key}", [each["off"][key] for each in rounds if "off" in each])
    for kind in FAULTS:
        page.row(f"engine {kind}: p99 / no engine", within(rounds, kind, "off", "p99_ms", ratio), 1.1)
        page.row(f"engine {kind}: p99.9 beyond it, ms", within(rounds, kind, "off", "p999_ms", lambda a, b: a - b), 10)
    page.faults("faults", rounds)


def memory_page(page: Page, rounds: list[Round]) -> None:
    """Rows of the part `memory`."""
    page.head(f"Memory ({len(rounds)} rounds)")
    found = [each["memory"] for each in rounds]
    page.row("a 500-token stream in the engine, B", [each["copy_bytes"] for each in found], digits=0)
    page.row("the same as raw events, B", [each["raw_bytes"] for each in found], digits=0)
    page.row("copy / raw events", [each["copy_bytes"] / each["raw_bytes"] for each in found], 1 / 15, digits=3)
    page.row("a copy in its owner, B", [each["owned_bytes"] for each in found], 250, digits=0)
    page.row("engine's CPU, copies / an entry a token", [each["engine_ratio"] for each in found], 0.2)


def resume_page(page: Page, rounds: list[Round]) -> None:
    """Rows of the part `resume`."""
    page.head(f"{RESUMED_STREAMS:,} readers come to another node at once ({len(rounds)} rounds)")
    for kind in ("of a living node", "of a killed node"):
        some = [each[kind] for each in rounds if kind in each]
        page.row(f"readers {kind}: all, s", [each["all_s"] for each in some], 2)
        for group in ("finished", "running"):
            page.row(f"{group} streams {kind}: p50, ms", [each[f"{group}_p50_ms"] for each in some], digits=0)
    page.faults("resume", rounds)


PAGES = {"cost": cost_page, "faults": faults_page, "memory": memory_page, "resume": resume_page}


def shown(part: str, kind: str, number: int, sample: Sample) -> str:
    """A sample as a line."""
    return f"{part} round {number} {kind:17} " + "  ".join(f"{key} {value:.4g}" for key, value in sample.items())


def measure(part: str, rounds: int, options: argparse.Namespace) -> list[Round]:
    """All kinds of a part, once in each round, in alternating order."""
    kinds, run = PARTS[part]
    found: list[Round] = []
    with contextlib.ExitStack() as stack:
        more: tuple[Any, ...] = ()
        if part == "cost":
            before = stack.enter_context(contextlib.contextmanager(sources)(options.before)) if options.before else None
            kinds = tuple(kind for kind in kinds if before or kind != "before")
            more = (before, options.seconds, options.streams)
        if options.only:
            kinds = tuple(kind for kind in kinds if kind in ("off", "memory") or options.only in kind)
        for number in range(rounds):
            found.append({})
            for kind in kinds if number % 2 == 0 else kinds[::-1]:
                found[-1][kind] = run(kind, *more)
                print(shown(part, kind, number + 1, found[-1][kind]), flush=True)
    return found


def main() -> int:
    """Measure, judge, and write loadtest/results/engine.md and .json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="default: all of them")
    parser.add_argument("--rounds", type=int, default=15, help="of cost; a third as many of the others [%(default)s]")
    parser.add_argument("--seconds", type=float, default=8, help="of a window of cost [%(default)s]")
    parser.add_argument("--streams", type=int, default=COST_STREAMS, help="of cost [%(default)s]")
    parser.add_argument("--before", default="", help="a commit, or the source of another version, for `cost`")
    parser.add_argument("--only", default="", help="kinds of run with this text in their name, and `off`")
    parser.add_argument("--results", type=Path, help="folder for engine.md and engine.json")
    parser.add_argument("--add", action="store_true", help="add to the rounds in the folder's engine.json")
    options = parser.parse_args()
    parts = options.parts or list(PARTS)
    if wrong := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(wrong)}; there are {', '.join(PARTS)}")
    own = os.sched_getaffinity(0)
    store = options.results / "engine.json" if options.results else None
    rounds: dict[str, list[Round]] = {}
    if store is not None and store.exists():
        rounds = json.loads(store.read_text())["rounds"]
    try:
        for part in parts:
            count = options.rounds if part == "cost" else max(1, options.rounds // 3)
            earlier = rounds.get(part, []) if options.add else []
            rounds[part] = earlier + measure(part, count, options)
    except rig.Missing as missing:
        print(missing, file=sys.stderr)
        return 2
    finally:
        os.sched_setaffinity(0, own)
    report = Report("engine")
    page = Page(report)
    for part in (part for part in PARTS if part in rounds):
        PAGES[part](page, rounds[part])
    machine = rig.machine()
    intro = (
        "# What an engine costs\n\n"
        f"`make bench-engine`, {time.strftime('%Y-%m-%d')}: {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, Linux {machine['kernel']}, Python {machine['python']}. Kinds of run take turns "
        "in each round, and ratios are taken within a round. Node a has a core to itself; source, readers, engine and "
        "node b share another. Tokens are chat chunks of some 200 bytes, write_interval is 0.\n"
    )
    text = intro + "\n".join(page.lines) + "\n"
    if options.results:
        assert store is not None
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "engine.md").write_text(text)
        store.write_text(json.dumps({"machine": machine, "rounds": rounds}, indent=1) + "\n")
    print(report.line())
    return 0 if report.all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
