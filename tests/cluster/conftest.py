"""The arguments of make test-cluster."""

from __future__ import annotations

import pytest

STORMS = 3


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--storms", type=int, default=STORMS, help="the number of random storms over real daemons")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "storm_seed" in metafunc.fixturenames:
        metafunc.parametrize("storm_seed", range(metafunc.config.getoption("--storms", STORMS)))
