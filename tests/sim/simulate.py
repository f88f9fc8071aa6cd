"""Run the simulation: `simulate.py --steps N` searches with new seeds, `--seed S` replays one exactly."""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from sim_world import World  # noqa: E402 (the path has to be set first)

RUN_STEPS = 100_000  # of one seed; the seed alone says what happens in them


def run(seed: int, steps: int) -> tuple[int, dict[str, int], str]:
    """One seed: the steps it took, what happened how often, and what was wrong ("" if nothing was)."""
    world = World(seed)
    try:
        world.play(steps)
    except Exception:
        where = f"seed {seed}: FAILED at step {world.steps or world.loop.steps}\nto replay: make sim SEED={seed}\n"
        return world.steps or world.loop.steps, dict(world.results), f"{traceback.format_exc()}\n{where}"
    return world.steps, dict(world.results), ""


def search(steps: int, run_steps: int, jobs: int) -> Iterator[tuple[int, dict[str, int], str]]:
    """Seeds that nobody chose, until they come to so many steps."""
    seeds = [random.SystemRandom().randrange(1 << 32) for _ in range(-(-steps // run_steps))]
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(run, seeds, [run_steps] * len(seeds))


def main() -> None:
    """Exit status 1 as soon as anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="replay this seed")
    parser.add_argument("--steps", type=int, default=1_000_000, help="callbacks into the code under test, in all")
    parser.add_argument("--run-steps", type=int, default=RUN_STEPS, help="of them for each seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--verbose", action="store_true", help="what happened how often")
    options = parser.parse_args()
    began = time.perf_counter()
    done = runs = 0
    if options.seed is not None:
        results = iter([run(options.seed, options.run_steps)])
    else:
        results = search(options.steps, options.run_steps, options.jobs)
    for steps, counts, wrong in results:
        done += steps
        runs += 1
        if options.verbose:
            print("\n".join(f"{count:8} {what}" for what, count in sorted(counts.items())))
        if wrong:
            print(wrong, file=sys.stderr)
            sys.exit(1)
    took_s = time.perf_counter() - began
    print(f"{done} steps of {runs} seeds in {took_s:.1f} s: {done / took_s * 60 / 1e6:.2f} million a minute")


if __name__ == "__main__":
    main()
