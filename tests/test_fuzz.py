"""The fuzzers' targets without a fuzzer: their seeds, and the same mutations of the seeds each time."""

from __future__ import annotations

import random
import runpy
from pathlib import Path
from typing import Any

import pytest

FUZZ: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "fuzz" / "targets.py"))
TARGETS = FUZZ["TARGETS"]

# Bytes with a meaning in one of the grammars.
TEMPTING = (
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b":",
    b"\r\n\r\n",
    b"0\r\n\r\n",
    b";",
    b"\xff",
    b'"',
    b"\\",
    b"data: ",
    b"\x01",
    b"{",
    b"[",
    b"}",
    b"]",
    b",",
    b'"model":',
    b"\0\0\0\x01",
    b"true",
)
MUTATIONS = {
    "request_path": 400,
    "quick_head": 3000,
    "chunked": 1500,
    "sse": 800,
    "json_scan": 1500,
    "replay_log": 500,
    "log_record": 300,
    "state": 1500,
    "handover": 1500,
}


def mutated(rng: random.Random, seed: bytes, other: bytes) -> bytes:
    """One to four small changes."""
    data = bytearray(seed)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data[at:at] = rng.choice(TEMPTING)
            case 1:
                del data[at : at + rng.randint(1, 8)]
            case 2 if data:
                data[at % len(data)] = rng.randrange(256)
            case 3:
                data[at:at] = data[at : at + rng.randint(1, 40)]
            case _:
                start = rng.randrange(len(other) + 1)
                data[at:at] = other[start : start + rng.randint(1, 60)]
    return bytes(data[:4096])


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_passes_its_target(name: str) -> None:
    seeds = FUZZ["seeds"](name)
    assert len(seeds) >= 5
    for seed in seeds:
        TARGETS[name](seed)
    TARGETS[name](b"")


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_seeds_pass_their_target(name: str) -> None:
    rng = random.Random(name)
    seeds = FUZZ["seeds"](name)
    for _ in range(MUTATIONS[name]):
        data = mutated(rng, rng.choice(seeds), rng.choice(seeds))
        try:
            TARGETS[name](data)
        except BaseException:
            print(f"{name}: {data!r}")
            raise
