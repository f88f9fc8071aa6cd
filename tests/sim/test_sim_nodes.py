"""The simulation of nodes plays, plays the same way twice, and finds each of the mistakes that its rules are about."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from typing import Any, NamedTuple

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from sim_cluster import SimCluster
from sim_loop import Violation

from streamd.core.stream import Stream
from streamd.engine.follow import Follow
from streamd.engine.members import Members
from streamd.engine.owner import CopyOwner

STEPS = 6_000
SEEDS_MAX = 40


class Mistake(NamedTuple):
    """An edit of a method, the violations as which it is found, and a seed that finds it."""

    owner: type
    name: str
    was: str
    becomes: str
    found: str
    seed: int
    faults: tuple[str, ...] = ()  # the only ones that happen: the mistake shows with these, and sooner


# Two members that raise the fence at the same time are told apart by equal ids, so an entry that raises it has no seq.
UNREADABLE = "an entry that no reader can read"
LOST_DATA = ("the engine is emptied", "the engine evicts copies")

MISTAKES = {
    "two members declare a death at different seqs": Mistake(
        Follow,
        "declare_lost",
        "_fence_seen) + 1, 0)",
        "_fence_seen) + 1, stream.events)",
        UNREADABLE,
        1,
        ("a node is killed",),
    ),
    "a trim's entry is taken beside a declaration": Mistake(
        CopyOwner, "_raise_fence", "str(Position(copy.fence, 0))", "str(Position(copy.fence, last))", UNREADABLE, 1
    ),
    "NOMKSTREAM is forgotten": Mistake(
        CopyOwner, "_add", '"NOMKSTREAM", ', "", "a copy is begun in its middle", 1, LOST_DATA
    ),
    "the fence isn't raised at an end": Mistake(
        CopyOwner, "_raise_fence", "copy.fence += 1", "copy.fence += end is None", "a copy (isn't there|is behind)", 2
    ),
    "a hint of the end is trusted over the copy": Mistake(
        Follow,
        "_take",
        "if message.is_end or",
        "if message.is_end and self._end(_LOST._replace(reason='complete', clean=True)) or",
        "another end|the end before all events",
        3,
    ),
    "an overlap reaches readers twice": Mistake(
        Stream,
        "replace_log",
        "self._hand_out_from(log.seek(seq), seq,",
        "self._hand_out_from(log.seek(log.seq_first), log.seq_first,",
        "wrong event|wrong bytes|beyond the truth",
        1,
    ),
    "a wanted copy isn't looked at": Mistake(
        CopyOwner,
        "wanted",
        "if copy.state in (CopyState.WRITTEN, CopyState.DONE)",
        "if False",
        "a living stream is gone|nowhere|a living owner is declared lost",
        3,
        LOST_DATA,
    ),
    "a member that was disturbed itself declares others lost": Mistake(
        Members,
        "is_lost",
        " or now - self._whole_since[number] < self._lease_s",
        "",
        "within the lease of a disturbance|a living owner is declared lost",
        4,
    ),
    "a copy isn't looked at after a reconnect": Mistake(
        CopyOwner, "_doubt", "self._go(copy, CopyState.VERIFYING)", "pass", "another fence|doesn't continue", 8
    ),
    "silence isn't looked into": Mistake(Follow, "tick", "now - self._heard_at > SILENT_S", "False", "waits", 9),
    "a record larger than the log reaches no reader": Mistake(
        Stream, "take_record", "log.add(record)", "log.extend(record)", "a callback raised", 10
    ),
    "readers aren't told that the engine can't be asked": Mistake(
        Follow, "tick", "silent_s > self._patience_s", "False", "a reader is left alone", 2
    ),
}


def plant(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the edited method in the place of the method."""
    source = textwrap.dedent(inspect.getsource(getattr(mistake.owner, mistake.name)))
    assert source.count(mistake.was) == 1
    made: dict[str, Any] = {}
    exec(source.replace(mistake.was, mistake.becomes), vars(sys.modules[mistake.owner.__module__]), made)
    monkeypatch.setattr(mistake.owner, mistake.name, made[mistake.name])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_short_run_of_nodes_breaks_no_rule(seed: int) -> None:
    world = SimCluster(seed)
    world.play(STEPS)
    assert world.steps >= STEPS


def test_a_seed_of_nodes_plays_the_same_way_twice() -> None:
    runs = []
    for _ in range(2):
        world = SimCluster(7)
        world.play(2_000)
        runs.append((world.steps, world.seen))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_found_as_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake = MISTAKES[name]
    plant(mistake, monkeypatch)
    others = []
    # The first seed found it when it was looked for; any change of the code changes the runs.
    for seed in (mistake.seed, *range(1, SEEDS_MAX)):
        try:
            SimCluster(seed, faults=mistake.faults).play(STEPS)
        except Violation as violation:
            if re.search(mistake.found, str(violation)):
                return
            others.append(str(violation))
    pytest.fail(f"not found as {mistake.found}, but as {others}")
