"""Scenarios about the cost of a token: with few and many streams, beside nginx and C, and in a fan-out.

CPU is user and system time of the whole process tree in a window with all readers connected, divided by the tokens that
the readers got in it. Ratios are taken within a round, then their median, since a machine's speed drifts."""

from __future__ import annotations

import argparse
import functools
import http.client
import json
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import contenders
import rig
import target
from figures import Report, Scenario, quantile, spread_of
from probe import Probes

FLAT_RATIO_MAX = 1.25
NGINX_RATIO_MAX, FLOOR_RATIO_MAX = 1.3, 2.0
FANOUT_RATIO_MAX, FANOUT_AGE_RATIO_MAX = 1.25, 1.35
HEALTH_MS_MAX = 100.0

# Interval of health checks. Each costs streamd as much as about ten events: 25 a second are under 1 % of 40,000.
HEALTH_EVERY_S = 0.04

WARM_S = 3.0  # time from the last connection to the window


@dataclass(frozen=True)
class Cost:
    """The cost and the age of a server's tokens."""

    user_us: float
    system_us: float
    tokens_per_s: float
    age_p50_ms: float
    age_p99_ms: float
    lost: int  # also doubled, refused, closed: any of these makes the run's figures invalid

    @property
    def all_us(self) -> float:
        """User and system time per token."""
        return self.user_us + self.system_us

    @property
    def told(self) -> dict[str, float]:
        """The figures for the report."""
        return {key: round(value, 3) for key, value in asdict(self).items()} | {"all_us": round(self.all_us, 3)}


def measured(pid: int, sink: subprocess.Popen[bytes], until_window_s: float, window_s: float) -> Cost:
    """Measure a server over nine tenths of the sink's window; the sink reports the number of tokens."""
    time.sleep(until_window_s)
    before = rig.look(pid)
    time.sleep(window_s * 0.9)
    after = rig.look(pid)
    seen = rig.result(sink, window_s + 60)
    tokens = seen["tokens_per_s"] * (after.at_s - before.at_s)
    return Cost(
        user_us=(after.user_s - before.user_s) / tokens * 1e6,
        system_us=(after.system_s - before.system_s) / tokens * 1e6,
        tokens_per_s=seen["tokens_per_s"],
        age_p50_ms=seen["age_ms"]["p50"],
        age_p99_ms=seen["age_ms"]["p99"],
        lost=seen["lost"] + seen["doubled"] + seen["not_200"] + seen["failed"] + seen["closed"],
    )


def relayed(pid: int, running: rig.Rig, port: int, streams: int, options: argparse.Namespace) -> Cost:
    """The cost with `streams` readers, each with its own stream."""
    sink = running.sink(port=port, readers=streams, ramp=options.ramp, warm=WARM_S, seconds=options.seconds)
    return measured(pid, sink, streams / options.ramp + WARM_S, options.seconds)


def in_rounds(report: Report, rounds: int, contestants: Mapping[str, Callable[[], Cost]]) -> dict[str, list[Cost]]:
    """Run every contestant once in each round, in alternating order."""
    runs: dict[str, list[Cost]] = {name: [] for name in contestants}
    for number in range(rounds):
        order = list(contestants) if number % 2 == 0 else list(contestants)[::-1]
        for name in order:
            cost = contestants[name]()
            runs[name].append(cost)
            report.tell(f"round_{number + 1}_{name}", cost.told)
    for name, costs in runs.items():
        for part in ("user_us", "system_us", "all_us"):
            report.tell(f"{name}_{part}", round(statistics.median(getattr(cost, part) for cost in costs), 2))
    report.exactly("lost_or_refused", sum(cost.lost for costs in runs.values() for cost in costs), 0)
    return runs


def ratio(runs: dict[str, list[Cost]], ours: str, other: str, figure: str = "all_us") -> float:
    """The median of the rounds' ratios in a figure."""
    pairs = zip(runs[ours], runs[other], strict=True)
    return float(statistics.median(getattr(a, figure) / getattr(b, figure) for a, b in pairs))


def round_flags(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add the flags that all scenarios about rounds have."""
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--seconds", type=float, default=8, help="measured in each run")
    parser.add_argument("--ramp", type=float, default=1000, help="connections opened a second")


# Few and many


def flat_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of flat-cost."""
    round_flags(parser, 5)
    parser.add_argument("--many", type=int, default=8000, help="streams; one worker, two descriptors each")
    parser.add_argument("--few", type=int, default=500)
    parser.add_argument(
        "--tokens-per-second", type=float, default=8000, help="of all streams together, with few and with many"
    )
    parser.add_argument("--workers", type=int, default=1)


def flat_cost(options: argparse.Namespace, report: Report) -> None:
    """Compare the same number of tokens per second over many streams and over few."""

    def with_streams(streams: int) -> Cost:
        with rig.rig() as running:
            upstream = running.source(options.tokens_per_second / streams)
            daemon = target.start(running, upstream, workers=options.workers)
            return relayed(daemon.pid, running, daemon.port, streams, options)

    report.tell("workers", options.workers)
    contestants = {"many": lambda: with_streams(options.many), "few": lambda: with_streams(options.few)}
    runs = in_rounds(report, options.rounds, contestants)
    report.tell("tokens_per_s_ratio", ratio(runs, "many", "few", "tokens_per_s"))
    report.tell("user_ratio", ratio(runs, "many", "few", "user_us"))
    report.tell("system_ratio", ratio(runs, "many", "few", "system_us"))
    report.at_most("cpu_per_token_many_to_few", ratio(runs, "many", "few"), FLAT_RATIO_MAX)


# Beside others


def relay_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of relay-cost."""
    round_flags(parser, 5)
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--per-second", type=float, default=10, help="tokens of each stream")


def relay_cost(options: argparse.Namespace, report: Report) -> None:
    """Compare streamd, nginx and a relay in C that doesn't parse."""

    def through(name: str) -> Cost:
        with rig.rig() as running:
            upstream = running.source(options.per_second)
            if name == "streamd":
                daemon = target.start(running, upstream)
                pid, port = daemon.pid, daemon.port
            else:
                port = rig.free_port()
                argv = (
                    [rig.build("relay_floor"), str(port), str(upstream)]
                    if name == "floor"
                    else contenders.nginx(running.folder, port, upstream)
                )
                pid = running.start(name, argv, port)
            return relayed(pid, running, port, options.streams, options)

    rig.build("relay_floor")
    report.tell("nginx", contenders.version("nginx"))
    contestants = {name: functools.partial(through, name) for name in ("streamd", "nginx", "floor")}
    runs = in_rounds(report, options.rounds, contestants)
    for other, bound in (("nginx", NGINX_RATIO_MAX), ("floor", FLOOR_RATIO_MAX)):
        report.at_most(f"cpu_per_token_to_{other}", ratio(runs, "streamd", other), bound)


# Fan-out


def fanout_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of fanout-health."""
    round_flags(parser, 3)
    parser.add_argument("--readers", type=int, default=8000, help="of the published stream")
    parser.add_argument("--per-second", type=float, default=5, help="events")


def fanout_health(options: argparse.Namespace, report: Report) -> None:
    """A published stream with many readers, beside the smallest cost in C, with health checks meanwhile."""
    health_ms: list[float] = []
    failures: list[int] = []

    def floor() -> Cost:
        with rig.rig() as running:
            port = rig.free_port()
            argv = [rig.build("fanout_floor"), str(port), f"{1000 / options.per_second:.0f}", str(options.readers)]
            pid = running.start("floor", argv, port)
            return fanned_out(pid, running, port, options, lambda: None)

    def streamd() -> Cost:
        with rig.rig() as running:
            daemon = target.start(running, rig.free_port())
            publisher = Publisher(daemon.port, options.per_second)
            with Probes(daemon.port, fresh=False, every_s=HEALTH_EVERY_S) as probes:
                cost = fanned_out(daemon.pid, running, daemon.port, options, publisher.start)
                now_s = time.monotonic()
                health_ms.extend(probes.kept.within(now_s - options.seconds, now_s))
            failures.append(probes.kept.failures)
            publisher.stop()
            return cost

    runs = in_rounds(report, options.rounds, {"streamd": streamd, "floor": floor})
    for name, figure in spread_of("health_kept", health_ms).items():
        report.tell(name, figure)
    report.exactly("health_kept_failures", sum(failures), 0)
    report.at_most("health_kept_p99_of_all_rounds_ms", quantile(health_ms, 0.99), HEALTH_MS_MAX)
    report.at_most("cpu_per_event_to_floor", ratio(runs, "streamd", "floor"), FANOUT_RATIO_MAX)
    age = ratio(runs, "streamd", "floor", "age_p99_ms")
    report.at_most("age_p99_to_floor", age, FANOUT_AGE_RATIO_MAX)


def fanned_out(pid: int, running: rig.Rig, port: int, options: argparse.Namespace, begin: Callable[[], None]) -> Cost:
    """Readers of the same stream; the first event is published when all are connected, so that no reader misses any."""
    opening_s, warm_s = options.readers / options.ramp, 2 + WARM_S
    sink = running.sink(
        port=port, readers=options.readers, ramp=options.ramp, warm=warm_s, seconds=options.seconds,
        method="GET", path=f"/v1/streams/{Publisher.NAME}", body="",
    )  # fmt: skip
    time.sleep(opening_s + 1)
    begin()
    return measured(pid, sink, warm_s - 1, options.seconds)


class Publisher:
    """Publishes events at a steady pace from a thread: tokens with their number and time, as in source.c."""

    NAME = "fanout"

    def __init__(self, port: int, per_s: float) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self._interval_s = 1 / per_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._ask("PUT", "", "application/json", "{}")

    def start(self) -> None:
        """Begin to publish."""
        self._thread.start()

    def stop(self) -> None:
        """Stop publishing."""
        self._stopping.set()
        self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        due_s = time.monotonic()
        number = 0
        while not self._stopping.wait(max(0.0, due_s - time.monotonic())):
            self._ask("POST", "/events", "application/x-ndjson", self._chunk(number))
            number += 1
            due_s += self._interval_s

    @staticmethod
    def _chunk(number: int) -> str:
        delta = {"content": f"@{number}.{time.monotonic_ns()} "}
        fields: dict[str, Any] = {"id": "chatcmpl-8f2c1e7a9b", "object": "chat.completion.chunk", "created": 1763800000}
        fields |= {"model": "synthetic", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        return json.dumps(fields, separators=(",", ":")) + "\n"

    def _ask(self, method: str, path: str, kind: str, body: str) -> None:
        self._connection.request(method, f"/v1/streams/{self.NAME}{path}", body, {"Content-Type": kind})
        answer = self._connection.getresponse()
        said = answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"publishing: {answer.status} {said!r}")


SCENARIOS = (
    Scenario(
        "flat-cost",
        f"CPU per token at 8,000 streams is at most {FLAT_RATIO_MAX} times that at 500, at the same tokens a second",
        flat_flags,
        flat_cost,
    ),
    Scenario(
        "relay-cost",
        f"CPU per relayed token: at most {NGINX_RATIO_MAX} times nginx's, {FLOOR_RATIO_MAX:g} times a bare C relay's",
        relay_flags,
        relay_cost,
    ),
    Scenario(
        "fanout-health",
        f"8,000 readers of one stream: health within {HEALTH_MS_MAX:g} ms, CPU and age near the least that C can do",
        fanout_flags,
        fanout_health,
    ),
)
