"""Run a simulation: `simulate.py --steps N` searches with new seeds, `--seed S` replays a seed exactly.

Three worlds are simulated: a worker with its upstreams and readers (sim_world.py); with `--moves` the same, where units
of connections and streams are frozen every 50 steps, and most are made anew from their records (sim_moves.py); and with
`--nodes` a cluster of nodes that share an engine (sim_cluster.py).

A search plays consecutive seeds, so its first seed and its steps play it again. Searches with `--page FILE` are parts
of a longer search: the page has the sums of all its parts.

The summary counts the situations of the world's watch. A search of SITUATIONS_STEPS_MIN steps or more fails when a
situation never came up: rules about a situation that isn't reached prove nothing.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parents[level]) for level in (0, 1, 2)]

import sim_moves  # noqa: E402 (the path has to be set first)
import sim_page  # noqa: E402 (the path has to be set first)
from sim_cluster import SimCluster  # noqa: E402
from sim_cluster_watch import CLUSTER_SITUATIONS  # noqa: E402
from sim_watch import SITUATIONS  # noqa: E402
from sim_world import MovingWorld, World  # noqa: E402

RUN_STEPS = 100_000  # of each seed; the seed alone decides all of them

# The rarest situation came up twice in 1.4 million steps: a million would miss it by chance in a search of four, ten
# million in a search of a million.
SITUATIONS_STEPS_MIN = 10_000_000


class Game(NamedTuple):
    """A world that can be played."""

    target: str  # of make
    world: Callable[[int], World | SimCluster]  # of a seed
    situations: tuple[str, ...]


WORKER = Game("sim", World, SITUATIONS)
MOVES = Game("sim-moves", MovingWorld, (*SITUATIONS, *sim_moves.SITUATIONS))
NODES = Game("sim-nodes", SimCluster, CLUSTER_SITUATIONS)


class Run(NamedTuple):
    """The run of a seed."""

    steps: int
    seconds: float
    results: Counter[str]  # answers by kind, status and end
    seen: Counter[str]  # situations
    wrong: str  # the violation and how to replay it; "" if there was none


def run(game: Game, seed: int, steps: int) -> Run:
    """Play a seed to its end, or to the first violation."""
    began = time.perf_counter()
    world = game.world(seed)
    try:
        world.play(steps)
    except Exception:
        done = world.steps or world.loop.steps
        replay = f"make {game.target} SEED={seed} ARGS='--run-steps {steps}'"
        where = f"seed {seed}: FAILED at step {done}\nto replay: {replay}\n"
        seconds = time.perf_counter() - began
        return Run(done, seconds, world.results, world.seen, f"{traceback.format_exc()}\n{where}")
    return Run(world.steps, time.perf_counter() - began, world.results, world.seen, "")


def search(game: Game, first_seed: int, steps: int, run_steps: int, jobs: int) -> Iterator[Run]:
    """Consecutive seeds, until their steps reach this number."""
    with ProcessPoolExecutor(jobs) as pool:
        seeds = range(first_seed, first_seed - (-steps // run_steps))
        yield from pool.map(run, [game] * len(seeds), seeds, [run_steps] * len(seeds))


def table(counts: Counter[str], names: list[str]) -> str:
    """A line for each name, with its count."""
    return "\n".join(f"{counts[name]:10} {name}" for name in names)


def main() -> None:
    """Exit status 1 at the first violation, or when a situation was never reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", action="store_true", help="a cluster of nodes that share an engine")
    parser.add_argument("--moves", action="store_true", help="units of a worker move every 50 steps")
    parser.add_argument("--seed", type=int, help="replay this seed")
    parser.add_argument("--first-seed", type=int, help="of the search; random by default")
    parser.add_argument("--steps", type=int, default=1_000_000, help="callbacks into the code under test, in all")
    parser.add_argument("--run-steps", type=int, default=RUN_STEPS, help="of them for each seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--verbose", action="store_true", help="count the answers as well")
    parser.add_argument("--page", type=Path, help="add the search's figures to this page")
    options = parser.parse_args()
    game = NODES if options.nodes else MOVES if options.moves else WORKER
    commit = sim_page.commit() if options.page else ""  # of the code at the start: files may change meanwhile
    began = time.perf_counter()
    first_seed = random.SystemRandom().randrange(1 << 32) if options.first_seed is None else options.first_seed
    done = runs = 0
    process_s = 0.0
    results: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    if options.seed is not None:
        played = iter([run(game, options.seed, options.run_steps)])
    else:
        played = search(game, first_seed, options.steps, options.run_steps, options.jobs)
    for each in played:
        done += each.steps
        runs += 1
        process_s += each.seconds
        results += each.results
        seen += each.seen
        if each.wrong:
            print(each.wrong, file=sys.stderr)
            sys.exit(1)
    took_s = time.perf_counter() - began
    if options.verbose:
        print(table(results, sorted(results)))
    print(table(seen, list(game.situations)))
    print(f"{done} steps of {runs} seeds in {took_s:.1f} s: {done / took_s * 60 / 1e6:.2f} million a minute")
    if options.seed is None:
        last_seed = first_seed + runs - 1
        print(f"seeds {first_seed} to {last_seed}")
        if options.page:
            part = sim_page.Part(commit, first_seed, last_seed, options.run_steps, done, process_s / 60)
            sim_page.add(options.page, game.target, part, seen, game.situations)
    missed = [name for name in game.situations if not seen[name]]
    if missed and done >= SITUATIONS_STEPS_MIN:
        print("never reached: " + "; ".join(missed), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
