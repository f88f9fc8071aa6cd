"""The budget rests on measured constants: streamd, measured from outside, must cost as much as admission charges."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from tools import needs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "loadtest"))
prices: Any = importlib.import_module("prices")

CONNECTIONS = 1500
TOLERANCE = 0.25


@pytest.fixture(scope="module")
def measured() -> Any:
    return prices.measure(CONNECTIONS)


@pytest.fixture(scope="module")
def charged() -> Any:
    return prices.expected(prices.Prices())


def test_a_relayed_stream_with_its_reader_costs_as_much_as_is_charged(measured: Any, charged: Any) -> None:
    assert measured.relay_user_bytes == pytest.approx(charged.relay_user_bytes, rel=TOLERANCE)


def test_an_idle_connection_costs_no_more_than_is_charged(measured: Any, charged: Any) -> None:
    """Only a bound: a kilobyte per connection is near the rounding of pages and arenas."""
    assert 0 < measured.conn_user_bytes <= charged.conn_user_bytes * (1 + TOLERANCE)


@needs("ss")
def test_a_stalled_readers_send_queue_costs_as_much_as_is_charged(measured: Any, charged: Any) -> None:
    assert measured.send_queue_bytes == pytest.approx(charged.send_queue_bytes, rel=TOLERANCE)
    assert measured.send_queue_bytes <= 40 * 1024
