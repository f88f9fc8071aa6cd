"""Run the simulation: `simulate.py --steps N` searches with new seeds, `--seed S` replays one exactly."""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from sim_world import World  # noqa: E402 (the path has to be set first)

RUN_STEPS = 100_000  # of one seed; the seed alone says what happens in them


def run(seed: int, steps: int, *, verbose: bool = False) -> int:
    """One seed. Returns the steps it took; prints the seed and what was wrong, and exits with 1, if something was."""
    world = World(seed)
    try:
        world.play(steps)
    except BaseException:
        traceback.print_exc()
        where = f"step {world.steps or world.loop.steps}"
        print(f"\nseed {seed}: FAILED at {where}\nto replay: make sim SEED={seed}", file=sys.stderr)
        raise SystemExit(1) from None
    if verbose:
        for what, count in sorted(world.results.items()):
            print(f"{count:8} {what}")
    return world.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="replay this seed")
    parser.add_argument("--steps", type=int, default=1_000_000, help="callbacks into the code under test, in all")
    parser.add_argument("--run-steps", type=int, default=RUN_STEPS, help="of them for each seed")
    parser.add_argument("--verbose", action="store_true", help="what happened how often")
    options = parser.parse_args()
    began = time.perf_counter()
    done = runs = 0
    if options.seed is not None:
        done, runs = run(options.seed, options.run_steps, verbose=options.verbose), 1
    while options.seed is None and done < options.steps:
        done += run(random.SystemRandom().randrange(1 << 32), options.run_steps, verbose=options.verbose)
        runs += 1
    took_s = time.perf_counter() - began
    print(f"{done} steps of {runs} seeds in {took_s:.1f} s: {done / took_s * 60 / 1e6:.2f} million a minute")


if __name__ == "__main__":
    main()
