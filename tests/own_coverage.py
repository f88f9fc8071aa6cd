"""Branches of a module that its own tests run: `make coverage`, or `make coverage MODULE=net/fetch` for a module.

A module's own tests are the file that mirrors it: streamd/net/fetch.py has tests/net/test_fetch.py. A branch that only
another module's tests run is not the subject of an assertion there. Measured in a process per module, since the
imports of a test file must not count for the next. It takes some minutes, so `make test` leaves it out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).parents[1]

# Per cent of a module's branches. A row below 100 has at most a few branches that only other files' tests run.
BRANCHES_PERCENT_MIN = {
    "api/admin": 100,
    "api/kept": 91,
    "api/live": 100,
    "api/llama": 100,
    "api/page_files": 100,
    "api/publish": 97,
    "api/responses": 100,
    "api/rights": 99,
    "core/answer_edges": 100,
    "core/bodies": 100,
    "core/health": 100,
    "core/lags": 100,
    "core/makers": 91,
    "core/shares": 100,
    "daemon/file_modes": 100,
    "daemon/listen": 100,
    "daemon/log_outlet": 100,
    "daemon/reload": 100,
    "daemon/request_log": 92,
    "daemon/slot": 100,
    "files": 100,
    "forward_proxy": 100,
    "net/catalogue": 94,
    "net/checks": 94,
    "net/dialer": 100,
    "net/fetch": 100,
    "net/handshakes": 100,
    "net/inquiry": 100,
    "net/questions": 96,
    "net/read_batch": 100,
    "net/runtime": 100,
    "net/tracing": 100,
    "net/tunnel": 96,
    "net/turns": 100,
    "otel/metric_points": 100,
    "otel/outcomes": 100,
    "otel/spans": 100,
    "schema": 92,
    "top/app": 96,
    "top/command": 100,
    "top/filter": 100,
    "top/head": 100,
    "top/in_thread": 100,
    "top/layout": 100,
    "top/look": 100,
    "top/views": 100,
    "wire/answer_facts": 100,
    "wire/answer_fields": 100,
    "wire/charset": 100,
    "wire/client_hello": 100,
    "wire/fast_chunk": 100,
    "wire/form_scan": 100,
    "wire/gen_ai": 100,
    "wire/json_scan": 94,
    "wire/kept_objects": 100,
    "wire/model_names": 100,
    "wire/opening": 100,
    "wire/other_models": 100,
    "wire/pages": 100,
    "wire/path_models": 100,
    "wire/retry_after": 100,
    "wire/strays": 100,
    "wire/template": 99,
    "wire/trace_context": 100,
    "wire/via": 100,
}


class Measured(NamedTuple):
    """Branches of a module, and those that its own tests run."""

    branches: int
    covered: int

    @property
    def percent(self) -> float:
        return 100 * self.covered / self.branches if self.branches else 100.0


def source_of(module: str) -> Path:
    return PROJECT / "streamd" / f"{module}.py"


def mirror_of(module: str) -> Path:
    folder, _, name = module.rpartition("/")
    return PROJECT / "tests" / folder / f"test_{name}.py"


def measure(module: str) -> Measured:
    """Run the module's own tests. If they fail, print their output and raise CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "coverage.json")
        name = f"streamd.{module.replace('/', '.')}"
        options = ("-n", "0", "-q", f"--cov={name}", "--cov-branch", f"--cov-report=json:{report}")
        command = [sys.executable, "-m", "pytest", *options, str(mirror_of(module))]
        environment = {**os.environ, "COVERAGE_FILE": str(Path(folder, "data"))}
        ran = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
        if ran.returncode:
            print(ran.stdout, ran.stderr, sep="\n")
            ran.check_returncode()
        return measured_in(json.loads(report.read_text()))


def measured_in(report: dict[str, dict[str, int]]) -> Measured:
    """The sums of a report by coverage.py."""
    return Measured(report["totals"]["num_branches"], report["totals"]["covered_branches"])


def falls_short(module: str, measured: Measured) -> bool:
    return measured.percent < BRANCHES_PERCENT_MIN[module]


def main(part: str = "") -> int:
    short = 0
    for module, least in BRANCHES_PERCENT_MIN.items():
        if part not in module:
            continue
        measured = measure(module)
        fails = falls_short(module, measured)
        short += fails
        line = f"{module:14} {measured.covered:3} of {measured.branches:3} branches {measured.percent:5.1f} %"
        print(f"{line}, at least {least}{': FALLS SHORT' if fails else ''}", flush=True)
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
