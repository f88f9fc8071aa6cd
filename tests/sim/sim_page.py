"""The page of long searches: each search with `--page` adds its part, so that many short parts make a long search."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).parents[2]

# The pages of the repository, by the target that makes them.
PAGES = {
    "sim": "tests/sim/RESULTS.md",
    "sim-moves": "tests/sim/RESULTS-MOVES.md",
    "sim-nodes": "tests/sim/RESULTS-NODES.md",
}
TITLES = {"sim": "", "sim-moves": ", with moves of units", "sim-nodes": ", over a cluster of nodes"}

_PART = re.compile(r"^\| (\S+) \| (\d+) to (\d+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \|$", re.MULTILINE)
_COUNT = re.compile(r"^\| ([^|]+) \| ([\d,]+) \|$", re.MULTILINE)


class Part(NamedTuple):
    """A search that broke no rule."""

    commit: str
    first_seed: int
    last_seed: int
    run_steps: int  # asked for of each seed
    steps: int  # played in all: a seed goes on until all its streams have ended
    minutes: float  # of a single process


def commit() -> str:
    """The commit of the code that is simulated, with -dirty behind it if the code differs from it."""
    code = ("streamd", "tests/sim/*.py", "tests/model_engine.py")
    differs = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *code], cwd=PROJECT, check=False).returncode
    command = ["git", "rev-parse", "--short=7", "HEAD"]
    name = subprocess.run(command, cwd=PROJECT, capture_output=True, check=True, text=True).stdout.strip()
    return f"{name}-dirty" if differs else name


def machine() -> str:
    """The processors, by number and name."""
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{os.cpu_count()} vCPU {names[0] if names else ''}".rstrip()


def add(page: Path, target: str, part: Part, seen: Counter[str], situations: Sequence[str]) -> None:
    """Add a part of `make target` and its situations to the page, which is begun if there is none."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    parts, counted = read(text)
    page.write_text(written(target, [*parts, part], counted + seen, situations), encoding="utf-8")


def read(text: str) -> tuple[list[Part], Counter[str]]:
    """The parts of a page, and the sums of its situations."""
    parts = [
        Part(row[0], int(row[1]), int(row[2]), _number(row[3]), _number(row[4]), float(row[5]))
        for row in _PART.findall(text)
    ]
    return parts, Counter({name: _number(count) for name, count in _COUNT.findall(text)})


def _number(text: str) -> int:
    return int(text.replace(",", ""))


def written(target: str, parts: Sequence[Part], seen: Counter[str], situations: Sequence[str]) -> str:
    """The page as Markdown."""
    steps, minutes = sum(part.steps for part in parts), sum(part.minutes for part in parts)
    seeds = sum(part.last_seed - part.first_seed + 1 for part in parts)
    commits = list(dict.fromkeys(part.commit for part in parts))
    of = commits[0] if len(commits) == 1 else f"{commits[0]} to {commits[-1]}"
    missed = [name for name in situations if not seen[name]]
    lines = [
        f"# The simulator's searches{TITLES[target]}",
        "",
        f"`make {target} ARGS='--page {PAGES[target]}'` adds a part to this page.",
        f"streamd at {of}, on {machine()}, beside other work.",
        "",
        f"- {steps:,} steps of {seeds:,} seeds in {len(parts)} parts, without a violation",
        f"- {steps / minutes / 1e6:.2f} million steps a minute and process",
        f"- {len(situations) - len(missed)} of {len(situations)} situations were reached"
        f"{': not ' + '; '.join(missed) if missed else ''}",
        "",
        "A row's seeds and their steps play the same search again, on that commit:",
        f"`make {target} STEPS=… ARGS='--first-seed … --run-steps …'`.",
        "",
        "| commit | seeds | steps asked for of each | steps played | minutes |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {part.commit} | {part.first_seed} to {part.last_seed} | {part.run_steps:,} | {part.steps:,} "
            f"| {part.minutes:.2f} |"
            for part in parts
        ),
        "",
        "| situation | times |",
        "| --- | --- |",
        *(f"| {name} | {seen[name]:,} |" for name in situations),
    ]
    return "\n".join(lines) + "\n"
