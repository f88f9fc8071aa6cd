"""Measures the figures that streamd promises: a scenario per run, its figures with their targets, and JSON.

    headline.py SCENARIO [flags]         headline.py SCENARIO --help lists them; the defaults are the official values
    headline.py all [--results FOLDER]   all in turn, with a JSON file each

Each runs streamd as a separate process, with C programs as upstream and readers where Python would cost too much, and
measures it from outside. The exit status is 1 if a target was missed; it is 0 otherwise, and if a tool is missing (cc,
ss, nginx). Run no other program meanwhile: two cores carry all of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import cost
import crowd
import leaving
import memory
import rig
from figures import Report, Scenario

SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario for scenario in (*memory.SCENARIOS, *crowd.SCENARIOS, *cost.SCENARIOS, *leaving.SCENARIOS)
}


def options_of(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="scenario", metavar="SCENARIO", required=True)
    for name, scenario in SCENARIOS.items():
        one = commands.add_parser(
            name, help=scenario.promise, description=scenario.promise,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )  # fmt: skip
        scenario.flags(one)
        one.add_argument("--json", type=Path, help="write the report there too")
    every = commands.add_parser("all", help="every scenario with its defaults")
    every.add_argument("--results", type=Path, default=rig.HERE / "results")
    return parser.parse_args(argv)


def run_one(scenario: Scenario, options: argparse.Namespace) -> int:
    """Measure, print, write; return the exit status."""
    print(f"{scenario.name}: {scenario.promise}", flush=True)
    report = Report(scenario.name)
    begun_s = time.monotonic()
    try:
        scenario.run(options, report)
    except rig.Missing as missing:
        print(f"skipped: {missing}")
        return 0
    flags = {key: value for key, value in vars(options).items() if key not in ("scenario", "json")}
    line = report.line(flags=flags, took_s=round(time.monotonic() - begun_s, 1), machine=rig.machine())
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(json.loads(line), indent=1) + "\n")
    print(line)
    return int(not report.all_hold)


def run_all(results: Path) -> int:
    """Run each scenario in its own process, so that no scenario inherits another's leftovers."""
    statuses = {}
    for name in SCENARIOS:
        argv = [sys.executable, __file__, name, "--json", str(results / f"headline-{name}.json")]
        statuses[name] = subprocess.run(argv).returncode
    print("".join(f"{'ok     ' if not status else 'FAILED '} {name}\n" for name, status in statuses.items()), end="")
    return int(any(statuses.values()))


def main(argv: list[str]) -> int:
    """Run the scenario of the command line, or all."""
    options = options_of(argv)
    if options.scenario == "all":
        return run_all(options.results)
    return run_one(SCENARIOS[options.scenario], options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
