"""Fuzz the given targets, or all in turn, with atheris: `python fuzz/run.py [TARGET…] --time SECONDS`.

Inputs that reach new code are kept in .fuzz/TARGET, so that the next run goes on from there. An input that breaks a
target is written to .fuzz/found-TARGET-*, and the exit status is 1. Once mended, it becomes a file in corpus/TARGET.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["streamd"]):
    import targets

WORK = Path(__file__).parents[1] / ".fuzz"
INPUT_BYTES_MAX = 4096  # the size of a head; longer inputs find nothing more, and are slower
INPUT_S_MAX = 5  # a longer run counts as a hang
MEMORY_MB_MAX = 512


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(targets.TARGETS))
    parser.add_argument("--time", type=int, default=60, metavar="SECONDS", help="for each target")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in args.targets:
        if name not in targets.TARGETS:
            parser.error(f"no target {name}; there are {', '.join(targets.TARGETS)}")
    if args.here:
        fuzz(args.targets[0], args.time)
    # libFuzzer ends its process, so each target runs in its own.
    ran = [
        subprocess.run([sys.executable, __file__, name, "--time", str(args.time), "--here"], check=False).returncode
        for name in args.targets or targets.TARGETS
    ]
    return int(any(ran))


def fuzz(name: str, seconds: int) -> None:
    """Run libFuzzer on the target. It ends the process and doesn't return."""
    begins, grown = WORK / f"seeds-{name}", WORK / name
    for folder in (begins, grown):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(targets.seeds(name)):
        (begins / f"{number:04}").write_bytes(seed)
    print(f"== {name}: {seconds} s", flush=True)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={INPUT_BYTES_MAX}",
        f"-timeout={INPUT_S_MAX}",
        f"-rss_limit_mb={MEMORY_MB_MAX}",
        f"-artifact_prefix={WORK}/found-{name}-",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], str(grown), str(begins), *options], targets.TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
