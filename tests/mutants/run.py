"""Run the mutants: `run.py [PATTERN]` reports for each the test that kills it, and whether the simulator finds it.

Each mutant lives in a temporary copy of the working tree, so nothing is edited here and a crash leaves nothing behind.
PYTHONPATH names the copy, for tests and for the daemons that tests start; canaries, which can't even be imported, prove
that the copy is run. A test counts only if it passes on the clean copy and fails on the mutant a second time, by
itself: on a busy machine a test may fail once for other reasons. The simulator's seeds have to pass there, too.

With --page each outcome renews its row in RESULTS.md at once, so that parts make a whole run. A test that killed the
mutant before is tried before all others. The exit status is 1 if a mutant survived its tests and has no reason.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import mutants_page
from mutants import MUTANTS
from mutants_page import Row
from mutation import Mutant, applied

PROJECT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("RESULTS.md")

# The longest test file takes 20 s on a quiet machine; at worst ten of them share two cores.
TESTS_S_MAX = 900
# A hanging test is ended by itself, with its name: the slowest test takes 15 s.
TEST_S_MAX = 240
# A test that fails once and then passes is left out, and the others go on; more failures than this are no accident.
ACCIDENTS_MAX = 3
# 20,000 steps are 2 to 3 s; the simulator's own test plays 4,000 steps of a seed.
SEEDS = (5, 17, 23, 104)
SEED_STEPS = 20_000
SEED_S_MAX = 300

_FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/\S+?\.py(?:::\w+)*)", re.MULTILINE)
_HANGING = re.compile(r'/(tests/\S+\.py)", line \d+ in (test_\w+)')

_CANARIES = (
    Mutant("", "core/stream.py", "", "from __future__ import annotations\n", "raise ImportError\n"),
    Mutant("", "daemon/parent.py", "", "from __future__ import annotations\n", "raise ImportError\n"),
)


class Ran(NamedTuple):
    """The end of a command."""

    status: int  # -1: at its time limit
    output: str
    seconds: float


class Outcome(NamedTuple):
    """The result for a mutant."""

    mutant: Mutant
    killed_by: str  # the first test that failed; "": survived
    seed: int | None  # the first seed that found it; None: not found, or not simulated
    seed_s: float
    seconds: float


@contextmanager
def snapshot() -> Iterator[Path]:
    """The working tree of this moment: tracked files and files that git doesn't ignore. All copies are made of it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        capture_output=True,
        check=True,
    )
    with tempfile.TemporaryDirectory(prefix="streamd-mutants-") as name:
        for path in filter(None, listed.stdout.decode().split("\0")):
            if (PROJECT / path).is_file():
                (Path(name) / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(PROJECT / path, Path(name) / path)
        # Compiled once: half of the time of a short run.
        run(Path(name), ["-m", "compileall", "-q", "streamd"], TESTS_S_MAX)
        yield Path(name)


@contextmanager
def tree(clean: Path, mutant: Mutant | None = None) -> Iterator[Path]:
    """A copy of its own, with the mutant's edit."""
    with tempfile.TemporaryDirectory(prefix="streamd-mutant-", ignore_cleanup_errors=True) as name:
        root = Path(name)
        shutil.copytree(clean, root, dirs_exist_ok=True)
        if mutant is not None:
            edited = root / "streamd" / mutant.file
            edited.write_text(applied(mutant, clean / "streamd"), encoding="utf-8")
            for compiled in (edited.parent / "__pycache__").glob(f"{edited.stem}.*.pyc"):
                compiled.unlink()
        yield root


_running: set[int] = set()  # process groups
_stopped = threading.Event()


def stop(number: int, frame: object) -> None:
    """A signal: end all running commands, so that the copies can be removed."""
    _stopped.set()
    for group in tuple(_running):
        os.killpg(group, signal.SIGKILL)


def run(root: Path, command: Sequence[str], seconds_max: float) -> Ran:
    """Run Python in a copy, with all processes it starts; at the time limit all of them are killed."""
    if _stopped.is_set():
        raise KeyboardInterrupt
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,
    )
    _running.add(process.pid)
    try:
        output, _ = process.communicate(timeout=seconds_max)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = -1
    finally:
        _running.discard(process.pid)
    if _stopped.is_set():
        raise KeyboardInterrupt
    return Ran(status, output, time.monotonic() - began)


def run_tests(root: Path, tests: Sequence[str], left_out: Sequence[str] = ()) -> Ran:
    """Up to the first failure."""
    hanging = ["-o", f"faulthandler_timeout={TEST_S_MAX}", "-o", "faulthandler_exit_on_timeout=true"]
    deselected = [option for test in left_out for option in ("--deselect", test)]
    command = ["-m", "pytest", "-x", "-q", "-n", "0", "--tb=line", "-p", "no:cacheprovider", *hanging, *deselected]
    return run(root, [*command, *tests], TESTS_S_MAX)


def failed_test(ran: Ran) -> str:
    """The first test that failed in a run, without its parameters; "" if all passed."""
    if ran.status in (0, 5):  # 5: all tests were left out
        return ""
    found = _FAILED.search(ran.output)
    if found:
        return found[1]
    hanging = _HANGING.search(ran.output)
    return "::".join(hanging.groups()) if hanging else f"(status {ran.status})"


class Clean:
    """The copy without a mutant: a test that fails there, too, says nothing about a mutant."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._passes: dict[str, bool] = {}

    def passes(self, test: str) -> bool:
        """Whether the test passes there."""
        if test not in self._passes:
            with tree(self.root) as root:
                self._passes[test] = not failed_test(run_tests(root, [test]))
        return self._passes[test]


def killer(root: Path, clean: Clean, tests: Sequence[str], before: str = "") -> str:
    """The first test that fails on this tree, twice, and passes on the clean one; "" if there is none.

    The killer of an earlier run, `before`, is tried first.
    """

    def kills(test: str) -> bool:
        return "::" not in test or (bool(failed_test(run_tests(root, [test]))) and clean.passes(test))

    if before and failed_test(run_tests(root, [before])) == before and kills(before):
        return before
    accidents: list[str] = []
    while test := failed_test(run_tests(root, tests, accidents)):
        if len(accidents) == ACCIDENTS_MAX or kills(test):
            return test
        accidents.append(test)
    return ""


def finding_seed(root: Path, seeds: Sequence[int], flags: Sequence[str]) -> tuple[int | None, float]:
    """The first seed under which the simulator finds a violation, and the time until then."""
    seconds = 0.0
    for seed in seeds:
        command = ["tests/sim/simulate.py", *flags, "--seed", str(seed), "--run-steps", str(SEED_STEPS)]
        ran = run(root, command, SEED_S_MAX)
        seconds += ran.seconds
        if ran.status:
            return seed, seconds
    return None, seconds


def outcome_of(clean: Clean, mutant: Mutant, seeds: Sequence[int], before: str = "") -> Outcome:
    """Try a mutant. `before`: the test that killed it in an earlier run."""
    began = time.monotonic()
    with tree(clean.root, mutant) as root:
        killed_by = killer(root, clean, mutant.test_files, before)
        seed, seed_s = finding_seed(root, seeds, mutant.simulator_flags) if mutant.simulated else (None, 0.0)
    outcome = Outcome(mutant, killed_by, seed, seed_s, time.monotonic() - began)
    print(f"{'killed  ' if killed_by else 'SURVIVED'} {outcome.seconds:5.0f} s  {mutant.harm}", flush=True)
    print(f"           {killed_by or '-'}{f', seed {seed} in {seed_s:.1f} s' if seed is not None else ''}", flush=True)
    return outcome


def check_canaries(clean: Path) -> None:
    """Exit unless tests, and daemons that tests start, import the copy."""
    for canary, test in zip(_CANARIES, ("tests/core/test_stream.py", "tests/daemon/test_slot.py"), strict=True):
        with tree(clean, canary) as root:
            if not failed_test(run_tests(root, [test])):
                sys.exit(f"{test} passes without {canary.file}: it does not test the copy")


def quiet_seeds(clean: Path, seeds: Sequence[int], pool: ThreadPoolExecutor) -> list[int]:
    """The seeds that find nothing without a mutant."""

    def is_quiet(seed: int) -> bool:
        with tree(clean) as root:
            return all(finding_seed(root, [seed], flags)[0] is None for flags in ((), ("--nodes",)))

    return [seed for seed, good in zip(seeds, pool.map(is_quiet, seeds), strict=True) if good]


def machine() -> str:
    """The processors, by number and name."""
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{os.cpu_count()} vCPU {names[0] if names else ''}".rstrip()


def commit() -> str:
    """The commit of the code, with -dirty behind it if the working tree differs from it."""
    differs = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=PROJECT, check=False).returncode
    command = ["git", "rev-parse", "--short=7", "HEAD"]
    name = subprocess.run(command, cwd=PROJECT, capture_output=True, check=True, text=True).stdout.strip()
    return f"{name}-dirty" if differs else name


class Page:
    """RESULTS.md, renewed row by row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._commit = commit()
        self._lock = threading.Lock()
        self.rows = mutants_page.read(path)

    def lacks(self, mutant: Mutant) -> bool:
        """Whether the mutant's last run was on another commit, or hasn't been."""
        row = self.rows.get(mutant.harm)
        return row is None or row.commit != self._commit

    def killer_of(self, mutant: Mutant) -> str:
        """The test that killed it in its last run; "" if none did."""
        row = self.rows.get(mutant.harm)
        known = f"tests/{row.killed_by}" if row is not None and row.killed_by else ""
        return known if known.partition("::")[0] in mutant.test_files else ""

    def add(self, outcome: Outcome, seeds: Sequence[int]) -> None:
        """Renew the mutant's row. A simulator that wasn't asked this time leaves its last word."""
        mutant, row = outcome.mutant, self.rows.get(outcome.mutant.harm)
        simulator = row.simulator if row is not None else mutants_page.NOT_ASKED
        if seeds and mutant.simulated:
            simulator = f"seed {outcome.seed}, {outcome.seed_s:.0f} s" if outcome.seed is not None else "not found"
        killed_by = outcome.killed_by.removeprefix("tests/")
        reason = "" if killed_by else mutant.reason
        with self._lock:
            self.rows[mutant.harm] = Row(mutant.file, mutant.harm, killed_by, reason, self._commit, simulator)
            harms = [(each.file, each.harm) for each in MUTANTS]
            self._path.write_text(mutants_page.written(self.rows, harms, machine()), encoding="utf-8")


def main() -> None:
    """Exit status 1 if a mutant survived its tests and has no reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="", help="only mutants whose file or harm matches")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--no-sim", action="store_true", help="tests alone")
    parser.add_argument(
        "--page", type=Path, nargs="?", const=RESULTS, help="renew the mutants' rows there (RESULTS.md)"
    )
    parser.add_argument("--rest", action="store_true", help="only mutants whose row on the page isn't of this commit")
    options = parser.parse_args()
    page = Page(options.page or RESULTS)
    wanted = [each for each in MUTANTS if re.search(options.pattern, f"{each.file} {each.harm}")]
    wanted = [each for each in wanted if not options.rest or page.lacks(each)]
    if not wanted:
        sys.exit(f"no mutant matches {options.pattern!r}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    began = time.monotonic()
    with snapshot() as clean, ThreadPoolExecutor(options.jobs) as pool:
        check_canaries(clean)
        seeds = quiet_seeds(clean, () if options.no_sim else SEEDS, pool)
        unharmed = Clean(clean)

        def tried(mutant: Mutant) -> Outcome:
            outcome = outcome_of(unharmed, mutant, seeds, page.killer_of(mutant))
            if options.page is not None:
                page.add(outcome, seeds)
            return outcome

        outcomes = list(pool.map(tried, wanted))
    survivors = [each.mutant for each in outcomes if not each.killed_by]
    print(f"{len(outcomes)} mutants, {len(survivors)} survived, {time.monotonic() - began:.0f} s")
    sys.exit(any(not each.reason for each in survivors))


if __name__ == "__main__":
    main()
