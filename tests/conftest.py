"""Set-up of all tests: the profiles of hypothesis, and a summary of skipped tests at the end."""

import gc
import os

import pytest
import tools
from hypothesis import HealthCheck, settings

_QUIET = [HealthCheck.too_slow]  # a slow machine is no fault of the code

# Why no deadline: tests hold no wall-clock bounds, and two slow cores are shared.
# Ordinary runs repeat; HYPOTHESIS_PROFILE=thorough (make test-thorough) searches longer.
settings.register_profile("ordinary", max_examples=100, deadline=None, derandomize=True, suppress_health_check=_QUIET)
settings.register_profile("thorough", max_examples=5000, deadline=None, suppress_health_check=_QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ordinary"))


def pytest_collection_finish() -> None:
    """Keep the collector off the modules and the 18,000 items, which live as long as the run: a full collection took a
    second, and tests ask for many.
    """
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the reasons of skipped tests; under xdist the reports come from its workers."""
    reasons = []
    for report in terminalreporter.getreports("skipped"):
        if isinstance(report.longrepr, tuple):  # not so for an expected failure
            file, line, reason = report.longrepr
            place = f"{os.path.relpath(file, terminalreporter.config.rootpath)}:{line}"
            reasons.append((place, reason.removeprefix("Skipped: ")))
    if reasons:
        terminalreporter.section("skipped")
        for line in tools.advice(reasons):
            terminalreporter.write_line(line)
